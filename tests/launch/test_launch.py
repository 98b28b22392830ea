"""A user's own commands: what is started, what is written, what another start of the same config gives."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from zygote import Ended, Run, Zygote

# In float64 nothing is within rounding of a kink.
EXACT = ["--train.precision", "float64"]
SHORT = [*EXACT, "--train.epochs", "4", "--optim.name", "SGD", "--optim.lr", "0.02", "--track.every_steps", "10"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def start(cwd: Path, *argv: str, nproc: int = 0, timeout_s: float = 120) -> subprocess.CompletedProcess:
    """The package's command line, as one process or under torchrun."""
    launcher = [*TORCHRUN, f"--nproc_per_node={nproc}"] if nproc else [sys.executable]
    command = [*launcher, "-m", "dist_train", *argv]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout_s, check=False)


def forked(zygote: Zygote, cwd: Path, *argv: str, ranks: int = 1, **keys) -> Ended:
    """The same of a process that has imported torch: where the start itself is not what is tested."""
    return zygote.run(Run(list(argv), ranks, cwd=str(cwd), timeout_s=120, **keys))[0]


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the same run as one process, under torchrun with 2 ranks, and with 4 that are forked."""
    folder = tmp_path_factory.mktemp("runs")
    for nproc in (0, 2):
        done = start(folder, *SHORT, "--run.dir", f"n{nproc}", nproc=nproc)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("rank  host") == 1 and "results in n" in done.stdout
    out = forked(zygote, folder, *SHORT, "--run.dir", "n4", ranks=4).check().out
    assert "".join(out).count("rank  host") == 1 and "results in n" in out[0]
    return folder


@pytest.mark.parametrize("nproc", [2, 4])
def test_torchrun_gives_what_one_process_gives(runs: Path, nproc: int):
    alone, together = lines_of(runs / "n0"), lines_of(runs / f"n{nproc}")
    assert all("straggler/rank" in line for line in together if "train/loss" in line)
    for lines, ranks in ((alone, 1), (together, nproc)):
        assert all(len(line["ranks/own_ms"]) == ranks for line in lines if "train/loss" in line)
    slowest = [line for line in together if "train/loss" in line]
    assert all(max(line["ranks/own_ms"]) == line["straggler/own_ms"] for line in slowest)
    together = [{k: v for k, v in line.items() if not k.startswith("straggler/")} for line in together]
    assert len(alone) == len(together) > 12
    assert (together[0]["event"], together[0]["backend"], together[0]["world_size"]) == ("start", "ddp", nproc)
    for a, b in zip(alone[1:], together[1:], strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"time_s", "train/samples_per_s", "ranks/own_ms"}:
            assert b[name] == pytest.approx(a[name], rel=1e-9)


def test_what_a_run_writes(runs: Path):
    start, *metrics = lines_of(runs / "n0")
    of_metrics = {"unit", "lower_is_better", "test_splits", "best_metric"}
    assert {"step", "epoch", "time_s", "event", "at", "backend", "world_size", "host"} | of_metrics == set(start)
    assert (start["unit"], start["best_metric"], start["test_splits"]) == ("samples", "eval/accuracy", [])
    assert (start["step"], start["event"], start["backend"], start["world_size"]) == (0, "start", "single", 1)
    train = {f"train/{name}" for name in ("loss", "grad_norm", "lr", "samples_per_s")}
    assert {"step", "epoch", "time_s", "ranks/own_ms"} | train == set(metrics[0])
    assert [m["step"] for m in metrics if "train/loss" in m] == [*range(10, 92, 10), 92]
    assert [m["step"] for m in metrics if "eval/accuracy" in m] == [23, 46, 69, 92]
    summary = json.loads((runs / "n2/summary.json").read_text())
    assert summary["status"] == "finished" and summary["backend"] == "ddp" and summary["world_size"] == 2
    assert summary["steps"] == 92 and summary["epochs"] == 4 and summary["samples"] == 4 * 1438
    assert summary["eval/accuracy"] == lines_of(runs / "n2")[-1]["eval/accuracy"]
    assert summary["samples_per_s"] == pytest.approx(summary["samples"] / summary["train_s"])
    assert 0 < summary["step_ms"]["p50"] <= summary["step_ms"]["p95"]
    assert {"python", "torch", "dist-train"} <= summary["versions"].keys() and summary["device"] == "cpu"


def test_a_finished_run_is_not_overwritten(runs: Path, zygote: Zygote):
    before = {path: path.read_bytes() for path in (runs / "n0").iterdir()}
    done = forked(zygote, runs, *SHORT, "--run.dir", "n0")
    assert done.codes == [2] and done.err[0].startswith("dist_train: run.dir: got n0, which holds a finished run")
    assert before == {path: path.read_bytes() for path in (runs / "n0").iterdir()}


def test_training_from_the_resolved_config_repeats_the_run(runs: Path, zygote: Zygote):
    forked(zygote, runs, "--config", "n0/config.yaml", "--run.dir", "again").check()
    assert yaml.safe_load((runs / "again/config.yaml").read_text())["optim"]["lr"] == 0.02
    for a, b in zip(lines_of(runs / "n0"), lines_of(runs / "again"), strict=True):
        timed = ("at", "time_s", "train/samples_per_s", "ranks/own_ms")
        assert {k: v for k, v in a.items() if k not in timed} == {k: v for k, v in b.items() if k not in timed}


def test_eval_gives_the_runs_own_result(runs: Path, zygote: Zygote):
    summary = json.loads((runs / "n2/summary.json").read_text())
    done = forked(zygote, runs, "eval", "--run.dir", "n2", ranks=2).check()
    assert json.loads("".join(done.out)) == {name: summary[name] for name in ("eval/loss", "eval/accuracy")}
    alone = json.loads(forked(zygote, runs, "eval", "--run.dir", "n2").out[0])
    assert alone["eval/accuracy"] == summary["eval/accuracy"]
    assert alone["eval/loss"] == pytest.approx(summary["eval/loss"], rel=1e-9)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda run: (run / "weights.pt").unlink(), "expected the folder of a finished run"),
        (lambda run: (run / "weights.pt").write_bytes(b"not weights"), "weights.pt, which is damaged"),
        (lambda run: (run / "config.yaml").unlink(), "with config.yaml in it"),
    ],
)
def test_eval_of_a_damaged_run_says_so(runs: Path, zygote: Zygote, tmp_path: Path, damage, said: str):
    copy = tmp_path / "run"
    copy.mkdir()
    for path in (runs / "n0").iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    damage(copy)
    done = forked(zygote, runs, "eval", "--run.dir", str(copy))
    assert done.codes == [2] and said in done.err[0] and "Traceback" not in done.err[0] and not done.out[0]


FAILING_MODEL = """
import os
from dist_train.models.mlp import MLP

