"""Worker processes end with the run that they work for, however it ends; and what keeps them from starting is said."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from dist_train.data import workers
from dist_train.data.feed import Feed
from dist_train.data.order import global_indices
from dist_train.errors import ConfigError

import user_data
from zygote import Run, Zygote

ENDS_WITHIN_S = 20.0


@contextlib.contextmanager
def started(folder: Path, *argv: str, **environment: str) -> Iterator[subprocess.Popen]:
    """A long run with two workers, in a process group of its own, whose words go to `out`."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parents[2])])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, "-m", "dist_train", "--data.name", "user_data:slow", "--data.workers", "2"]
    command += [
        "--train.epochs",
        "1000",
        "--model.hidden",
        "[8]",
        "--train.device",
        "cpu",
        "--run.dir",
        str(folder / "run"),
        *argv,
    ]
    with (folder / "out").open("w") as out:
        run = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    with run:
        try:
            yield run
        finally:
            run.kill()


def descendants(folder: Path) -> list[int]:
    """Every process that was started in this folder."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdecimal() and os.readlink(process / "cwd") == str(folder):
                found.append(int(process.name))
        except OSError:  # it is gone, or another's
            continue
    return found


def wait_for(what: Callable[[], bool], process: subprocess.Popen | None = None) -> None:
    deadline = time.monotonic() + (120 if process else ENDS_WITHIN_S)
    while not what():
        assert process is None or process.poll() is None, f"ended with {process.returncode}"
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def tmpdir():
    """A folder with a short path."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


LONG = [pytest.param(how, marks=pytest.mark.full) for how in ("interrupted twice", "all are asked to stop")]


@pytest.mark.parametrize("how", ["error", "killed", *LONG])
def test_no_process_is_left(tmp_path: Path, tmpdir: Path, how: str):
    first = str(global_indices(4000, 0, 0, 0, 64)[60])  # of the first step, and not of what is looked at before it
    at = {"error": ["2000"], "interrupted twice": [first, "--data.args.what", "hang"]}.get(how, ["-1"])
    argv = ["--data.args.at", *at, "--checkpoint.every_epochs", "100000"]
    with started(tmp_path, *argv, TMPDIR=str(tmpdir)) as run:
        if how != "error":
            # The run, two workers, their server, and what watches their semaphores.
            wait_for(lambda: len(descendants(tmp_path)) == 5, run)
        if how == "killed":
            run.kill()
        elif how == "interrupted twice":  # in a terminal, which sends it to all
            while run.poll() is None:
                os.killpg(run.pid, signal.SIGINT)
                time.sleep(0.7)
        elif how == "all are asked to stop":  # as Slurm does
            os.killpg(run.pid, signal.SIGTERM)
        code = run.wait(60)
    wait_for(lambda: not descendants(tmp_path))
    said = (tmp_path / "out").read_text()
    assert code == {"error": 2, "killed": -signal.SIGKILL, "interrupted twice": 130}.get(how, 75), said
    assert ("of the data set" in said) == (how == "error"), said
    assert how in ("error", "killed") or "Traceback" not in said  # a worker may be handing over a sample at that moment
    assert "leaked" not in said and "ignored" not in said
    assert not list(tmpdir.glob("pymp-*"))
    if how == "all are asked to stop":  # the workers went on until it was saved
        assert list((tmp_path / "run" / "checkpoints").glob("step-*"))


def test_no_process_is_left_by_a_run_that_is_killed_while_its_server_imports(tmp_path: Path, tmpdir: Path):
    with started(tmp_path, TMPDIR=str(tmpdir), SLOW_IMPORT="") as run:
        wait_for(lambda: len(descendants(tmp_path)) == 3, run)
    wait_for(lambda: not descendants(tmp_path))


def test_a_worker_that_hangs_ends_with_its_epoch(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)
    data = user_data.slow("", False, at=2, what="hang")
    feed = Feed(data.train, data, torch.device("cpu"), torch.float32, False, False, workers=1)
    epoch = feed(np.arange(8).reshape(8, 1))
    next(epoch), next(epoch)
    assert len(multiprocessing.active_children()) == 1
    epoch.close()
    for process in multiprocessing.active_children():  # killed, and not waited for
        process.join(20)
    assert not multiprocessing.active_children()


# -- what keeps them from starting -----------------------------------------------------------------------------------

ARGV = ["--data.name", "user_data:squares", "--data.workers", "1", "--model.hidden", "[8]", "--train.device", "cpu"]


def test_a_long_path_of_tmpdir(zygote: Zygote, tmp_path: Path):
    long = tmp_path / ("x" * 100)
    long.mkdir()
    argv = [*ARGV, "--train.epochs", "1", "--run.dir", str(tmp_path / "run")]
    zygote.run(Run(argv, plant={0: ("temporary_folder", str(long))}))[0].check()


def test_no_folder_with_a_short_path(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tempfile, "tempdir", "/" + "x" * 100)
    monkeypatch.setattr(workers, "SHORT_FOLDERS", ("/none",))
    monkeypatch.setitem(multiprocessing.current_process()._config, "tempdir", None)
    with pytest.raises(ConfigError, match="^data.workers: TMPDIR is /xxx.*at most 70 bytes.* --data.workers 0$"):
        workers.context(None, 1)


@pytest.mark.parametrize("size", ["4k", "128k"])
def test_too_little_shared_memory(zygote: Zygote, tmp_path: Path, size: str):
    """For their semaphores, and for the samples that they hand over."""
    if os.geteuid() != 0:
        pytest.skip("a file system of one's own needs root")
    argv = [*ARGV, "--data.args.n", "4000", "--train.global_batch_size", "2000", "--run.dir", str(tmp_path / "run")]
    (ended,) = zygote.run(Run(argv, plant={0: ("small_shared_memory", size)}))
    assert ended.codes == [2], ended
    (line,) = [line for line in ended.err[0].splitlines() if line]
    assert line.startswith("dist_train: data.workers: got 1, which hand over samples in /dev/shm (0 MB free), expected")
    assert line.endswith("or write --data.workers 0")
