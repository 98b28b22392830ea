"""What a metric is: sums that may be added over batches and ranks, and numbers that are made of the totals."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Metric(ABC):
    """A number for people that does not depend on how the samples are cut into batches and ranks.

    One of your own is a class of this kind, named in the config as `my_module:MyMetric`. Arguments of its constructor
    come from the config, and facts of the data set (`classes`, ...) are given to those that ask for them by name.
    """

    lower_is_better = False

    @abstractmethod
    def sums(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Of one batch: tensors that may be added over batches and ranks, on the outputs' device.

        An empty batch, [0, ...], gives zeros of the same shapes. Counts are int64 and other sums float64 (see `wide`),
        as float32 counts no further than 2^24. Must not wait for the device: no `.item()`, no indexing by a mask.

        Args:
            outputs: [n, ...], as the model gives them.
            targets: [n, ...], as the data set gives them.

        Raises:
            ConfigError: their shapes do not fit.
        """

    @abstractmethod
    def values(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """The numbers, from the totals over all batches and ranks.

        Args:
            sums: what `sums` gives, as float64 tensors on the CPU.

        Returns:
            By name: "" stands for the metric's own name, and `macro` for `NAME/macro`. Not a number where there is
            nothing to divide by.
        """


def wide(device: torch.device) -> torch.dtype:
    """The widest floating-point format of a device."""
    return torch.float32 if device.type == "mps" else torch.float64


def count(number: int, device: torch.device) -> Tensor:
    """A count that the host knows, as an int64 scalar on the device; filled there, so that nothing is copied."""
    return torch.full((), number, dtype=torch.int64, device=device)


def ratio(over: Tensor, under: Tensor) -> Tensor:
    """The quotient of each pair, 0 where there is nothing to divide by."""
    return torch.where(under == 0, 0.0, over / under)


def mean(values: Tensor, weights: Tensor) -> float:
    """The weighted mean of values [k], not a number where all weights [k] are 0."""
    return float((values * weights).sum() / weights.sum())
