"""What a checkpoint says of itself, in `manifest.json`: read and checked without torch.

RUN/checkpoints/step-00000100/     absent, or whole: it gets this name by one rename
    manifest.json                  this file: what was saved, with size and SHA-256 of every other file
    .metadata  __0_0.distcp  ...   the tensors, as torch.distributed.checkpoint stores them
"""

import dataclasses
import hashlib
import json
import math
import os
import re
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_train.errors import ConfigError

SCHEMA = 1
NAME = "manifest.json"
METADATA = ".metadata"
FOLDER = "checkpoints"
_STEP = re.compile(r"step-\d{8,}(\.\d+)?")
_BLOCK = 1 << 20
_LARGEST = 2**63 - 1
# Of the progress, which is the meter's, what must be there: counts, and seconds.
_COUNTS = ("steps", "samples", "logged_steps", "interval_samples")
_SECONDS = ("time_s", "train_s", "interval_s")
_METRICS = "eval/"  # what the names of metrics begin with


class Damaged(ConfigError):
    """A checkpoint that cannot be used, and what is wrong with it.

    Args:
        folder: of the checkpoint.
        problem: what is wrong.
    """

    def __init__(self, folder: Path, problem: str):
        super().__init__(f"{folder}: {problem}")
        self.folder, self.problem = folder, problem

    def __reduce__(self) -> tuple:  # it travels between ranks
        return Damaged, (self.folder, self.problem)


@dataclass(frozen=True)
class File:
    """A file as it was written: bytes, and their SHA-256 in hexadecimal."""

    size: int
    sha256: str


@dataclass(frozen=True)
class DataFacts:
    """The data set: samples of its splits, and a hash over its content."""

    train: int
    test: int
    fingerprint: str


@dataclass(frozen=True)
class Tensor:
    """Shape and type of a tensor of the model."""

    shape: list[int]
    dtype: str


@dataclass(frozen=True)
class Scale:
    """The scale of a float16 loss; see precision.LossScale."""

    factor: float
    finite_steps: int


@dataclass(frozen=True)
class Manifest:
    """A checkpoint.

    Args:
        schema: version of this form.
        sequence: counts the checkpoints of a run folder. The newest has the largest, whatever the clock says.
        step: optimizer steps done.
        epoch: whole passes over the data.
        step_in_epoch: steps of the pass that is not over. With `seed` and `epoch` it decides what comes next.
        seed: train.seed.
        data: the data set.
        global_batch_size: samples of a step over all ranks.
        backend: who wrote it, with DeepSpeed's stage.
        world_size: on how many ranks.
        model: tensors of the model by name; buffers among them.
        progress: the meter's state.
        evaluation: metrics of the model as it is here; empty if it was not evaluated at this step.
        loss_scale: of float16.
        config: the run's whole config.
        versions: of Python and the libraries.
        saved_at: the time by rank 0's clock, for people.
        files: every other file in the folder.
        wandb_id: of the run at W&B.
        mesh: ranks of each dimension, where backend.mesh was given.
    """

    schema: int
    sequence: int
    step: int
    epoch: int
    step_in_epoch: int
    seed: int
    data: DataFacts
    global_batch_size: int
    backend: str
    world_size: int
    model: dict[str, Tensor]
    progress: dict[str, float]
    evaluation: dict[str, float]
    loss_scale: Scale | None
    config: dict[str, dict[str, Any]]
    versions: dict[str, str]
    saved_at: str
    files: dict[str, File]
    wandb_id: str | None = None
    mesh: dict[str, int] | None = None

    @property
    def writer(self) -> str:
        """Who wrote it, on how many ranks: for people."""
        ranks = f"{self.world_size} rank{'s' if self.world_size > 1 else ''}"
        several = [f"{name} {size}" for name, size in (self.mesh or {}).items() if size > 1]
        return f"{self.backend} on {ranks}" + (f" ({' x '.join(several)})" if several else "")

    def bytes(self) -> int:
        """Of all files but this one."""
        return sum(file.size for file in self.files.values())


def dumps(manifest: Manifest) -> str:
    """The text of manifest.json, with a hash over itself: a flipped bit may leave it valid JSON."""
    tree = dataclasses.asdict(manifest)
    return json.dumps(tree | {"sha256": _digest(tree)}, indent=1) + "\n"


