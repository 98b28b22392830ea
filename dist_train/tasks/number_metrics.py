"""Metrics of predicted numbers: outputs and targets are [n], [n, k] or more; [n, 1] and [n] are the same."""

import math

from torch import Tensor

from dist_train.errors import ConfigError
from dist_train.tasks.exact import exact_sum, exact_sum_of_squares, total, total_of_squares
from dist_train.tasks.metrics import Metric, count, wide


def columns_of(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Both as [n, k] in the widest format. Raises ConfigError where the shapes differ, as torch would repeat one."""
    predicted, actual = (one.unsqueeze(1) if one.dim() == 1 else one for one in (outputs, targets))
    if predicted.shape != actual.shape or predicted.dim() < 2:
        raise ConfigError(
            f"task.metrics: got outputs of shape {list(outputs.shape)} for targets of shape {list(targets.shape)}, "
            "expected the same shape; give the model as many outputs as the targets have numbers"
        )
    dtype = wide(outputs.device)
    return predicted.flatten(1).to(dtype), actual.flatten(1).to(dtype)


class MAE(Metric):
    """The mean absolute error."""

    lower_is_better = True

    def sums(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """See Metric."""
        predicted, actual = columns_of(outputs, targets)
        return {"error": (predicted - actual).abs().sum(), "count": count(actual.numel(), actual.device)}

    def values(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """See Metric."""
        return {"": float(sums["error"] / sums["count"])}


class MSE(Metric):
    """The mean squared error."""

    lower_is_better = True

    def sums(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """See Metric."""
        return squared_error(outputs, targets)

    def values(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """See Metric."""
        return {"": float(sums["error"] / sums["count"])}


class RMSE(Metric):
    """The root of the mean squared error, also where there are several numbers a sample."""

    lower_is_better = True

    def sums(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """See Metric."""
        return squared_error(outputs, targets)

    def values(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """See Metric."""
        return {"": float((sums["error"] / sums["count"]).sqrt())}


def squared_error(outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """The sum of the squared errors, and how many there are."""
    predicted, actual = columns_of(outputs, targets)
    return {"error": (predicted - actual).square().sum(), "count": count(actual.numel(), actual.device)}


class R2(Metric):
    """The share of the targets' variance that is explained: the mean over the k numbers of a sample.

    A number whose targets are all equal has 1 if it is predicted without error, else 0. Not a number for fewer than two
    samples. The variance is the difference of two sums that are nearly equal where the mean is large; they are exact.
    """

    def sums(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """See Metric. What grows with the number of columns k is 318 integers each."""
        predicted, actual = columns_of(outputs, targets)
        return {
            "residual": (predicted - actual).square().sum(0),
            "sum": exact_sum(actual),
            "squares": exact_sum_of_squares(actual),
            "count": count(len(actual), actual.device),
        }

    def values(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """See Metric."""
        n, residuals = int(sums["count"]), sums["residual"].tolist()
        if n < 2 or not all(map(math.isfinite, residuals)):
            return {"": math.nan}
        columns = zip(residuals, total(sums["sum"]), total_of_squares(sums["squares"]), strict=True)
        scores = [_explained(residual, float(squares - one * one / n)) for residual, one, squares in columns]
        return {"": sum(scores) / len(scores)}


def _explained(residual: float, variance: float) -> float:
    if variance == 0:
        return float(residual == 0)
    return 1 - residual / variance
