"""Samples of a split from files, by number: read, checked and put together in this process or in a worker."""

import warnings
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate

from dist_train.data.generators import Seeder, held, seeder
from dist_train.data.randomness import kept_apart, seed_for
from dist_train.data.sets import FromFiles
from dist_train.errors import ConfigError

SUM_TOLERANCE = 1e-2  # of probabilities, which may be float16
SHOWN = 80  # characters of a value in a message


@dataclass(frozen=True)
class Reader(Dataset[Any]):
    """An item is a whole batch: collated in the worker, empty if the rank's share is, a message if a sample is bad."""

    dataset: Dataset[Any]
    draws: bool
    own: bool  # the data set draws from generators that it keeps itself
    seed: int
    epoch: int
    input_shape: tuple[int, ...]
    classes: int
    loss: str
    empty: tuple[torch.Tensor, torch.Tensor] | None
    repeats: bool = True  # a sample that is read again is the same

    @classmethod
    def of(cls, split: FromFiles, seed: int, input_shape: tuple[int, ...], classes: int, loss: str) -> "Reader":
        """Reads the first sample: what it is, all are. Raises ConfigError."""
        own = held(split.dataset) if split.draws else []
        reader = cls(split.dataset, split.draws, bool(own), seed, 0, input_shape, classes, loss, empty=None)
        first = np.zeros(1, np.int64)
        images, labels = reader.read(first)
        reader = replace(reader, empty=(images[:0].clone(), labels[:0].clone()))
        fixed = [type(generator).__name__ for generator in own if seeder(generator) is None]
        if fixed or not all(map(_same, (images, labels), reader.read(first))):
            warnings.warn(_not_seeded(split, fixed), stacklevel=2)
            return replace(reader, repeats=False)
        return reader

    def read(self, samples: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """The batch with these samples. Raises ConfigError where one is bad."""
        batch = self[samples]
        if isinstance(batch, str):
            raise ConfigError(batch)
        return batch

    @cached_property
    def seeders(self) -> list[Seeder]:
        """Of the data set's own generators, in this process: a worker has copies of them."""
        return [found for found in map(seeder, held(self.dataset)) if found] if self.own else []

    def __getitem__(self, batch: np.ndarray) -> tuple[torch.Tensor, torch.Tensor] | str:
        if len(batch) == 0:
            assert self.empty is not None
            return self.empty
        try:
            with kept_apart() if self.draws else nullcontext():
                images, labels = default_collate(self._samples(batch.tolist()))
        except ConfigError as error:  # a string, because an exception would come with the worker's traceback
            return str(error)
        return images, labels

    def _samples(self, batch: list[int]) -> list[tuple[torch.Tensor, torch.Tensor | int]]:
        item = self._seeded if self.draws else self.dataset.__getitem__
        samples = [item(index) for index in batch]
        if self.empty is not None and self.empty[1].dim() == 1:  # what most are, in a rush
            shape, kind, classes = self.input_shape, self.empty[0].dtype, self.classes
            with suppress(TypeError, ValueError):  # one is no pair
                if all(
                    type(image) is torch.Tensor and image.dtype is kind and image.shape == shape
                    and type(target) is int and 0 <= target < classes
                    for image, target in samples
                ):  # fmt: skip
                    return samples
        return [self._checked(index, sample) for index, sample in zip(batch, samples, strict=True)]

    def _seeded(self, index: int) -> Any:
        seed_for(self.seed, self.epoch, index, self.seeders)
        return self.dataset[index]

    def _checked(self, index: int, sample: Any) -> tuple[torch.Tensor, torch.Tensor | int]:
        if not isinstance(sample, (tuple, list)) or len(sample) != 2:
            raise ConfigError(f"data.name: sample {index}: got {_described(sample)}, expected a pair (tensor, target)")
        image, target = sample
        fits = isinstance(image, torch.Tensor) and image.shape == self.input_shape
        if not fits or image.dtype not in self._kinds():
            got = f"{image.dtype} {list(image.shape)}" if isinstance(image, torch.Tensor) else type(image).__name__
            raise ConfigError(
                f"data.name: sample {index}: got {got}, expected a tensor {' or '.join(map(str, self._kinds()))} "
                f"{list(self.input_shape)}"
            )
        return image, self._target(index, target)

    def _kinds(self) -> tuple[torch.dtype, ...]:
        return (torch.uint8, torch.float32, torch.float64) if self.empty is None else (self.empty[0].dtype,)

    def _target(self, index: int, target: Any) -> torch.Tensor | int:
        """A number, or a float vector [classes], as that of the first sample."""
        try:
            out = torch.as_tensor(target)
        except (TypeError, ValueError, RuntimeError):
            out = torch.empty(0, 0)  # neither of the two
        number = out.dim() == 0 and not out.is_floating_point() and 0 <= int(out) < self.classes
        vector = out.dim() == 1 and out.is_floating_point() and len(out) == self.classes
        if not (number or vector) or (self.empty is not None and out.dim() + 1 != self.empty[1].dim()):
            raise ConfigError(
                f"data.name: sample {index}: got target {_shown(target)}, expected a class number from 0 to "
                f"{self.classes - 1} in all samples, or a vector of {self.classes} floats in all"
            )
        if vector and self.loss == "nll":
            raise ConfigError(
                f"train.loss: got nll, but the target of sample {index} is a vector, expected class numbers; "
                f"cross_entropy takes vectors of probabilities"
            )
        if vector and self.loss == "cross_entropy" and not (out.min() >= 0 and abs(out.sum() - 1) <= SUM_TOLERANCE):
            low, high, total = float(out.min()), float(out.max()), float(out.sum())
            raise ConfigError(
                f"data.name: sample {index}: got target {_shown(target)}, from {low:g} to {high:g} with the sum "
                f"{total:g}, expected the probabilities of {self.classes} classes, which add up to 1, for train.loss "
                f"cross_entropy; for any other vector write --train.loss mse --data.one_hot true"
            )
        return int(out) if number else out


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """To the last bit, also where a value is not a number."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bytes(a), _bytes(b))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def _not_seeded(split: FromFiles, fixed: list[str]) -> str:
    name = type(split.dataset).__name__
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
