"""The parity command, as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

OPTIONS = [
    *("--data.name=synthetic", "--data.args.n=131", "--data.args.n_test=101", "--data.args.shape=[36]"),
    *("--train.device=cpu", "--optim.lr=1e-3", "--steps=4"),
]


def parity(*options: str) -> subprocess.CompletedProcess:
    """The real command, which finds the model of this file."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])}
    command = [sys.executable, "-m", "dist_train", "parity", *OPTIONS, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=environment)


def drawn_by_rank(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """The mistake that the command is there to find."""
    torch.manual_seed(int(os.environ.get("RANK", "0")))
    return nn.Linear(*input_shape, classes)


def test_the_table_and_what_cannot_run(tmp_path: Path):
    file = tmp_path / "parity.json"
    few = ["--backends=ddp", "--world-sizes", "2,4", "--train.global_batch_size=6", "--model.hidden=[8]"]
    done = parity(*few, "--json", str(file))
    assert (done.returncode, done.stderr) == (0, "")
    table = json.loads(file.read_text(encoding="utf-8"))
    single, two, four = table["rows"]
    assert (single["backend"], single["result"]) == ("single", "reference")
    assert (two["world_size"], two["result"]) == (2, "pass")
    assert max(two["loss"], two["grad_norm"], two["weights"]) <= table["tolerance"] == 1e-5
    assert two["samples_per_s"] > 0
    assert (four["result"], four["loss"]) == ("not run", None)
    assert "got 6 on 4 ranks" in four["why"]
    lines = done.stdout.splitlines()
    assert lines[-1] == "2 of 2 agree, 1 not run"
    assert [line for line in lines if line.startswith("ddp") and line.endswith("pass")]
    assert [line for line in lines if line.startswith("ddp") and "not run: train.global_batch_size" in line]


def test_a_model_that_differs_by_rank_fails():
    # Not ddp: it hands rank 0's weights to all. fully_shard keeps each rank's own part.
    done = parity("--backends=fsdp2", "--world-sizes=2", f"--model.name={__name__}:drawn_by_rank")
    assert done.returncode == 1, done.stderr
    assert done.stdout.splitlines()[-1] == "1 of 2 agree, 0 not run"
    assert "fail" in done.stdout


def test_a_run_that_fails_alone_is_a_line():
    done = parity("--optim.name=SGD", "--optim.lr=1e30")
    assert (done.returncode, done.stderr) == (1, "")
    single, end = done.stdout.splitlines()[-3], done.stdout.splitlines()[-1]
    assert single.startswith("single") and "fail: " in single and "is not finite on rank 0" in single
    assert end == "0 of 1 agree, 0 not run"


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--world-sizes=2,x"], "--world-sizes: got 'x'"),
        (["--steps=0"], "--steps: got '0'"),
        (["--backends=dpp"], "--backends: got unknown backend 'dpp'"),
        (["--backends=deepspeed:4"], "--backends: got unknown backend 'deepspeed:4'"),
        (["--json"], "parity: got --json without a value"),
        (["--json=/proc/nowhere/parity.json"], "--json: got /proc/nowhere/parity.json, which cannot be written"),
        (["--optim.lrr=1"], "optim: got unknown key 'lrr'"),
    ],
)
def test_a_bad_option_is_one_line(options: list[str], line: str):
    done = parity(*options)
    assert done.returncode == 2
    assert line in done.stderr
    assert done.stderr.count("\n") == 1
