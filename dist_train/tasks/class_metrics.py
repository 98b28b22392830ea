"""Metrics of classes: of samples (outputs [n, classes]) and of pixels (outputs [n, classes, h, w]).

Targets are class numbers [n] or [n, h, w], or probabilities of the outputs' shape, of which the largest is the class.
What has the class `ignore_index` is not counted.
"""

import torch
from torch import Tensor

from dist_train.errors import ConfigError
from dist_train.tasks.counts import f1, iou, precision, recall, tally
from dist_train.tasks.metrics import Metric, mean


def labels_of(outputs: Tensor, targets: Tensor, ignore_index: int | None = None) -> tuple[Tensor, Tensor]:
    """The true class of each sample or pixel, 0 for one that is not counted, and whether it is counted.

    Both are [n, ...], without the outputs' dimension of classes. Raises ConfigError where the shapes do not fit.
    """
    if outputs.dim() < 2 or outputs.shape[1] < 2:
        raise ConfigError(
            f"task.metrics: got outputs of shape {list(outputs.shape)}, expected [samples, classes, ...] with at "
            "least 2 classes; give the model an output for each class, or take another task"
        )
    if targets.shape == outputs.shape:
        labels = targets.argmax(1)
    elif targets.shape == outputs.shape[:1] + outputs.shape[2:]:
        labels = targets.long()
    else:
        raise ConfigError(
            f"task.metrics: got targets of shape {list(targets.shape)} for outputs of shape {list(outputs.shape)}, "
            f"expected class numbers of shape {list(outputs.shape[:1] + outputs.shape[2:])}, or probabilities of the "
            "outputs' shape; mend the targets"
        )
    if ignore_index is None:
        return labels, torch.ones_like(labels, dtype=torch.bool)
    counted = labels != ignore_index
    return labels.where(counted, 0), counted


class Accuracy(Metric):
    """The share of samples, or of pixels, whose class has the largest output."""

    def __init__(self, ignore_index: int | None = None):
        self.ignore_index = ignore_index

    def sums(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """See Metric."""
        labels, counted = labels_of(outputs, targets, self.ignore_index)
        return {"correct": ((outputs.argmax(1) == labels) & counted).sum(), "count": counted.sum()}

    def values(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """See Metric."""
        return {"": float(sums["correct"] / sums["count"])}


class TopKAccuracy(Metric):
    """The share of samples, or of pixels, whose class is among the k largest outputs.

    Of equal outputs the class with the lower number comes first, as in accuracy, so that a model whose outputs are all
    equal is not right about every sample.
    """

    def __init__(self, k: int, classes: int | None = None, ignore_index: int | None = None):
        self.k, self.ignore_index = k, ignore_index
        if classes is not None:
            self._check(classes)

    def _check(self, classes: int) -> None:
        if self.k >= classes:
            raise ConfigError(
                f"task.metrics: got top_{self.k}_accuracy, but there are {classes} classes, so that it is always 1; "
                f"expected a number below {classes}"
            )

    def sums(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """See Metric."""
        labels, counted = labels_of(outputs, targets, self.ignore_index)
        self._check(outputs.shape[1])
        own = outputs.gather(1, labels[:, None])
        numbers = torch.arange(outputs.shape[1], device=outputs.device).view(1, -1, *[1] * (outputs.dim() - 2))
        # `~(a <= b)` is not `a > b` where one is not a number: such a sample is wrong.
        before = ~(outputs <= own) | ((outputs == own) & (numbers < labels[:, None]))
        return {"correct": ((before.sum(1) < self.k) & counted).sum(), "count": counted.sum()}

    def values(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """See Metric."""
        return {"": float(sums["correct"] / sums["count"])}


class PerClass(Metric):
    """A score of each class, of three counts: how often it is predicted, is actual, and both (hits)."""

    def __init__(self, ignore_index: int | None = None):
        self.ignore_index = ignore_index

    def sums(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """See Metric. Each is [classes]; a confusion matrix would be too large for many classes."""
        labels, counted = labels_of(outputs, targets, self.ignore_index)
        guessed, classes = outputs.argmax(1), outputs.shape[1]
        return {
            "hits": tally(labels, counted & (guessed == labels), classes),
            "predicted": tally(guessed, counted, classes),
            "actual": tally(labels, counted, classes),
        }


def macro(score: Tensor, sums: dict[str, Tensor]) -> float:
    """The mean over the classes that are predicted or actual; one that is neither has no score."""
    return mean(score, (sums["predicted"] + sums["actual"] > 0).to(score.dtype))


def macro_and_weighted(score: Tensor, sums: dict[str, Tensor]) -> dict[str, float]:
    """The mean over classes, and the mean over samples: each class weighs as much as it has samples."""
    return {"": macro(score, sums), "weighted": mean(score, sums["actual"])}


class Precision(PerClass):
    """Of what is taken for a class, the share that is of it: mean over classes, and `weighted`."""

    def values(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """See Metric."""
        return macro_and_weighted(precision(**sums), sums)


class Recall(PerClass):
    """Of what is of a class, the share that is taken for it: mean over classes, and `weighted` (the accuracy)."""

    def values(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """See Metric."""
        return macro_and_weighted(recall(**sums), sums)


class F1(PerClass):
    """The harmonic mean of precision and recall of a class: mean over classes, and `weighted`."""

    def values(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """See Metric."""
        return macro_and_weighted(f1(**sums), sums)


class BalancedAccuracy(PerClass):
    """The mean of the recall over the classes that occur in the targets."""

    def values(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """See Metric."""
        return {"": mean(recall(**sums), (sums["actual"] > 0).to(sums["actual"].dtype))}


class MeanIoU(PerClass):
    """Intersection over union of a class, counted over the whole split: mean over classes."""

    def values(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """See Metric."""
        return {"": macro(iou(**sums), sums)}


class Dice(PerClass):
    """Twice the intersection of a class over the sum of both areas, counted over the whole split: mean over classes."""

    def values(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """See Metric."""
        return {"": macro(f1(**sums), sums)}
