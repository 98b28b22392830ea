"""The parity command, as a user runs it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from dist_train.tools.cells import first_error

from zygote import Ended, Run, Zygote

OPTIONS = [
    *("--data.name=synthetic", "--data.args.n=131", "--data.args.n_test=101", "--data.args.shape=[36]"),
    *("--train.device=cpu", "--optim.lr=1e-3", "--steps=4"),
]


@pytest.fixture
def parity(zygote: Zygote) -> Callable[..., Ended]:
    """The command, which finds the model of this file. What it starts for a cell is not forked."""
    return lambda *options: zygote.run(Run(["parity", *OPTIONS, *options], timeout_s=240))[0]


def drawn_by_rank(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """The mistake that the command is there to find."""
    torch.manual_seed(int(os.environ.get("RANK", "0")))
    return nn.Linear(*input_shape, classes)


def raises_on_rank_1(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Runs alone, and fails where it is one of several."""
    if os.environ.get("RANK") == "1":
        raise RuntimeError("planted on rank 1")
    return nn.Linear(*input_shape, classes)


def killed_on_rank_1(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """As where the memory is at its end."""
    if os.environ.get("RANK") == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return nn.Linear(*input_shape, classes)


def hangs_where_there_are_ranks(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """And has said more than a pipe holds."""
    if "RANK" in os.environ:
        print("said by a library\n" * 100_000, flush=True)
        time.sleep(3600)
    return nn.Linear(*input_shape, classes)


class OfItsShare(nn.BatchNorm1d):
    """A forward of its own, so that each rank takes the statistics of its own share."""

    def forward(self, x):
        return super().forward(x)


def with_batch_statistics(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    return nn.Sequential(nn.Linear(*input_shape, 8), OfItsShare(8), nn.Linear(8, classes))


@pytest.mark.parametrize(
    ("model", "options", "line"),
    [
        ("raises_on_rank_1", [], "fail: RuntimeError: planted on rank 1"),
        pytest.param("killed_on_rank_1", [], "fail: rank 1 was ended by SIGKILL", marks=pytest.mark.full),
        pytest.param(
            "hangs_where_there_are_ranks",
            ["--timeout-s=25"],
            "fail: no result within 25 s; its last line: said by",
            marks=pytest.mark.full,
        ),
        (
            "with_batch_statistics",
            ["--train.global_batch_size=48"],
            "fail: the result depends on how a batch is shared out: `single` itself gives another",
        ),
    ],
)
def test_a_cell_that_starts_and_fails_is_a_failure(parity, model: str, options: list[str], line: str):
    done = parity("--backends=ddp", "--world-sizes=2", f"--model.name={__name__}:{model}", *options)
    assert (done.codes, done.err) == ([1], [""])
    (row,) = [row for row in done.out[0].splitlines() if row.startswith("ddp")]
    assert line in row and ("(OfItsShare)" in row or model != "with_batch_statistics")
    assert done.out[0].splitlines()[-1] == "0 of 1 agree, 0 not run"


@pytest.mark.full
def test_nothing_compared_is_no_success(parity):
    done = parity("--backends=deepspeed:1", "--world-sizes=2", "--train.precision=float16", "--model.hidden=[8]")
    assert done.codes == [1]
    assert done.out[0].splitlines()[-1] == "0 of 0 agree, 1 not run: nothing was compared"


def test_the_first_error_is_found_in_what_a_cell_said():
    said = "W0101 noise\n[rank 1] Traceback (most recent call last):\n[rank 1]   File 'x'\n[rank 1] my.OwnError: why\n"
    assert (
        first_error(said + "[rank 0] Traceback (most recent call last):\n[rank 0] RuntimeError: echo", 1)
        == "my.OwnError: why"
    )
    assert first_error("", -11) == "it was ended by SIGSEGV"
    assert first_error("one\n\ntwo\n", 3) == "exit code 3; its last line: two"
    assert first_error("", 3) == "exit code 3; it said nothing"


def test_the_table_and_what_cannot_run(parity, tmp_path: Path):
    file = tmp_path / "parity.json"
    few = ["--backends=ddp,deepspeed:1", "--world-sizes", "2", "--train.global_batch_size=7", "--model.hidden=[8]"]
    done = parity(*few, "--train.precision=float16", "--json", str(file))
    assert (done.codes, done.err) == ([0], [""])
    table = json.loads(file.read_text(encoding="utf-8"))
    single, around, two, refused = table["rows"]
    assert (single["backend"], single["result"], around["result"]) == ("single", "reference", "rounding")
    assert (two["world_size"], two["result"]) == (2, "pass")
    assert max(two["loss"], two["grad_norm"], two["weights"]) < 1e-2 and two["exact"] < 1e-9
    assert two["samples_per_s"] > 0
    assert (refused["result"], refused["loss"]) == ("not run", None)
    assert "got float16 with backend deepspeed" in refused["why"]
    lines = done.out[0].splitlines()
    assert lines[-1] == "1 of 1 agree, 1 not run"
    assert [line for line in lines if line.startswith("ddp") and line.endswith("pass")]
    assert [line for line in lines if line.startswith("deepspeed:1") and "not run: train.precision" in line]


def test_a_model_that_differs_by_rank_fails(parity):
    # Not ddp: it hands rank 0's weights to all. fully_shard keeps each rank's own part.
    done = parity("--backends=fsdp2", "--world-sizes=2", f"--model.name={__name__}:drawn_by_rank")
    assert done.codes == [1], done.err[0]
    assert done.out[0].splitlines()[-1] == "0 of 1 agree, 0 not run"
    assert "fail: in float64 loss of step 1" in done.out[0]


def test_a_run_that_fails_alone_is_a_line(parity):
    done = parity("--optim.name=SGD", "--optim.lr=1e30")
    assert (done.codes, done.err) == ([1], [""])
    single, end = [line for line in done.out[0].splitlines() if line][-2:]
    assert single.startswith("single") and "fail: " in single and "is not finite on rank 0" in single
    assert end == "0 of 1 agree, 0 not run"


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--world-sizes=2,x"], "--world-sizes: got 'x'"),
        (["--timeout-s=soon"], "--timeout-s: got 'soon'"),
        (["--steps=0"], "--steps: got '0'"),
        (["--backends=dpp"], "--backends: got unknown backend 'dpp'"),
        (["--backends=deepspeed:4"], "--backends: got unknown backend 'deepspeed:4'"),
        (["--json"], "parity: got --json without a value"),
        (["--json=/proc/nowhere/parity.json"], "--json: got /proc/nowhere/parity.json, which cannot be written"),
        (["--optim.lrr=1"], "optim: got unknown key 'lrr'"),
    ],
)
def test_a_bad_option_is_one_line(parity, options: list[str], line: str):
    done = parity(*options)
    assert done.codes == [2]
    assert line in done.err[0]
    assert done.err[0].count("\n") == 1


@pytest.mark.full
def test_all_that_people_train_with_at_once(tmp_path: Path):
    """Dropout, batch statistics, averaged weights and Muon, under every backend, on ranks that share nothing evenly."""
    file = tmp_path / "parity.json"
    own = ["--model.name=user_replay:Normed", "--optim.name=Muon", "--optim.ema=0.9", "--train.global_batch_size=22"]
    words = [sys.executable, "-m", "dist_train", "parity", *OPTIONS, "--steps=20", *own, "--world-sizes=1,2,3,4"]
    words += ["--data.args.shape=[16]", "--json", str(file)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(words, capture_output=True, text=True, timeout=1200, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [row for row in json.loads(file.read_text())["rows"] if row["result"] == "pass"]
    assert len(rows) == 4 * 7  # ddp, fsdp2, accelerate, and four stages of deepspeed
    assert max(max(row["loss"], row["grad_norm"]) for row in rows) < 1e-5
    assert max(row["exact"] or 0 for row in rows) < 1e-9
