"""Faults in the middle of saving and before resuming: nothing valid is lost, and the end is the same to the last bit."""

from dataclasses import replace
from pathlib import Path

import pytest

from checkpoint_runs import DDP, FSDP2, SINGLE, Kind, Reference, leftovers, reference, resumed_from, root, same, steps
from checkpoint_runs import weights
from faults import Event, moments
from zygote import Zygote

AT_ONCE = 3


@pytest.fixture(scope="session")
def references(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory):
    """Undisturbed runs, made once for each kind."""
    made: dict[Kind, Reference] = {}

    def get(kind: Kind) -> Reference:
        if kind not in made:
            made[kind] = reference(zygote, kind, tmp_path_factory.mktemp("reference"))
        return made[kind]

    return get


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


@pytest.mark.parametrize("name", KILLS)
def test_a_kill_at_any_moment_of_a_save_loses_nothing(name: str, zygote: Zygote, references, tmp_path: Path):
    kind, rank, kill_all = KILLS[name]
    undisturbed = references(kind)
    events = undisturbed.events[rank]
    todo, moment = boundaries(events), moments(events)
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
