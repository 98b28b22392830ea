"""What a data set is to the rest of the package: two splits, class names, the shape of a sample."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset


@dataclass(frozen=True)
class InMemory:
    """A split decoded once.

    Args:
        images: uint8 [n, *input_shape].
        labels: int64 [n].
    """

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class FromFiles:
    """A split that is read sample by sample.

    Args:
        dataset: map-style; item i is (float tensor of input_shape, class number or float tensor [classes]).
    """

    dataset: Dataset[tuple[torch.Tensor, Any]]

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
        mean: of the training pixels in [0, 1], a number per channel; InMemory splits only.
        std: their standard deviation.
    """

    train: InMemory | FromFiles
    test: InMemory | FromFiles
    input_shape: tuple[int, ...]
    classes: tuple[str, ...]
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
