"""Samples of a split from files, by number: read, checked and put together in this process or in a worker."""

import warnings
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, is_dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate

from dist_train.config.own_code import frames
from dist_train.data.batch import branches_of, flatten, is_branch, leaves_of, mapped
from dist_train.data.generators import Seeder, held, seeder
from dist_train.data.randomness import kept_apart, seed_for
from dist_train.data.sets import Data, Samples, kinds_of
from dist_train.data.workers import no_room
from dist_train.errors import ConfigError

SUM_TOLERANCE = 1e-2  # of probabilities, which may be float16
SHOWN = 80  # characters of a value in a message


class Read:
    """A batch as it goes from a worker to the feed.

    The loader does not look into it: it would make lists of tuples, and would not pin what dataclasses hold.
    """

    __slots__ = ("tree",)

    def __init__(self, tree: Any):
        self.tree = tree

    def pin_memory(self) -> "Read":
        """The same in pinned memory, from which a device copies while the host goes on; the loader asks for it."""
        return Read(mapped(self.tree, lambda leaf: leaf.pin_memory() if isinstance(leaf, torch.Tensor) else leaf))


@dataclass(frozen=True)
class Pair:
    """What the first item shows of all, where items are pairs of a tensor and a class.

    Args:
        shape: of the tensor.
        dtype: of the tensor.
        vectors: targets are vectors [classes], and no class numbers.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    vectors: bool


@dataclass(frozen=True)
class Reader(Dataset[Any]):
    """An item is a whole batch, collated in the worker; or a message if a sample is bad."""

    dataset: Dataset[Any]
    collate: Callable[[list[Any]], Any] | None
    draws: bool
    own: bool  # the data set draws from generators that it keeps itself
    seed: int
    epoch: int
    input_shape: tuple[int, ...] | None
    classes: int
    loss: str | None
    pair: Pair | None = None
    repeats: bool = True  # a sample that is read again is the same

    @classmethod
    def of(cls, split: Samples, data: Data, seed: int, loss: str | None) -> tuple["Reader", Any]:
        """Reads the first sample: what it is, all are. Raises ConfigError.

        Returns:
            The reader, and the batch with that sample alone.
        """
        own = held(split.dataset) if split.draws else []
        shape = None if data.input_shape is None else tuple(data.input_shape)
        reader = cls(
            split.dataset, split.collate, split.draws, bool(own), seed, 0, shape, len(data.classes), loss
        )  # fmt: skip
        reader = replace(reader, pair=reader._pair())
        first = np.zeros(1, np.int64)
        tree = reader.read(first)
        fixed = [type(generator).__name__ for generator in own if seeder(generator) is None]
        again = zip(leaves_of(tree), leaves_of(reader.read(first)), strict=True)
        if fixed or not all(_same(a, b) for a, b in again):
            warnings.warn(_not_seeded(split, fixed), stacklevel=3)
            return replace(reader, repeats=False), tree
        return reader, tree

    def read(self, samples: np.ndarray) -> Any:
        """The batch with these samples, one at least. Raises ConfigError where one is bad."""
        batch = self[samples]
        if isinstance(batch, str):
            raise ConfigError(batch)
        return batch.tree

    @cached_property
    def seeders(self) -> list[Seeder]:
        """Of the data set's own generators, in this process: a worker has copies of them."""
        return [found for found in map(seeder, held(self.dataset)) if found] if self.own else []

    def __getitem__(self, batch: np.ndarray) -> Read | str:
        try:
            with kept_apart() if self.draws else nullcontext():
                return Read(self._collated(batch.tolist(), self._samples(batch.tolist())))
        except ConfigError as error:  # a string, because an exception would come with the worker's traceback
            return str(error)

    def _collated(self, batch: list[int], samples: list[Any]) -> Any:
        many = f"samples {batch[0]} to {batch[-1]}" if len(batch) > 1 else f"sample {batch[0]}"
        if self.collate is not None:
            try:
                return mapped(self.collate(samples), _tensor)
            except Exception as error:
                if isinstance(error, ConfigError) or no_room(error):
                    raise
                raise ConfigError(f"data.name: {many}: {raised(error, 'they are put together')}") from error
        try:
            return _stacked(samples)
        except (TypeError, RuntimeError, KeyError, ValueError) as error:
            if no_room(error):
                raise
            raise ConfigError(
                f"data.name: {many}: got items ({_described(samples[0])}) that cannot be stacked: "
                f"{str(error).splitlines()[0]}; expected tensors or numbers of one shape in all, or a function that "
                f"puts items together: Samples(dataset, collate=...)"
            ) from error

    def _samples(self, batch: list[int]) -> list[Any]:
        item = self._seeded if self.draws else self.dataset.__getitem__
        samples: list[Any] = []
        try:
            for index in batch:
                samples.append(item(index))
        except Exception as error:
            if isinstance(error, ConfigError) or no_room(error):
                raise
            number = batch[len(samples)]
            raise ConfigError(f"data.name: sample {number}: {raised(error, 'it is read')}") from error
        if self.pair is None:
            return samples
        if not self.pair.vectors:  # what most are, in a rush
            shape, kind, classes = self.pair.shape, self.pair.dtype, self.classes
            with suppress(TypeError, ValueError):  # one is no pair
                if all(
                    type(image) is torch.Tensor and image.dtype is kind and image.shape == shape
                    and type(target) is int and 0 <= target < classes
                    for image, target in samples
                ):  # fmt: skip
                    return samples
        return [self._checked(index, sample, self.pair) for index, sample in zip(batch, samples, strict=True)]

    def _seeded(self, index: int) -> Any:
        seed_for(self.seed, self.epoch, index, self.seeders)
        return self.dataset[index]

    def _pair(self) -> Pair | None:
        """What pairs of a tensor and a class are, by the first sample; None where items are anything else."""
        if not self.classes or self.collate is not None:
            return None
        with kept_apart() if self.draws else nullcontext():
            (first,) = self._samples([0])
        if not isinstance(first, (tuple, list)) or len(first) != 2 or _as_tensor(first[1]).dim() > 1:
            return None
        if is_branch(first[0]):  # several inputs
            return None
        image, target = first
        shape = tuple(image.shape) if isinstance(image, torch.Tensor) else ()
        found = Pair(
            shape if self.input_shape is None else self.input_shape,
            image.dtype if isinstance(image, torch.Tensor) else torch.float32,
            _as_tensor(target).dim() == 1,
        )
        self._checked(0, first, found)
        return found

    def _checked(self, index: int, sample: Any, pair: Pair) -> tuple[torch.Tensor, torch.Tensor | int]:
        if not isinstance(sample, (tuple, list)) or len(sample) != 2:
            raise ConfigError(f"data.name: sample {index}: got {_described(sample)}, expected a pair (tensor, target)")
        image, target = sample
        fits = isinstance(image, torch.Tensor) and image.shape == pair.shape
        if not fits or image.dtype != pair.dtype:
            got = f"{image.dtype} {list(image.shape)}" if isinstance(image, torch.Tensor) else type(image).__name__
            raise ConfigError(
                f"data.name: sample {index}: got {got}, expected a tensor {pair.dtype} {list(pair.shape)}"
            )
        return image, self._target(index, target, pair)

    def _target(self, index: int, target: Any, pair: Pair) -> torch.Tensor | int:
        """A number, or a float vector [classes], as that of the first sample."""
        out = _as_tensor(target)
        number = out.dim() == 0 and not out.is_floating_point() and 0 <= int(out) < self.classes
        vector = out.dim() == 1 and out.is_floating_point() and len(out) == self.classes
        if not (vector if pair.vectors else number):
            raise ConfigError(
                f"data.name: sample {index}: got target {_shown(target)}, expected a class number from 0 to "
                f"{self.classes - 1} in all samples, or a vector of {self.classes} floats in all"
            )
        if vector and self.loss == "nll":
            raise ConfigError(
                f"task.loss: got nll, but the target of sample {index} is a vector, expected class numbers; "
                f"cross_entropy takes vectors of probabilities"
            )
        if vector and self.loss == "cross_entropy" and not (out.min() >= 0 and abs(out.sum() - 1) <= SUM_TOLERANCE):
            low, high, total = float(out.min()), float(out.max()), float(out.sum())
            raise ConfigError(
                f"data.name: sample {index}: got target {_shown(target)}, from {low:g} to {high:g} with the sum "
                f"{total:g}, expected the probabilities of {self.classes} classes, which add up to 1, for task.loss "
                f"cross_entropy; for any other vector write --task.loss mse --data.one_hot true, or --task.name "
                f"multi_label where several classes may be true"
            )
        return int(out) if number else out