def read(folder: Path) -> Manifest:
    """The manifest of a checkpoint. Raises Damaged, also where there is none."""
    path = folder / NAME
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        digest = tree.pop("sha256")
        expected = _digest(tree)
    except FileNotFoundError:
        raise Damaged(folder, f"{NAME} is missing") from None
    except OSError as error:
        raise Damaged(folder, f"{NAME} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Damaged(folder, f"{NAME} is not whole") from None
    if tree.get("schema") != SCHEMA:
        raise Damaged(folder, f"got schema {tree.get('schema')!r}, expected {SCHEMA}, the one that this version knows")
    if digest != expected:
        raise Damaged(folder, f"the content of {NAME} does not fit its hash")
    try:
        return _sensible(_fitting(tree, Manifest))
    except (TypeError, RecursionError) as error:
        raise Damaged(folder, f"{NAME} is not a manifest: {error}") from None


def _digest(tree: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _fitting(value: Any, hint: Any) -> Any:
    """The value as the type that the hint says. Raises TypeError."""
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        needed = {f.name for f in dataclasses.fields(hint) if f.default is dataclasses.MISSING}
        if not isinstance(value, dict) or not needed <= value.keys() <= hints.keys():
            raise TypeError(f"got other keys than {', '.join(hints)}")
        return hint(**{name: _fitting(item, hints[name]) for name, item in value.items()})
    if type(value) is int and abs(value) > _LARGEST:
        raise TypeError("got a number of more than 64 bits")
    kind, args = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind is types.UnionType:
        return None if value is None else _fitting(value, args[0])
    if kind is float and type(value) is int:
        return value  # a count stays one
    if type(value) is not kind:
        raise TypeError(f"got {str(value)[:40]!r}, expected {kind.__name__}")
    if kind is dict:
        return {name: _fitting(item, args[1]) for name, item in value.items()}
    return [_fitting(item, args[0]) for item in value] if kind is list else value


def _sensible(m: Manifest) -> Manifest:
    """The manifest, if a run could have written it: what goes on from it relies on that. Raises TypeError."""
    progress = m.progress
    for name, there, keys in (
        ("progress", progress, (*_COUNTS, *_SECONDS, "interval_loss", *m.evaluation)),
        ("config", m.config, ("data", "model", "optim", "train")),
        ("config.optim", m.config.get("optim", {}), ("name",)),
        ("config.train", m.config.get("train", {}), ("drop_last",)),
        ("files", m.files, (METADATA,)),
    ):
        for key in keys:
            if key not in there:
                raise TypeError(f"got {name} without {key}")
    positive = {"sequence": m.sequence, "step": m.step, "world_size": m.world_size, "data.train": m.data.train}
    positive |= {"global_batch_size": m.global_batch_size}
    positive |= {f"mesh.{name}": size for name, size in (m.mesh or {}).items()}
    others = {"epoch": m.epoch, "step_in_epoch": m.step_in_epoch, "data.test": m.data.test}
    others |= {f"progress.{key}": progress[key] for key in (*_COUNTS, *_SECONDS)}
    others |= {f"the size of {name}": file.size for name, file in m.files.items()}
    others |= {f"the shape of {name}": min(tensor.shape, default=0) for name, tensor in m.model.items()}
    if m.loss_scale:
        positive["loss_scale.factor"] = m.loss_scale.factor
        others["loss_scale.finite_steps"] = m.loss_scale.finite_steps
    for name, value in (positive | others).items():
        if not math.isfinite(value) or value < 0 or (name in positive and value == 0):
            raise TypeError(f"got {value} for {name}, expected more")
    if any(type(progress[key]) is not int for key in _COUNTS) or progress["steps"] != m.step:
        raise TypeError(f"got progress of {progress['steps']} steps, expected {m.step}")
    if progress["logged_steps"] > m.step:
        raise TypeError(f"got progress.logged_steps {progress['logged_steps']}, expected at most {m.step}")
    for name in m.evaluation:
        if not name.startswith(_METRICS):
            raise TypeError(f"got the metric {name!r}, expected a name that begins with {_METRICS}")
    for name in (m.backend, *m.files):
        if not name.isprintable() or Path(name).name != name or name in ("", "..", NAME):
            raise TypeError(f"got the name {name!r}, expected a plain one")
    return m


def verify(folder: Path, manifest: Manifest, names: Iterable[str]) -> None:
    """Compares files of a checkpoint with its manifest: there, of the right size, of the right hash. Raises Damaged."""
    for name in names:
        verify_file(folder, name, manifest.files[name])


def verify_file(folder: Path, name: str, expected: File) -> None:
    """Compares a file with what was written. Raises Damaged."""
    try:
        with (folder / name).open("rb") as file:
            got = file.seek(0, 2)
            if got != expected.size:
                raise Damaged(folder, f"got {got} bytes in {name}, expected {expected.size}")
            file.seek(0)
            digest = hashlib.sha256()
            while block := file.read(_BLOCK):
                digest.update(block)
    except FileNotFoundError:
        raise Damaged(folder, f"{name} is missing") from None
    except OSError as error:
        raise Damaged(folder, f"{name} cannot be read: {error.strerror}") from None
    if digest.hexdigest() != expected.sha256:
        raise Damaged(folder, f"the content of {name} does not fit its hash")


def folders(run: Path) -> list[Path]:
    """The checkpoints of a run folder, damaged ones among them, in no order that means anything."""
    try:
        return sorted(path for path in (run / FOLDER).iterdir() if _STEP.fullmatch(path.name))
    except (FileNotFoundError, NotADirectoryError, ValueError):  # no file has a NUL in its name
        return []
    except OSError as error:  # to go on as if there were none would start anew
        raise ConfigError(
            f"checkpoint.resume: got {run / FOLDER}, which cannot be listed ({error.strerror}), expected a folder that "
            f"can be read"
        ) from None


def listed(place: Path) -> tuple[list[tuple[Path, Manifest]], list[Damaged]]:
    """The checkpoints of a run folder, or the one that `place` is: newest first, and what is wrong with the others."""
    found, damaged = [], []
    one = os.path.exists(place / NAME) or (_STEP.fullmatch(place.name) and place.absolute().parent.name == FOLDER)
    for folder in [place] if one else folders(place):
        try:
            found.append((folder, read(folder)))
        except Damaged as error:
            damaged.append(error)
    return sorted(found, key=lambda pair: pair[1].sequence, reverse=True), damaged


@dataclass(frozen=True)
class Best:
    """What decides which checkpoint is the best.

    Args:
        metric: such as eval/accuracy.
        lowest: the least is the best; else the largest.
    """

    metric: str
    lowest: bool

    def of(self, found: list[tuple[Path, Manifest]]) -> tuple[Path, Manifest] | None:
        """The best checkpoint, the newest of equals; None if none was evaluated."""
        rated = [pair for pair in found if self.metric in pair[1].evaluation]
        sign = -1 if self.lowest else 1
        return max(rated, key=lambda pair: sign * pair[1].evaluation[self.metric]) if rated else None
