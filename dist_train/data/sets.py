"""What a data set is to the rest of the package: two splits, class names, the shape of a sample."""

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset

from dist_train.errors import ConfigError


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
        identity: text that changes when the samples do, such as a hash over their names and classes. A checkpoint holds
            it, so that a run does not go on with other data.
        draws: whether an item may depend on random numbers, which are then seeded for each sample. False saves the time
            of it.
    """

    dataset: Dataset[tuple[torch.Tensor, Any]]
    identity: str = ""
    draws: bool = True

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
                digest.update(split.images.contiguous().numpy())
                digest.update(split.labels.contiguous().numpy())
            else:
                digest.update(split.identity.encode())
        return digest.hexdigest()

    def __post_init__(self) -> None:
        """What would otherwise show as wrong numbers, or as an error far from its cause."""
        shape, classes = tuple(self.input_shape), len(self.classes)
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, *shape[:1]):
                raise ConfigError(f"data.name: got {name} {tuple(values)}, expected a number per channel of {shape}")
        if not all(value > 0 for value in self.std):
            raise ConfigError(f"data.name: got std {tuple(self.std)}, expected numbers above 0")
        for name, split in (("train", self.train), ("test", self.test)):
            if len(split) == 0:
                raise ConfigError(f"data.name: got no samples in the {name} split, expected at least one")
            if not isinstance(split, InMemory):
                continue
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
