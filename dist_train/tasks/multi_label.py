"""Multi-label classification: any number of labels for each sample."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from dist_train.data.batch import Batch
from dist_train.data.sets import Data
from dist_train.errors import ConfigError
from dist_train.tasks.counts import f1, precision, recall
from dist_train.tasks.label_metrics import counts_of_labels
from dist_train.tasks.measured import Measured, Pair, checked_pair
from dist_train.tasks.panels import MOST_ROWS, Panel, Table

COUNTED = "by_label"


class MultiLabel(Measured):
    """Any number of labels for each sample. The model gives a logit for each label, [batch, labels]; a target is 1
    where a label is true, and 0 elsewhere.

    The loss of a sample is the mean over its labels of the binary cross-entropy.

    Args:
        pos_weight: how much a label that is true weighs against one that is not: a number, or one for each label.
        metrics: names of METRICS["multi_label"], or one's own.
        classes: labels of the data set, where it says how many there are.
    """

    def __init__(
        self,
        pos_weight: float | list[float] | None = None,
        metrics: Sequence[Any] = ("f1",),
        classes: int | None = None,
    ):
        super().__init__("multi_label", metrics, {"classes": classes})
        if isinstance(pos_weight, list) and classes is not None and len(pos_weight) != classes:
            raise ConfigError(
                f"task.args.pos_weight: got {len(pos_weight)} numbers, expected one for all labels, or one for each of "
                f"{classes}"
            )
        self.classes = classes
        self.weight = None if pos_weight is None else torch.tensor(pos_weight, dtype=torch.float64)
        self.units_per_sample = 1

    def fitted(self, outputs: torch.Tensor, targets: torch.Tensor) -> Pair:
        """Targets as floats, as the loss takes them."""
        return outputs, targets.to(outputs.dtype)

    def loss_of(self, outputs: torch.Tensor, targets: torch.Tensor, reduction: str) -> torch.Tensor:
        """The sum of the loss over a batch, or the loss of each sample, [batch].

        Args:
            outputs: logits [batch, labels].
            targets: of the same shape, from 0 to 1.
            reduction: sum or none.
        """
        weight = None if self.weight is None else self.weight.to(outputs.device, outputs.dtype)
        found = F.binary_cross_entropy_with_logits(outputs, targets, reduction="none", pos_weight=weight).mean(1)
        return found.sum() if reduction == "sum" else found

    def counted(self, outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        """How often each label is predicted, is true, and both."""
        return {f"{COUNTED}/{key}": value for key, value in counts_of_labels(outputs, targets).items()}

    def panels(self, sums: Mapping[str, torch.Tensor], data: Data) -> list[Panel]:
        """Precision and recall of each label, the least F1 first."""
        counts = {key: sums[f"{COUNTED}/{key}"] for key in ("hits", "predicted", "actual")}
        names = data.classes or tuple(range(len(counts["hits"])))
        scores = [score(**counts).tolist() for score in (f1, precision, recall)]
        columns = zip(names, *scores, *(counts[key].long().tolist() for key in ("actual", "predicted")), strict=True)
        rows = sorted(([str(name), *values] for name, *values in columns), key=lambda row: row[1])
        note = "" if len(rows) <= MOST_ROWS else f"the {MOST_ROWS:,} with the least F1 of {len(rows):,}"
        return [Table("Labels", ("label", "F1", "precision", "recall", "true", "predicted"), rows[:MOST_ROWS], note)]

    def check(self, batch: Batch, outputs: Any) -> None:
        """Where a loss would broadcast, or take for a probability what is none."""
        outputs, targets = checked_pair(batch, outputs)
        if targets.dim() != 2 or (self.classes is not None and targets.shape[1] != self.classes):
            labels = "labels" if self.classes is None else self.classes
            raise ConfigError(
                f"data.name: got targets {targets.dtype} {list(targets.shape)}, expected [{len(targets)}, {labels}] "
                f"for task.name multi_label: 1 where a label is true, else 0; for class numbers write --task.name "
                f"classification"
            )
        if targets.numel() and not (targets.min() >= 0 and targets.max() <= 1):
            raise ConfigError(
                f"data.name: got targets from {targets.min():g} to {targets.max():g}, expected 0 to 1 for task.name "
                f"multi_label; for other numbers write --task.name regression"
            )
        if outputs.shape != targets.shape or not outputs.is_floating_point():
            raise ConfigError(
                f"model: got outputs {outputs.dtype} {list(outputs.shape)}, expected a float tensor "
                f"{list(targets.shape)}: a logit for each label"
            )
        if self.weight is not None and self.weight.numel() not in (1, targets.shape[1]):
            raise ConfigError(
                f"task.args.pos_weight: got {self.weight.numel()} numbers, expected one for all labels, or one for "
                f"each of {targets.shape[1]}"
            )