def _stacked(samples: list[Any]) -> Any:
    """As torch's default_collate does, which knows no dataclasses. Raises what that raises."""
    if not any(is_dataclass(branch) for branch in branches_of(samples[0])):
        return default_collate(samples)
    rebuild = flatten(samples[0])[1]
    columns = zip(*(flatten(sample)[0] for sample in samples), strict=True)
    return rebuild([default_collate(list(column)) for column in columns])


def _tensor(leaf: Any) -> Any:
    return torch.as_tensor(leaf) if isinstance(leaf, (np.ndarray, np.number, np.bool_)) else leaf


def raised(error: Exception, when: str) -> str:
    """What the user's code raises, with the line of it where that was."""
    own = frames(error)
    where = f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""
    said = " ".join(f"{type(error).__name__}: {error}".split())
    whose = "your own code" if own else "the data set"
    return f"{whose} raises an error when {when}: {said}{where}; mend it there"


def _as_tensor(target: Any) -> torch.Tensor:
    try:
        return torch.as_tensor(target)
    except (TypeError, ValueError, RuntimeError):
        return torch.empty(0)  # neither a class number nor a vector


def _same(a: Any, b: Any) -> bool:
    """To the last bit, also where a value is not a number."""
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return type(a) is type(b) and a == b
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bytes(a), _bytes(b))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def _not_seeded(split: Samples, fixed: list[str]) -> str:
    name = kinds_of(split.dataset)[-1].__name__
    if not split.draws:
        return (
            f"data.name: sample 0 of {name} differs when it is read again, but draws=False says that nothing in it is "
            f"random; leave that out, or what is drawn depends on the number of workers"
        )
    what = f"draws from {' and '.join(fixed)}" if fixed else "gives another sample 0 when it is read again"
    return (
        f"data.name: {name} {what}, which cannot be seeded for each sample, so that it depends on the number of "
        f"workers and is not repeated; draw from random, numpy or torch, or from a generator of theirs that it keeps"
    )


def _described(sample: Any) -> str:
    """What a sample is, in a few words."""
    if isinstance(sample, dict):
        return f"a dict with {_shown(list(sample))}"
    if isinstance(sample, (tuple, list)):
        return f"a {type(sample).__name__} of {len(sample)}"
    return type(sample).__name__


def _shown(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
