"""Small runs with checkpoints, cut off and looked at: for the tests of faults."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from dist_train.checkpoint import manifest, places

from faults import Event, traced
from zygote import Ended, Run, Zygote

# 12 steps, saved after each third of them.
ARGV = (
    *("--data.name", "synthetic", "--data.args", "{n: 46, n_test: 9, shape: [1, 4, 4], classes: 4}"),
    *("--model.hidden", "[9]", "--model.dropout", "0.2", "--train.global_batch_size", "8", "--train.epochs", "2"),
    *("--train.device", "cpu", "--checkpoint.every_steps", "3", "--track.every_steps", "1"),
)


@dataclass(frozen=True)
class Kind:
    """A backend, on how many ranks, and how it saves."""

    backend: str
    ranks: int
    asynchronous: bool = False

    def run(self, folder: Path, *more: str, **keys) -> Run:
        """A run in a folder."""
        asynchronous = ["--checkpoint.asynchronous", "true"] if self.asynchronous else []
        name = ["--backend.name", self.backend]
        return Run([*ARGV, *name, *asynchronous, "--run.dir", str(folder), *more], self.ranks, **keys)


SAVE_9, SAVE_12 = (("mkdir", f".writing-step-{step:08d}", "", 0) for step in (9, 12))
SINGLE, DDP, FSDP2 = Kind("single", 1), Kind("ddp", 2), Kind("fsdp2", 2)


@dataclass(frozen=True)
class Reference:
    """A run that nothing disturbed: its final weights, and by rank what it did to its files."""

    weights: dict[str, torch.Tensor]
    events: list[list[Event]]


def reference(zygote: Zygote, kind: Kind, place: Path) -> Reference:
    """A run of a kind that nothing disturbs."""
    folder, traces = place / "run", [place / f"trace{rank}" for rank in range(kind.ranks)]
    plant = {rank: ("trace", root(folder), str(path)) for rank, path in enumerate(traces)}
    zygote.run(kind.run(folder, plant=plant))[0].check()
    return Reference(weights(folder), [traced(path) for path in traces])


def cut_off(zygote: Zygote, kind: Kind, folder: Path) -> Path:
    """The folder of a run that was killed when the checkpoints of steps 6 and 9 stood."""
    zygote.run(kind.run(folder, plant={0: ("kill_at", root(folder), SAVE_12)}, kill_all=True))
    assert steps(folder) == [9, 6]
    return folder


def root(folder: Path) -> str:
    """Where a run's checkpoints are."""
    return str(folder / manifest.FOLDER)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The final weights."""
    return torch.load(folder / "weights.pt", weights_only=True)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether they are equal to the last bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def steps(folder: Path) -> list[int]:
    """Steps of the whole checkpoints of a run folder, the newest first. Fails where one is not whole."""
    found, damaged = manifest.listed(folder)
    assert not damaged
    for path, what in found:
        manifest.verify(path, what, what.files)
        assert set(what.files) | {manifest.NAME} == {file.name for file in path.iterdir()}
    return [what.step for _, what in found]


def leftovers(folder: Path) -> list[str]:
    """What is in the folder of checkpoints beside whole ones."""
    there = (folder / manifest.FOLDER).iterdir()
    return [path.name for path in there if path not in places.found_at(folder).folders()]


def checkpoint(folder: Path, step: int) -> Path:
    """A checkpoint of a run."""
    return folder / manifest.FOLDER / f"step-{step:08d}"


def resumed_from(ended: Ended) -> int | None:
    """The step that a run went on from."""
    line = next((line for line in ended.out[0].splitlines() if "resumed from" in line), None)
    return int(line.split(": step ")[1].split(",")[0]) if line else None


def copy(cut: Path, place: Path) -> Path:
    """A copy of a run folder to do harm to."""
    return Path(shutil.copytree(cut, place / "run"))


def refused(ended: Ended) -> str:
    """What the ranks said that refused to run: one of them, in lines of its own, and none with a traceback."""
    assert set(ended.codes) == {2}, ended
    said = set(filter(None, ended.err))
    assert len(said) == 1, ended  # the launcher ends the others before they say it too
    (text,) = said
    assert text.endswith("\n") and all(line.startswith("dist_train: ") for line in text.splitlines()), ended
    return text
