"""What reads a run's checkpoints: inspect, export --which best, model.init_from; and a job that was killed."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dist_train.checkpoint import manifest, weights
from dist_train.errors import ConfigError
from dist_train.loop.evaluate import Evaluation
from dist_train.ranks.launcher import Launcher
from dist_train.tools import export, inspect

from parity_cells import config
from resume_cells import run_series, saving


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that kept its newest checkpoint, of step 24, and its best, of step 8."""
    folder = tmp_path_factory.mktemp("inspect") / "run"
    cell = dataclasses.replace(config("single", "AdamW"), track=dataclasses.replace(config().track, every_steps=8))
    cell = dataclasses.replace(cell, train=dataclasses.replace(cell.train, eval_every_steps=8))
    with pytest.MonkeyPatch.context() as patch:
        losses, evaluate = iter([0.1, 0.3, 0.2]), Evaluation.run

        def told(*args, **keys):
            return evaluate(*args, **keys) | {"eval/loss": next(losses)}

        patch.setattr(Evaluation, "run", told)
        run_series([(saving(cell, folder, 8, keep_last=1, keep_best=1, best_metric="eval/loss"), None)])
    return folder


def said(argv: list[str], capsys: pytest.CaptureFixture) -> tuple[int, str]:
    capsys.readouterr()
    return inspect.run(argv, Launcher()), capsys.readouterr().out


def test_inspect_of_a_run(run: Path, capsys: pytest.CaptureFixture):
    code, out = said([str(run)], capsys)
    head, *rows = out.splitlines()
    assert code == 0 and head.split()[:2] == ["checkpoint", "step"]
    assert [row.split()[1] for row in rows] == ["24", "8"] and "loss 0.1000" in rows[1]


def test_inspect_of_a_checkpoint(run: Path, capsys: pytest.CaptureFixture):
    folder = run / "checkpoints/step-00000008"
    code, out = said([str(folder)], capsys)
    assert code == 0 and "2 + 2 steps" in out and "synthetic, 131 samples" in out
    assert "optim.layers.1.weight.exp_avg_sq  float32  [50, 36]" in out
    code, out = said([str(folder), "--json"], capsys)
    (tree,) = json.loads(out)
    assert tree["step"] == 8 and tree["tensors"]["model.layers.1.weight"]["shape"] == [50, 36]


def test_inspect_names_damage(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    copy = shutil.copytree(run, tmp_path / "copy")
    with next((copy / "checkpoints/step-00000024").glob("*.distcp")).open("r+b") as file:
        file.seek(500)
        file.write(b"\xff")
    code, out = said([str(copy)], capsys)
    assert code == 1 and "damaged: " in out and "does not fit its hash" in out and "step-00000008" in out
    with pytest.raises(ConfigError, match="expected the folder of a checkpoint"):
        inspect.run([str(tmp_path)], Launcher())


def test_export_writes_the_best(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    argv = ["--run.dir", str(run), "--format", "pt", "--output"]
    assert export.run([*argv, str(tmp_path / "best.pt"), "--which", "best"], Launcher()) == 0
    assert json.loads(capsys.readouterr().out)["weights"].endswith("step-00000008")
    assert export.run([*argv, str(tmp_path / "final.pt")], Launcher()) == 0
    best, final = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("best", "final"))
    saved = weights.read(run / "checkpoints/step-00000008")
    assert all(torch.equal(best[name], saved[name]) for name in saved)
    assert not torch.equal(best["layers.1.weight"], final["layers.1.weight"])


def test_a_run_starts_from_a_checkpoint_and_resumes_without_it(run: Path, tmp_path: Path):
    source = shutil.copytree(run / "checkpoints/step-00000008", tmp_path / "source")
    cell = config("single", "AdamW")
    cell = dataclasses.replace(cell, model=dataclasses.replace(cell.model, init_from=str(source)))
    alone, _ = run_series([(saving(cell, tmp_path / "a"), None), (saving(cell, tmp_path / "b"), 13)])
    shutil.rmtree(source)
    resumed = subprocess.run(
        [sys.executable, "-m", "dist_train", "--config", str(tmp_path / "b/config.yaml")],
        capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=60,
    )  # fmt: skip
    assert resumed.returncode == 0, resumed.stderr
    assert "step 10" in resumed.stdout
    final = torch.load(tmp_path / "b/weights.pt", weights_only=True)
    for name, value in alone.weights.items():
        assert (final[name].double().numpy() == value).all()


@pytest.mark.full
def test_a_killed_job_goes_on_with_the_same_command(tmp_path: Path):
    """torchrun with two ranks, one of which is killed; then FSDP2; then a laptop."""
    argv = ["--run.dir", str(tmp_path / "run"), "--train.epochs", "400", "--checkpoint.every_steps", "20"]
    argv += ["--train.eval_every_epochs", "null", "--train.threads", "1", "--optim.name", "SGD", "--optim.lr", "0.003"]
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "dist_train"]
    for backend in ("ddp", "fsdp2"):
        before = newest(tmp_path)
        process = subprocess.Popen(
            [*two, *argv, "--backend.name", backend], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        while newest(tmp_path) < before + 60:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        os.kill(rank_of(process.pid, 1), signal.SIGKILL)
        out, _ = process.communicate(timeout=60)
        assert process.returncode != 0 and (backend == "ddp" or "resumed from" in out)
    last = newest(tmp_path)
    argv[3] = "1000"
    argv += ["--train.max_steps", str(last + 50)]
    done = subprocess.run([sys.executable, "-m", "dist_train", *argv], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and f"step {last}, written by fsdp2 on 2 ranks" in done.stdout, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "train/loss" in line]
    assert steps == [*range(50, last + 50, 50), last + 50] or steps == list(range(50, last + 51, 50))


def newest(place: Path) -> int:
    found, _ = manifest.listed(place / "run")
    return found[0][1].step if found else 0


def rank_of(parent: int, rank: int) -> int:
    """The process of a rank that torchrun started."""
    for task in Path(f"/proc/{parent}/task").iterdir():
        for child in (task / "children").read_text().split():
            if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
                return int(child)
    raise AssertionError(f"no rank {rank} under {parent}")
