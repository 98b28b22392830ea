"""Faults while saving and before resuming: nothing valid is lost, and the end is the same to the last bit."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from dist_train.checkpoint import manifest, places

from checkpoint_runs import (
    DDP,
    FSDP2,
    SAVE_12,
    SINGLE,
    Kind,
    Reference,
    checkpoint,
    copy,
    leftovers,
    refused,
    resumed_from,
    root,
    same,
    steps,
    weights,
)
from faults import Event, moments
from zygote import Zygote

AT_ONCE = 3


def boundaries(events: list[Event]) -> list[int]:
    """Numbers of the events before which a process is killed: all of the third save, which removes the first one, but
    of many writes to a file three; and in the first and the last save around the commit."""
    third, fourth = (
        next(i for i, e in enumerate(events) if (e.what, e.path) == ("mkdir", f".writing-step-{step:08d}"))
        for step in (9, 12)
    )
    found = {next(i for i, e in enumerate(events) if e.what == "open") + 1}
    for i in range(third, fourth + 1):
        of_many = events[i - 1].what == events[i].what == events[i + 1].what == "write"
        if not of_many or (i - third) % 9 == 8:
            found.add(i)
    for i, e in enumerate(events):
        if e.to in ("step-00000003", "step-00000012"):
            found |= {i, i + 1}
    return sorted(found)


KILLS = {
    "one-process": (SINGLE, 0, False),
    "one-process-asynchronous": (replace(SINGLE, asynchronous=True), 0, False),
    "rank-0-alone": (DDP, 0, False),
    "rank-1-alone": (FSDP2, 1, False),
    "all-ranks-asynchronous": (replace(DDP, asynchronous=True), 0, True),
}


# Every day all moments of one process, and every fourth of two ranks.
DAILY = [("one-process", 1), ("all-ranks-asynchronous", 4)]
IN_FULL = [pytest.param(name, 1, marks=pytest.mark.full) for name in KILLS if (name, 1) not in DAILY]


@pytest.mark.parametrize(("name", "every"), [*DAILY, *IN_FULL])
def test_a_kill_at_any_moment_of_a_save_loses_nothing(
    name: str, every: int, zygote: Zygote, references, tmp_path: Path
):
    kind, rank, kill_all = KILLS[name]
    undisturbed = references(kind)
    events = undisturbed.events[rank]
    todo, moment = boundaries(events)[::every], moments(events)
    while todo:
        some, todo = todo[:AT_ONCE], todo[AT_ONCE:]
        folders = [tmp_path / str(n) for n in some]
        cut = zygote.run(
            *(
                kind.run(folder, plant={rank: ("kill_at", root(folder), moment[n])}, kill_all=kill_all)
                for folder, n in zip(folders, some, strict=True)
            )
        )
        left = []
        for folder, n, ended in zip(folders, some, cut, strict=True):
            assert ended.codes[rank] == -9, (events[n], ended)
            assert all(code in (1, -9) for code in ended.codes), (events[n], ended)
            committed = [step for step in (3, 6, 9, 12) if before(events, f"step-{step:08d}", n, undisturbed)]
            left.append(steps(folder))
            assert set(left[-1]) >= set(committed[-2:]), (events[n], left)
        again = zygote.run(*(kind.run(folder) for folder in folders))
        for folder, n, ended, there in zip(folders, some, again, left, strict=True):
            assert ended.codes == [0] * kind.ranks, (events[n], ended)
            assert resumed_from(ended) == (there[0] if there else None), events[n]
            assert same(weights(folder), undisturbed.weights), events[n]
            assert not leftovers(folder), events[n]
            assert steps(folder)[:2] == [12, 9], events[n]


def before(events: list[Event], name: str, n: int, undisturbed: Reference) -> bool:
    """Whether rank 0 has given a checkpoint its name before event `n` of a rank."""
    commit = next(e for e in undisturbed.events[0] if e.what == "rename" and e.to == name)
    return commit.at < events[n].at


def test_a_checkpoint_gets_its_name_when_every_byte_is_on_the_disk(references):
    """By what was asked of the disk, in which order; a kill cannot show it, as the system keeps what it was given."""
    for kind in (SINGLE, DDP, replace(SINGLE, asynchronous=True)):
        events = sorted(e for rank in references(kind).events for e in rank)
        assert [e.to for e in events if e.to.startswith("step-")] == [f"step-{step:08d}" for step in (3, 6, 9, 12)]
        for commit in (e for e in events if e.to.startswith("step-")):
            earlier = [e for e in events if e.at < commit.at and e.path.startswith(commit.path)]
            later = [e for e in events if e.at > commit.at]
            written = {e.path for e in earlier if e.what == "open"}
            assert len(written) == 2 + kind.ranks
            for path in written:
                assert last(earlier, "fsync", path) > max(last(earlier, "open", path), last(earlier, "write", path))
            assert last(earlier, "fsync", commit.path) > last(earlier, "open", f"{commit.path}/manifest.json")
            assert last(earlier, "fsync", commit.path) > last(earlier, "rename", f"{commit.path}/.metadata.tmp")
            assert (later[0].what, later[0].path) == ("fsync", "."), "the name itself is not on the disk"


def last(events: list[Event], what: str, path: str) -> float:
    """When something was last done; -1 if it was not."""
    return max((e.at for e in events if (e.what, e.path) == (what, path)), default=-1)


def test_the_newest_is_the_last_saved_whatever_the_clock_says(zygote: Zygote, references, tmp_path: Path):
    folder = tmp_path / "run"
    zygote.run(SINGLE.run(folder, plant={0: ("clock_back", root(folder), SAVE_12)}))
    older, newer = (checkpoint(folder, step) for step in (6, 9))
    assert manifest.read(older).saved_at > manifest.read(newer).saved_at
    for path in (newer, *newer.iterdir()):
        os.utime(path, (1, 1))
    again = zygote.run(SINGLE.run(folder))[0].check()
    assert resumed_from(again) == 9 and same(weights(folder), references(SINGLE).weights)


def test_a_run_that_goes_on_from_an_older_checkpoint_goes_on_from_its_own(zygote: Zygote, cut, tmp_path: Path):
    """What it saves comes later than the old step 9, which another course had led to."""
    folder = copy(cut(SINGLE), tmp_path)
    kill = {0: ("kill_at", root(folder), SAVE_12)}
    zygote.run(SINGLE.run(folder, "--checkpoint.resume", str(checkpoint(folder, 6)), plant=kill))
    newest = manifest.listed(folder)[0][0]
    assert newest[0].name == "step-00000009.2" and newest[1].sequence == 4
    assert f"resumed from {newest[0]}" in zygote.run(SINGLE.run(folder))[0].check().out[0]


def test_damaged_checkpoints_of_another_run_stay(zygote: Zygote, cut, tmp_path: Path):
    other = copy(cut(SINGLE), tmp_path)
    (checkpoint(other, 9) / ".metadata").write_bytes(b"")
    ended = zygote.run(SINGLE.run(tmp_path / "new", "--checkpoint.resume", str(other)))[0].check()
    assert resumed_from(ended) == 6
    assert sorted(path.name for path in places.found_at(other).folders()) == ["step-00000006", "step-00000009"]


def test_a_run_is_not_resumed_beyond_its_end(zygote: Zygote, cut, tmp_path: Path):
    folder = copy(cut(SINGLE), tmp_path)
    for steps_more in (8, 9):  # at step 9 it was not evaluated
        (ended,) = zygote.run(SINGLE.run(folder, "--train.max_steps", str(steps_more)))
        assert f"train.max_steps: got {steps_more}, expected more than the 9 steps" in refused(ended)


def test_save_on_one_rank_alone_fails(zygote: Zygote, tmp_path: Path):
    for alone in (0, 1):
        (ended,) = zygote.run(DDP.run(tmp_path / str(alone), plant={1 - alone: ("skip_save",), alone: ("meet_soon",)}))
        assert ended.codes == [1, 1] and ended.seconds < 10, ended
        said = ended.err[alone]
        assert "RuntimeError: save() is called by every rank, or by none" in said and f"rank {alone} waited 1 s" in said
        assert any(said in ended.err[1 - alone] for said in ("lost another rank", "is gone", "Traceback"))
        assert leftovers(tmp_path / str(alone)) == [] if (tmp_path / str(alone) / "checkpoints").exists() else True


def test_an_error_in_the_background_ends_the_next_step(zygote: Zygote, tmp_path: Path):
    kind, folder = replace(SINGLE, asynchronous=True), tmp_path / "run"
    (ended,) = zygote.run(kind.run(folder, plant={0: ("fail_second_write",)}))
    assert ended.codes == [1], ended
    named = rf"SaveError: {folder}/checkpoints/.writing-\w+-step-00000006: cannot be written"
    assert re.search(named, ended.err[0])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert max(line["step"] for line in lines) == 7, "saved at step 6, so raised at the end of the next"
    assert steps(folder) == [3] and not leftovers(folder)


@pytest.mark.parametrize("kind", [SINGLE, DDP], ids=["one-process", "two-ranks"])
def test_one_write_at_a_time_while_training_goes_on(kind: Kind, zygote: Zygote, references, tmp_path: Path):
    """Each write waits for two further steps, and for the write before it."""
    kind = replace(kind, asynchronous=True)
    plant = dict.fromkeys(range(kind.ranks), ("write_during_steps", 2))
    zygote.run(kind.run(tmp_path, plant=plant))[0].check()
    assert steps(tmp_path) == [12, 9] and same(weights(tmp_path), references(kind).weights)
