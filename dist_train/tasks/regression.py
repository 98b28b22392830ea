"""Regression: one or more numbers for each sample."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from dist_train.data.batch import Batch
from dist_train.data.feed import Feed
from dist_train.data.sets import Data
from dist_train.errors import ConfigError
from dist_train.ranks.dist import World
from dist_train.tasks.measured import Measured, Pair, checked_pair
from dist_train.tasks.predictions import Predictions

LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "mse": F.mse_loss,
    "l1": F.l1_loss,
    "huber": F.huber_loss,
    "smooth_l1": F.smooth_l1_loss,
}
# The argument of torch's loss that says up to which error it is a square.
BOUND = {"huber": "delta", "smooth_l1": "beta"}


class Regression(Measured):
    """Numbers for each sample. The model gives as many as the targets have; [batch, 1] and [batch] are the same.

    The loss of a sample is the mean over its numbers, so that the loss of a batch is the mean over all numbers.

    Args:
        loss: mse, l1, huber, or smooth_l1, which is huber divided by delta.
        delta: of huber and smooth_l1, the error above which the loss grows linearly.
        metrics: names of METRICS["regression"], or one's own.
        outputs: how many numbers a sample's target has, where the data set says so.
    """

    def __init__(
        self,
        loss: str = "mse",
        delta: float = 1.0,
        metrics: Sequence[Any] = ("mae", "rmse", "r2"),
        outputs: int | None = None,
    ):
        super().__init__("regression", metrics, {"outputs": outputs})
        self.function = partial(LOSSES[loss], **({BOUND[loss]: delta} if loss in BOUND else {}))
        self.units_per_sample = 1

    def fitted(self, outputs: torch.Tensor, targets: torch.Tensor) -> Pair:
        """Both of one shape: a [batch, 1] beside a [batch] would be repeated to [batch, batch]."""
        if outputs.dim() != targets.dim():
            outputs, targets = (one.squeeze(1) if one.dim() == 2 else one for one in (outputs, targets))
        return outputs, targets.to(outputs.dtype)

    def loss_of(self, outputs: torch.Tensor, targets: torch.Tensor, reduction: str) -> torch.Tensor:
        """The sum of the loss over a batch, or the loss of each sample, [batch].

        Args:
            outputs: [batch] or [batch, ...].
            targets: of the same shape.
            reduction: sum or none.
        """
        found = self.function(outputs, targets, reduction="none")
        each = found if found.dim() == 1 else found.flatten(1).mean(1)
        return each.sum() if reduction == "sum" else each

    def check(self, batch: Batch, outputs: Any) -> None:
        """Where a loss would broadcast."""
        outputs, targets = checked_pair(batch, outputs)
        if not outputs.is_floating_point() or _shape(outputs) != _shape(targets):
            expected = f"a float tensor {list(targets.shape)}"
            if targets.dim() == 1:
                expected += f" or {[len(targets), 1]}"
            raise ConfigError(
                f"model: got outputs {outputs.dtype} {list(outputs.shape)}, expected {expected}, as the targets of "
                f"{len(targets)} samples are; give the model as many outputs as a target has numbers"
            )

    def examiner(self, data: Data, feed: Feed, world: World) -> Predictions:
        """Predicted beside true, and the worst samples."""
        return Predictions(self, feed, world)


def _shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """[n] for [n, 1]."""
    shape = tuple(tensor.shape)
    return shape[:1] if shape[1:] == (1,) else shape
