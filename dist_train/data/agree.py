"""Whether every rank has made the same data set: compared once they have joined, before anything depends on it.

What is compared costs little to make: of data in memory the labels and a few rows, of data in files what `Samples`
says and a few samples.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dist_train.data.batch import leaves_of
from dist_train.data.feed import Feed
from dist_train.data.sets import Columns, Data, Samples, bytes_of
from dist_train.errors import ConfigError
from dist_train.ranks import dist
from dist_train.ranks.dist import World

ROWS = 32  # of data in memory
TRAIN_SAMPLES, TEST_SAMPLES = 3, 2  # of data in files, each of which is a file to read
VALUES = 64  # of a sample from files
# Processors of other kinds decode and resize with other rounding: of uint8 pixels, and as a share of a float sample's
# largest value.
PIXELS_APART, FLOATS_APART = 2, 1e-3


@dataclass(frozen=True)
class Sketch:
    """A split of one rank, as the others are told of it.

    Args:
        kind: how its samples are held.
        count: of its samples.
        whole: a hash over what is compared of all samples: labels, or Samples.identity.
        some: samples by number.
    """

    kind: str
    count: int
    whole: bytes
    some: dict[int, "Sample"]


@dataclass(frozen=True)
class Sample:
    """One sample.

    Args:
        exact: what must be the same: a hash over the pixels of data in memory; type, shape and class number.
        values: some of its values, which may be apart.
        apart: how far.
        error: why it cannot be read.
    """

    exact: Any
    values: tuple[float, ...] = ()
    apart: float = 0.0
    error: str | None = None

    def is_like(self, other: "Sample") -> bool:
        """Whether both are the same sample."""
        both = self.error is None and other.error is None and self.exact == other.exact
        return both and np.allclose(self.values, other.values, rtol=0, atol=other.apart, equal_nan=True)


@dataclass(frozen=True)
class Told:
    """What a rank tells the others of its data set."""

    shape: tuple[int, ...] | None
    classes: tuple[str, ...]
    stats: tuple[tuple[float, ...], tuple[float, ...]]
    splits: dict[str, Sketch]


def agree(data: Data, feeds: Mapping[str, Feed], world: World) -> None:
    """Raises the same ConfigError on every rank where they have made different data sets. Collective.

    Args:
        data: of this rank.
        feeds: of its splits, by the names of data.splits.
        world: this rank's place.
    """
    if world.size == 1:
        return
    counts = {name: TRAIN_SAMPLES if name == "train" else TEST_SAMPLES for name in feeds}
    splits = {name: sketch(feed, counts[name]) for name, feed in feeds.items()}
    stats = tuple(map(float, data.mean)), tuple(map(float, data.std))
    shape = None if data.input_shape is None else tuple(data.input_shape)
    line = difference(dist.gather(Told(shape, tuple(map(str, data.classes)), stats, splits)))
    if line is not None:
        raise ConfigError(line)


def difference(told: list[Told]) -> str | None:
    """What differs on which rank, in one line; None where nothing does. Of every rank what it tells."""
    for rank, other in enumerate(told):
        what = _has(other, told[0])
        if what is not None:
            return (
                f"data.name: rank {rank} has {what}; expected the same data set on every rank; seed what it draws, "
                f"such as a random split, sort what has no order, such as a set or a folder's files, and give all "
                f"nodes the same files"
            )
    return None


def _has(mine: Told, first: Told) -> str | None:
    """What a rank has in place of what rank 0 has."""
    if list(mine.splits) != list(first.splits):
        return f"the splits {', '.join(mine.splits)}, rank 0 {', '.join(first.splits)}"
    pairs = [(_spoken(name), mine.splits[name], first.splits[name]) for name in first.splits]
    for name, split, other in pairs:
        if split.kind != other.kind:
            return f"its {name} samples as {split.kind}, rank 0 as {other.kind}"
        if split.count != other.count:
            return f"{split.count:,} {name} samples, rank 0 {other.count:,}"
    if mine.shape != first.shape:
        return f"samples of shape {mine.shape}, rank 0 of {first.shape}"
    if len(mine.classes) != len(first.classes):
        return f"{len(mine.classes):,} classes, rank 0 {len(first.classes):,}"
    for number, (name, other) in enumerate(zip(mine.classes, first.classes, strict=True)):
        if name != other:
            return f"{name!r} as class {number}, rank 0 {other!r}"
    if mine.stats != first.stats:
        return f"mean and std {mine.stats}, rank 0 {first.stats}"
    for name, split, other in pairs:
        if split.whole != other.whole:
            what = "labels" if split.kind == "Columns" else f"files or labels (another {split.kind}.identity)"
            return f"other {name} {what} than rank 0, or the same in another order"
        for number in sorted(split.some.keys() & other.some.keys()):
            sample = split.some[number]
            if sample.error is not None:
                return f"a {name} sample {number} that cannot be read: {sample.error}"
            if other.some[number].error is None and not sample.is_like(other.some[number]):
                return f"another {name} sample {number} than rank 0"
    return None


def sketch(feed: Feed, count: int) -> Sketch:
    """A split, as the other ranks are told of it.

    Args:
        feed: of the split.
        count: of the samples that are read, if they are in files.
    """
    split = feed.split
    if isinstance(split, Columns):
        leaves = split.leaves
        rows = {i: Sample([_digest(leaf[i]) for leaf in leaves]) for i in _spread(len(split), ROWS)}
        labels = [leaf for leaf in leaves if leaf.dim() == 1]  # of the others, the rows must do
        return Sketch("Columns", len(split), b"".join(map(_digest, labels)), rows)
    # One whose samples cannot be had again is warned of, and differs on every rank.
    numbers = [] if isinstance(split, Samples) and not feed.reader.repeats else _spread(len(split), count)
    identity = hashlib.sha256(split.identity.encode()).digest()
    return Sketch(type(split).__name__, len(split), identity, {i: _sample(feed, i) for i in numbers})


def _spoken(name: str) -> str:
    return "training" if name == "train" else name


def _sample(feed: Feed, number: int) -> Sample:
    try:
        leaves = leaves_of(feed.read(np.array([number])))
    except ConfigError as error:
        return Sample(None, error=str(error))
    exact: list[Any] = []
    near: list[float] = []
    apart = 0.0
    for leaf in leaves:
        if not isinstance(leaf, torch.Tensor):
            exact.append(repr(leaf))
            continue
        exact.append((str(leaf.dtype), tuple(leaf.shape)))
        few = leaf.flatten()[_spread(leaf.numel(), VALUES)] if leaf.numel() else leaf.flatten()
        if leaf.dtype == torch.uint8:
            near, apart = near + few.tolist(), max(apart, PIXELS_APART)
        elif leaf.is_floating_point():
            near, apart = near + few.tolist(), max(apart, FLOATS_APART * float(few.double().abs().nan_to_num().max()))
        else:
            exact.append(few.tolist())
    return Sample(exact, tuple(near), apart)


def _digest(tensor: torch.Tensor) -> bytes:
    return hashlib.sha256(bytes_of(tensor)).digest()


def _spread(n: int, count: int) -> list[int]:
    """At most so many numbers of 0 to n - 1, as far apart as they go."""
    return sorted({i * (n - 1) // max(1, count - 1) for i in range(count)})