class Fails(MLP):
    def __init__(self, input_shape, classes):
        super().__init__(input_shape, classes)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        if os.environ["RANK"] == "1" and self.calls == 5:
            raise RuntimeError("planted on rank 1")
        return super().forward(x)
"""


def test_a_failure_on_one_rank_ends_all_and_is_shown_first(tmp_path: Path):
    (tmp_path / "failing.py").write_text(FAILING_MODEL)
    done = start(tmp_path, "--model.name", "failing:Fails", "--run.dir", "run", nproc=2, timeout_s=60)
    assert done.returncode != 0
    ours = [line for line in done.stderr.splitlines() if line.startswith("[rank ")]
    assert ours[0].startswith("[rank 1]") and "[rank 1] RuntimeError: planted on rank 1" in ours
    assert not [line for line in ours if line.startswith("[rank 0]") and "Error" in line]
    assert not (tmp_path / "run/summary.json").exists()


def test_a_run_that_did_not_finish_starts_anew(zygote: Zygote, tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 1}\n')
    done = forked(zygote, tmp_path, "--train.epochs", "1", "--run.dir", "run").check()
    assert "did not finish; it starts anew" in done.out[0]
    assert [line["step"] for line in lines_of(tmp_path / "run")] == [0, 23, 23]


def test_a_users_own_model_and_data(zygote: Zygote, tmp_path: Path):
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "from dist_train.data.sets import Data, InMemory\n"
        "class Linear(torch.nn.Linear):\n"
        "    def __init__(self, input_shape, classes, bias=True):\n"
        "        super().__init__(input_shape[0], classes, bias)\n"
        "def blobs(root, download, n):\n"
        "    labels = torch.arange(n) % 2\n"
        "    images = (labels[:, None] * 200).expand(-1, 3).to(torch.uint8)\n"
        "    split = InMemory(images, labels)\n"
        "    return Data(split, split, (3,), ('low', 'high'))\n"
    )
    own = ["--model.name", "mine:Linear", "--model.args.bias", "false", "--data.name", "mine:blobs"]
    done = start(tmp_path, *own, "--data.args.n", "100", "--optim.lr", "0.1", "--run.dir", "run")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run/summary.json").read_text())["samples"] == 2000
    refused = forked(zygote, tmp_path, *own, "--run.dir", "b")
    assert refused.err[0].startswith("dist_train: data.args.n: got nothing")
