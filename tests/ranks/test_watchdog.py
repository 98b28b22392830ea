"""A rank that hangs, dies or computes nonsense: the log names it, its phase and where it stands, and all ranks end."""

import re
from pathlib import Path

import pytest
import torch

from dist_train.ranks.journal import END, Journal
from dist_train.ranks.watchdog import diagnosis

from checkpoint_runs import ARGV, DDP, FSDP2, SINGLE, Kind
from faults import NONSENSE
from zygote import Ended, Run, Zygote

TIMEOUT_S = 1.0
PHASES = ("data", "forward", "backward", "optimizer", "reduce", "evaluate", "checkpoint")


def hanging(kind: Kind, folder: Path, rank: int, phase: str, act: str) -> Run:
    """A run whose rank does something in the first evaluation or save, or in the fifth step."""
    step = 0 if phase in ("evaluate", "checkpoint") else 4
    timeout = ["--train.step_timeout_s", str(TIMEOUT_S)]
    return kind.run(folder, *timeout, plant={rank: ("at_phase", phase, step, act)})


def named(ended: Ended, rank: int, phase: str) -> bool:
    """Whether rank 0's or another's log has named the rank and its phase, with the line that it stands at."""
    log = "".join(ended.err)
    place = rf"(\[.*\] )?rank {rank} on \S+ \(process \d+\)"
    told = re.search(rf"\[watchdog\].*\n(.*\n)*?{place} is in phase {phase}\b", log)
    return bool(told) and "faults.py" in log


@pytest.mark.parametrize("act", ["sleep", "spin"])
def test_a_rank_that_hangs_is_named_in_every_phase(act: str, zygote: Zygote, tmp_path: Path):
    for kind, rank in ((DDP, 1), (FSDP2, 0)):
        some = PHASES if act == "sleep" and rank else ("forward",)
        runs = [hanging(kind, tmp_path / f"{kind.backend}-{phase}", rank, phase, act) for phase in some]
        for phase, ended in zip(some, zygote.run(*runs), strict=True):
            assert all(code not in (0, -9) for code in ended.codes), (phase, ended)
            assert named(ended, rank, phase), (phase, ended)
            assert f"has not ended within {TIMEOUT_S:g} s" in ended.err[0]
            waiting = re.findall(r"waiting: rank (\d)", ended.err[0])
            assert waiting == [str(1 - rank)], (phase, ended)


def test_a_process_alone_that_hangs_says_where(zygote: Zygote, tmp_path: Path):
    ended = zygote.run(hanging(SINGLE, tmp_path, 0, "data", "sleep"))[0]
    assert ended.codes == [1] and named(ended, 0, "data")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_ends_early_ends_all_in_seconds(rank: int, zygote: Zygote, tmp_path: Path):
    acts = ("exit 0", "kill", "raise")
    runs = [DDP.run(tmp_path / act, plant={rank: ("at_phase", "forward", 4, act)}, kill_all=False) for act in acts]
    for act, ended in zip(acts, zygote.run(*runs), strict=True):
        assert ended.codes[1 - rank] == 1 and ended.seconds < 15, (act, ended)
        other = ended.err[1 - rank]
        assert f"rank {rank}" in other and "is gone" in other or "lost another rank" in other, (act, ended)
        if act == "raise":
            assert f"[rank {rank}] RuntimeError: planted" in ended.err[rank]


def test_a_stranger_at_the_port_is_not_heard(zygote: Zygote, tmp_path: Path):
    ended = zygote.run(DDP.run(tmp_path, plant={0: ("patient_steps", 0.05), 1: ("stranger",)}))[0].check()
    assert not any(ended.err)


def test_nothing_that_strangers_send_changes_anything(zygote: Zygote, tmp_path: Path):
    """A stranger who were taken for a rank would, as it leaves, be a rank that is lost."""
    words = list(NONSENSE.values())
    plants = [
        {0: ("patient_steps", 0.05), 1: ("at_the_port", words, False)},
        {0: ("patient_steps", 0.05), 1: ("at_the_port", words, True)},
        {0: ("patient_steps", 0.05), 1: ("at_the_port", [b"x"], False, 150)},
    ]
    for ended in zygote.run(*(DDP.run(tmp_path / str(i), plant=plant) for i, plant in enumerate(plants))):
        assert "[watchdog]" not in "".join(ended.check().err), ended


def test_a_watchdog_that_fails_is_begun_again_or_said_to_be_gone(zygote: Zygote, tmp_path: Path):
    slow = ("patient_steps", 0.05)
    runs = [DDP.run(tmp_path / str(n), plant={0: ("watchdog_fails", n), 1: slow}) for n in (1, 3)]
    once, thrice = zygote.run(*runs)
    assert "[rank 0] [watchdog] failed, ZeroDivisionError: planted; it goes on" in once.check().err[0]
    assert thrice.check().err[0].count("it goes on") == 2 and "nobody watches this rank any more" in thrice.err[0]


def test_time_for_which_all_were_suspended_does_not_count(zygote: Zygote, tmp_path: Path):
    runs = []
    for kind in (SINGLE, DDP):
        plant = dict.fromkeys(range(kind.ranks), ("suspend", 4.0))
        runs.append(kind.run(tmp_path / kind.backend, "--train.step_timeout_s", "2.5", plant=plant))
    for ended in zygote.run(*runs):
        assert ended.check().seconds > 4 and "[watchdog]" not in "".join(ended.err), ended


# -- layers that differ by rank ----------------------------------------------------------------------------------------

