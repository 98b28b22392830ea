"""A signal to one rank, to all, twice, or during a save: all ranks save after one agreed step, end with code 75, and go
on to the very bits of a run that was not stopped."""

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from dist_train.ranks import orphan
from dist_train.ranks.stop import Requests

from checkpoint_runs import ARGV, DDP, FSDP2, SINGLE, Kind, same, steps, weights
from zygote import Zygote

STOPS = {
    "SIGTERM to rank 0": (DDP, {0: ("eager", "forward", 4, "SIGTERM"), 1: ("eager",)}),
    "SIGUSR1 to rank 1": (FSDP2, {0: ("eager",), 1: ("eager", "backward", 4, "SIGUSR1")}),
    "SIGINT to all": (DDP, dict.fromkeys((0, 1), ("eager", "data", 4, "SIGINT"))),
    "SIGTERM twice": (DDP, {0: ("eager", "forward", 4, "SIGTERM twice"), 1: ("eager",)}),
    "during a save": (DDP, {0: ("eager", "checkpoint", 2, "SIGTERM"), 1: ("eager",)}),
    "during a save in the background": (
        replace(DDP, asynchronous=True), {0: ("eager", "checkpoint", 2, "SIGTERM"), 1: ("eager",)},
    ),
    "one process": (SINGLE, {0: ("eager", "optimizer", 4, "SIGTERM")}),
}  # fmt: skip


@pytest.mark.parametrize("name", STOPS)
def test_a_stop_saves_and_the_run_goes_on(name: str, zygote: Zygote, references, tmp_path: Path):
    kind, plant = STOPS[name]
    ended = zygote.run(kind.run(tmp_path, plant=plant))[0]
    assert ended.codes == [75] * kind.ranks, ended
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == "preempted" and steps(tmp_path)[0] == summary["steps"] < 12, ended
    assert f"stopped by {summary['by']} after step {summary['steps']}, and saved" in ended.out[0]
    assert not any(ended.err)
    zygote.run(kind.run(tmp_path))[0].check()
    assert same(weights(tmp_path), references(kind).weights)
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "finished"


@pytest.mark.parametrize("kind", [SINGLE, DDP], ids=lambda kind: kind.backend)
def test_max_time_does_the_same_without_any_other_checkpoint(kind: Kind, zygote: Zygote, tmp_path: Path):
    argv = ["--checkpoint.every_steps", "null", "--train.epochs", "2000", "--train.max_time_s", "0.5"]
    run = kind.run(tmp_path, *argv, plant=dict.fromkeys(range(kind.ranks), ("patient_steps", 0.01)))
    ended = zygote.run(run)[0]
    assert ended.codes == [75] * kind.ranks, ended
    assert "stopped by train.max_time_s on rank" in ended.out[0] and len(steps(tmp_path)) == 1


def test_a_run_that_ends_before_the_stop_is_agreed_on_is_finished(zygote: Zygote, tmp_path: Path):
    assert ARGV[-1] == "1"  # a line of metrics a step
    ended = zygote.run(SINGLE.run(tmp_path, plant={0: ("at_phase", "evaluate", 11, "SIGTERM")}))[0]
    assert ended.codes == [0] and json.loads((tmp_path / "summary.json").read_text())["status"] == "finished"


# -- a launcher that is gone -------------------------------------------------------------------------------------------


@pytest.fixture
def launcher():
    """A process to be killed by, half a second after it was asked for."""
    with subprocess.Popen(["sleep", "100"]) as process:
        yield process
        process.kill()


def test_ranks_whose_launcher_is_killed_save_and_stop(launcher, zygote: Zygote, tmp_path: Path):
    threading.Timer(2.0, launcher.kill).start()
    plant = dict.fromkeys((0, 1), ("launched_by", launcher.pid))
    ended = zygote.run(DDP.run(tmp_path, "--train.epochs", "2000", plant=plant))[0]
    assert ended.codes == [75, 75] and ended.seconds < 20, ended
    assert "stopped by the end of its launcher on rank" in ended.out[0] and steps(tmp_path)
    assert f"torchrun (process {launcher.pid}) is gone; saving, then stopping" in ended.err[0]


def test_a_rank_that_cannot_save_without_its_launcher_ends(launcher, zygote: Zygote, tmp_path: Path):
    threading.Timer(1.0, launcher.kill).start()
    plant = {0: ("deaf_without_launcher", launcher.pid)}
    ended = zygote.run(SINGLE.run(tmp_path, "--train.epochs", "2000", plant=plant))[0]
    assert ended.codes == [1] and "ended unsaved" in ended.err[0] and ended.seconds < 20, ended


ASKED = "import sys; from dist_train.ranks import orphan; print(orphan.started_by(sys.argv[1]))"


@pytest.mark.parametrize(
    ("parent", "name", "found"),
    [
        ("torchrun", "torchrun", "torchrun"),
        ("torchrun", "none", None),  # started by hand in its shell
        ("torchrun", "env", None),
        ("mpirun", "mpirun", "mpirun"),
        ("slurmstepd: [1.0]", "srun", "slurmstepd"),
        ("nohup", "torchrun", None),
    ],
)
def test_the_launcher_is_found_above_a_rank(parent: str, name: str, found: str | None):
    """Also behind a shell in between."""
    wrapped = f"bash -c \"'{sys.executable}' -c '{ASKED}' {name}; true\"; true"
    shell = subprocess.run([parent, "-c", wrapped], executable="bash", capture_output=True, text=True, check=True)
    assert (f"name='{found}'" in shell.stdout) if found else shell.stdout == "None\n", shell


def test_a_process_that_has_another_ones_number_is_not_the_launcher(launcher):
    state, _, at = orphan._stat(launcher.pid)
    assert not orphan.Started(launcher.pid, at, "torchrun").gone()
    assert orphan.Started(launcher.pid, at - 1, "torchrun").gone()
    launcher.kill()
    os.waitid(os.P_PID, launcher.pid, os.WEXITED | os.WNOWAIT)  # it is there still, as a zombie
    assert orphan.Started(launcher.pid, at, "torchrun").gone()


def test_two_interrupts_in_a_process_that_lives_on_are_an_exception():
    """As in a notebook, whose kernel stays."""
    requests = Requests(quits=False)
    before = signal.getsignal(signal.SIGINT)
    with requests.listening():
        signal.raise_signal(signal.SIGINT)
        assert requests.stopping == signal.SIGINT
        requests.interrupted_at -= 1.0
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
