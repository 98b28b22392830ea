"""What a data set is to the rest of the package: two splits, class names, the shape of a sample."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset

from dist_train.errors import ConfigError

HASHED_ROWS = 1024  # at a time


@dataclass(frozen=True)
class InMemory:
    """A split decoded once.

    Args:
        images: uint8 [n, *input_shape].
        labels: int64 [n], class numbers.
    """

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class FromFiles:
    """A split that is read sample by sample.

    Args:
        dataset: map-style; item i is (tensor of input_shape, class number or float vector [classes]). The tensor is
            float, or uint8 pixels that are then divided by 255. Its __getitem__ may raise ConfigError for a bad sample.
            A vector is the probabilities of the classes where train.loss is cross_entropy.
        identity: text that changes when the samples do, such as a hash over their names and classes. A checkpoint holds
            it, so that a run does not go on with other data.
        draws: whether an item may depend on random numbers. Then the global generators of random, NumPy and torch, and
            those that the data set or what it uses keeps, are seeded for each sample. False saves the time of it.

    Raises:
        ConfigError: the data set has no samples by number.
    """

    dataset: Dataset[tuple[torch.Tensor, Any]]
    identity: str = ""
    draws: bool = True

    def __post_init__(self) -> None:
        kind = type(self.dataset)
        for method in ("__getitem__", "__len__"):
            inherited = getattr(Dataset, method, None)  # raises NotImplementedError
            if isinstance(self.dataset, IterableDataset) or getattr(kind, method, inherited) is inherited:
                what = "an IterableDataset" if isinstance(self.dataset, IterableDataset) else f"without {method}"
                raise ConfigError(
                    f"data.name: got {kind.__name__}, {what}, which has no order that a run can resume in; expected a "
                    f"map-style Dataset with __len__ and __getitem__"
                )

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Data:
    """A data set.

    Args:
        train: what an epoch passes over.
        test: what is evaluated.
        input_shape: shape of a sample, such as (1, 28, 28).
        classes: names by class number.
        mean: of the training pixels in [0, 1]: a number per channel, or one for all.
        std: their standard deviation, likewise.

    Raises:
        ConfigError: the parts do not fit together. A data set may be the user's own function.
    """

    train: InMemory | FromFiles
    test: InMemory | FromFiles
    input_shape: tuple[int, ...]
    classes: tuple[str, ...]
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def fingerprint(self) -> str:
        """A hash over what the data set holds: of data in memory all of it, of data in files what `FromFiles` says."""
        digest = hashlib.sha256(repr((tuple(self.input_shape), tuple(self.classes), self.mean, self.std)).encode())
        for split in (self.train, self.test):
            digest.update(str(len(split)).encode())
            if isinstance(split, InMemory):
                for piece in split.images.split(HASHED_ROWS):  # no copy of all, where they do not lie in a row
                    digest.update(piece.contiguous().numpy())
                digest.update(split.labels.contiguous().numpy())
            else:
                digest.update(split.identity.encode())
        return digest.hexdigest()

    def __post_init__(self) -> None:
        """What would otherwise show as wrong numbers, or as an error far from its cause."""
        _sequence("input_shape", self.input_shape, "the sizes of a sample, such as (1, 28, 28)")
        _sequence("classes", self.classes, "their names in order, such as ('cat', 'dog') or tuple('0123456789')")
        shape, classes = tuple(self.input_shape), len(self.classes)
        if not all(isinstance(size, Integral) and size > 0 for size in shape):
            raise ConfigError(f"data.name: got input_shape {shape}, expected whole numbers above 0")
        if classes == 0:
            raise ConfigError("data.name: got no classes, expected their names in order")
        for name, values in (("mean", self.mean), ("std", self.std)):
            _sequence(name, values, "a number per channel, or one for all: (0.5,)")
            if len(values) not in (1, *shape[:1]):
                raise ConfigError(f"data.name: got {name} {tuple(values)}, expected a number per channel of {shape}")
            if not all(isinstance(value, Real) and math.isfinite(value) for value in values):
                raise ConfigError(f"data.name: got {name} {tuple(values)}, expected finite numbers")
        if not all(value > 0 for value in self.std):
            raise ConfigError(f"data.name: got std {tuple(self.std)}, expected numbers above 0")
        for name, split in (("train", self.train), ("test", self.test)):
            if not isinstance(split, (InMemory, FromFiles)):
                raise ConfigError(
                    f"data.name: got {type(split).__name__} as the {name} split, expected "
                    f"dist_train.data.sets.InMemory(images, labels) or FromFiles(dataset)"
                )
            if isinstance(split, InMemory):
                _check_tensors(name, split)
            if len(split) == 0:
                raise ConfigError(f"data.name: got no samples in the {name} split, expected at least one")
            if isinstance(split, InMemory):
                _check_values(name, split, shape, classes)


def _sequence(name: str, value: Any, expected: str) -> None:
    """Raises ConfigError for a number, a text, or what has no order."""
    if isinstance(value, (str, bytes)) or not isinstance(value, (Sequence, np.ndarray)):
        raise ConfigError(f"data.name: got {name} {value!r}, expected {expected}")


def _check_tensors(name: str, split: InMemory) -> None:
    for what, value in (("images", split.images), ("labels", split.labels)):
        if not isinstance(value, torch.Tensor):
            raise ConfigError(
                f"data.name: got {name} {what} of type {type(value).__name__}, expected a tensor; for example "
                f"torch.as_tensor(...)"
            )
    if split.labels.dim() == 0:
        raise ConfigError(f"data.name: got {name} labels without a dimension, expected torch.int64 [samples]")


def _check_values(name: str, split: InMemory, shape: tuple[int, ...], classes: int) -> None:
    images, labels = split.images, split.labels
    if images.dtype != torch.uint8 or tuple(images.shape) != (len(split), *shape):
        raise ConfigError(
            f"data.name: got {name} images {images.dtype} {list(images.shape)}, "
            f"expected torch.uint8 {[len(split), *shape]}; other types go as FromFiles"
        )
    if labels.dtype != torch.int64 or labels.dim() != 1 or labels.min() < 0 or labels.max() >= classes:
        raise ConfigError(
            f"data.name: got {name} labels {labels.dtype} {list(labels.shape)} from {labels.min()} to "
            f"{labels.max()}, expected torch.int64 [{len(split)}] from 0 to {classes - 1}"
        )