DEEP = ["--model.hidden", "[9, 9, 9]", "--model.dropout", "0"]


@pytest.mark.parametrize("layers", [([3], [5]), ([], [3, 4]), ([3], [])], ids=["as many", "fewer", "fewer on rank 0"])
def test_layers_that_differ_by_rank_are_named(layers: tuple[list[int], ...], zygote: Zygote, tmp_path: Path):
    plant = {rank: ("leave_out", left) for rank, left in enumerate(layers)}
    ended = zygote.run(FSDP2.run(tmp_path, *DEEP, plant=plant))[0]
    assert set(ended.codes) == {2} and ended.seconds < 30, ended
    said = "".join(ended.err)
    assert re.search(
        r"^dist_train: step 2: rank 0 ran layers\.\S+ where rank 1 ran layers\.\S+; expected", said, re.M
    ), ended
    assert "Traceback" not in said


def test_a_rank_that_is_slow_in_a_layer_is_no_other_way(zygote: Zygote, tmp_path: Path):
    ended = zygote.run(FSDP2.run(tmp_path, *DEEP, plant={0: ("look_soon",), 1: ("slow_layer", 2.0)}))[0].check()
    assert not any(ended.err), ended


def test_a_journal_compares_what_both_have_entered():
    journal = Journal(torch.nn.Linear(1, 1), [], "fsdp2")
    behind = {0: [(4, ("a", "b", END))], 1: [(4, ("a",))], 2: [(5, ("c",))]}
    assert journal.difference(behind) is None
    line = journal.difference({0: [(4, ("a", "b"))], 1: [(4, ("a", "c"))], 2: [(4, ("a", "b"))]})
    assert line and line.startswith("step 4: ranks 0, 2 ran b where rank 1 ran c; expected every rank")
    ended = journal.difference({0: [(4, ("a", END))], 1: [(4, ("a", "b"))]})
    assert ended and "rank 0 ran nothing more where rank 1 ran b" in ended


def test_a_diagnosis_names_who_is_silent_and_who_is_behind():
    def status(rank: int, phase: str, waits: bool, step: int = 7, **more) -> dict:
        return {"rank": rank, "host": "a", "pid": 10 + rank, "phase": phase, "step": step, "for_s": 2.0} | (
            {"stack": f"  stack of {rank}\n", "waits": waits} if waits is not None else {}
        )

    silent = diagnosis([status(0, "backward", True), status(1, "data", None)], 5)
    assert (
        "step 7 has not ended within 5 s\nrank 1 on a (process 11) does not answer; last heard of in phase data"
        in silent
    )
    behind = diagnosis([status(0, "backward", True), status(1, "forward", True), status(2, "backward", True)], 5)
    assert "rank 1 on a (process 11) is in phase forward of step 7 for 2.0 s:\n      stack of 1" in behind
    assert "waiting: rank 0 on a (process 10) in phase backward" in behind and "stack of 0" not in behind
    busy = diagnosis([status(0, "backward", True), status(1, "backward", False)], 5)
    assert "rank 1 on a (process 11) is in phase backward" in busy and "stack of 0" not in busy


# -- what is not finite ------------------------------------------------------------------------------------------------

SGD = ["--optim.name", "SGD", "--optim.lr", "0.01", "--model.dropout", "0"]


@pytest.mark.parametrize("kind", [SINGLE, DDP, FSDP2], ids=lambda kind: kind.backend)
def test_a_loss_that_is_not_finite_ends_the_run_with_step_and_samples(kind: Kind, zygote: Zygote, tmp_path: Path):
    run = kind.run(tmp_path, *SGD, plant={rank: ("bad_samples", [17]) for rank in range(kind.ranks)})
    ended = zygote.run(run)[0]
    assert set(ended.codes) == {1}
    (said,) = [line for err in ended.err for line in err.splitlines() if "NonFiniteError: the loss of step" in line]
    step, rank, samples = re.search(r"step (\d+) is not finite on rank (\d), .* samples \[(.*?)\]", said).groups()
    assert "17" in samples.split(", ") and len(samples.split(", ")) <= 8 // kind.ranks
    assert kind.ranks == 1 or said.startswith(f"[rank {rank}]")
    assert 1 <= int(step) <= 6


def test_steps_that_are_not_finite_are_skipped_alike(zygote: Zygote, tmp_path: Path):
    losses = []
    for kind in (SINGLE, DDP, FSDP2):
        folder = tmp_path / kind.backend
        plant = {rank: ("bad_samples", [17]) for rank in range(kind.ranks)}
        exact = ["--train.precision", "float64"]
        zygote.run(kind.run(folder, *SGD, *exact, "--train.nonfinite", "skip", plant=plant))[0].check()
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        losses.append([float(x) for x in re.findall(r'"eval/loss": ([^,}]*)', "\n".join(lines))])
        skipped = re.findall(r'"train/skipped_steps": (\d+)', "\n".join(lines))
        assert skipped[-1] == "2", lines  # once an epoch
    assert losses[1] == pytest.approx(losses[0], rel=1e-9) and losses[2] == pytest.approx(losses[0], rel=1e-9)


def test_a_gradient_alone_that_is_not_finite_ends_the_run(zygote: Zygote, tmp_path: Path):
    """A learning rate at which weights overflow in the end."""
    argv = [*ARGV, "--optim.name", "SGD", "--optim.lr", "1e30", "--backend.name", "single", "--run.dir", str(tmp_path)]
    ended = zygote.run(Run(argv))[0]
    assert ended.codes == [1] and "NonFiniteError: the" in ended.err[0]
