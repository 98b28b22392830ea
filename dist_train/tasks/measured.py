"""What tasks share whose model gives outputs that are held against targets: a loss of both, and metrics."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dist_train.data.batch import Batch
from dist_train.tasks.base import Task, inputs_and_targets, outputs_and_targets, tensor_of
from dist_train.tasks.chosen_metrics import make

Pair = tuple[torch.Tensor, torch.Tensor]


class Measured(Task):
    """A task of outputs and targets. The first of its metrics is what the best checkpoint is decided by.

    Args:
        kind: of its metrics, a key of METRICS.
        metrics: `task.metrics`.
        facts: for the arguments of metrics that ask for them by name.
    """

    def __init__(self, kind: str, metrics: Sequence[Any], facts: Mapping[str, Any]):
        self.measures = make(metrics, {name: value for name, value in facts.items() if value is not None}, kind)
        self.lower_is_better = ("loss", *self.measures.lower_is_better)
        self.best = next(iter(self.measures.names), "loss")

    @abstractmethod
    def loss_of(self, outputs: torch.Tensor, targets: torch.Tensor, reduction: str) -> torch.Tensor:
        """The sum of the loss over the units of a batch (sum), or what is added up for it (none), [batch, ...]."""

    def fitted(self, outputs: torch.Tensor, targets: torch.Tensor) -> Pair:
        """Both in the shapes and types that the loss and the metrics take."""
        return outputs, targets

    def counted(self, outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        """More sums of an evaluation, for `panels`."""
        return {}

    def sums(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """`loss`, and in evaluation the sums of the metrics, by METRIC/SUM."""
        outputs, targets = self.fitted(*outputs_and_targets(model, batch))
        sums = {"loss": self.loss_of(outputs, targets, "sum")}
        if model.training:
            return sums
        return sums | self.measures.sums(outputs, targets) | self.counted(outputs, targets)

    def metrics(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Loss and metrics."""
        return super().metrics(sums) | self.measures.values(dict(sums))


def checked_pair(batch: Batch, outputs: Any) -> Pair:
    """The outputs and the targets of the first look. Raises ConfigError where they are no tensors."""
    return tensor_of(outputs), inputs_and_targets(batch.tree)[1]
