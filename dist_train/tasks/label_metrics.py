"""Metrics of several labels at once: outputs are logits [n, labels], targets [n, labels] are 1 where a label is true.

A label is predicted where its logit is above 0.
"""

from torch import Tensor

from dist_train.errors import ConfigError
from dist_train.tasks.counts import f1, precision, recall
from dist_train.tasks.metrics import Metric, count


def predicted_and_actual(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each label is predicted, and whether it is true, bool [n, labels]. Raises ConfigError."""
    if outputs.dim() != 2 or outputs.shape != targets.shape:
        raise ConfigError(
            f"task.metrics: got targets of shape {list(targets.shape)} for outputs of shape {list(outputs.shape)}, "
            "expected both [samples, labels]; give the model an output, and the targets a 0 or 1, for each label"
        )
    return outputs > 0, targets > 0.5


class ExactMatch(Metric):
    """The share of samples whose labels are all right, also called subset accuracy."""

    def sums(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """See Metric."""
        guessed, actual = predicted_and_actual(outputs, targets)
        return {"correct": (guessed == actual).all(1).sum(), "count": count(len(outputs), outputs.device)}

    def values(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """See Metric."""
        return {"": float(sums["correct"] / sums["count"])}


def counts_of_labels(outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """How often each label is predicted, is actual, and both (hits), int64 [labels]."""
    guessed, actual = predicted_and_actual(outputs, targets)
    return {"hits": (guessed & actual).sum(0), "predicted": guessed.sum(0), "actual": actual.sum(0)}


class PerLabel(Metric):
    """A score of each label, of its counts."""

    def sums(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """See Metric. Each is [labels]."""
        return counts_of_labels(outputs, targets)


def together(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """The counts of all labels as if they were of one."""
    return {name: counts.sum() for name, counts in sums.items()}


class Precision(PerLabel):
    """Of what is predicted, the share that is true: mean over labels, and `micro`, of all labels together."""

    def values(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """See Metric."""
        return {"": float(precision(**sums).mean()), "micro": float(precision(**together(sums)))}


class Recall(PerLabel):
    """Of what is true, the share that is predicted: mean over labels, and `micro`, of all labels together."""

    def values(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """See Metric."""
        return {"": float(recall(**sums).mean()), "micro": float(recall(**together(sums)))}


class F1(PerLabel):
    """The harmonic mean of precision and recall: mean over labels, and `micro`, of all labels together."""

    def values(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """See Metric."""
        return {"": float(f1(**sums).mean()), "micro": float(f1(**together(sums)))}
