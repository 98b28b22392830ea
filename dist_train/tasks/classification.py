"""Classification: one class for each sample."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from dist_train.data.batch import Batch
from dist_train.data.feed import Feed
from dist_train.data.sets import Data
from dist_train.errors import ConfigError
from dist_train.ranks.dist import World
from dist_train.tasks.base import inputs_and_targets, tensor_of
from dist_train.tasks.class_weights import weight_of, weights_of
from dist_train.tasks.measured import Measured, checked_pair
from dist_train.tasks.mistakes import Mistakes


class Classification(Measured):
    """One class for each sample. The model gives a number for each class, [batch, classes].

    Args:
        loss: cross_entropy takes logits, nll log-probabilities, mse anything: it is the mean over classes of the
            squared error, and takes targets that are vectors (data.one_hot).
        label_smoothing: share of the target that is spread over all classes (cross_entropy).
        class_weights: of each class in the loss, which then is the mean weighted by them, as torch's is; by number.
        ignore_index: samples of this class number count neither in the loss nor in metrics.
        metrics: names of METRICS["classification"], or one's own.
        classes: of the data set.
    """

    def __init__(
        self,
        loss: str = "cross_entropy",
        label_smoothing: float = 0.0,
        class_weights: list[float] | None = None,
        ignore_index: int | None = None,
        metrics: Sequence[Any] = ("accuracy",),
        classes: int | None = None,
    ):
        if classes is None:
            raise ConfigError(
                "task.name: got classification of a data set without classes, expected their names; give them as "
                "Data(..., classes=(...)), or choose another task"
            )
        super().__init__("classification", metrics, {"classes": classes, "ignore_index": ignore_index})
        self.loss, self.classes, self.smoothing, self.ignored = loss, classes, label_smoothing, ignore_index
        self.weights = weights_of(class_weights, classes)
        if loss == "mse" and (class_weights is not None or ignore_index is not None):
            raise ConfigError("task.args: got class_weights or ignore_index with mse, which has neither; leave it out")
        self.loss_of_vectors = loss
        self.units_per_sample = 1 if class_weights is None and ignore_index is None else None

    def units(self, batch: Batch) -> torch.Tensor:
        """Samples that count, by the weights of their classes."""
        return weight_of(inputs_and_targets(batch.tree)[1], self.weights, self.ignored)

    def loss_of(self, outputs: torch.Tensor, targets: torch.Tensor, reduction: str) -> torch.Tensor:
        """The sum of the loss over a batch, or the loss of each sample, [batch].

        Args:
            outputs: [batch, classes].
            targets: class numbers [batch], or vectors [batch, classes].
            reduction: sum or none.
        """
        if self.loss == "mse":
            found = F.mse_loss(outputs, targets, reduction="none").mean(1)
            return found.sum() if reduction == "sum" else found
        settings: dict[str, Any] = {"reduction": reduction}
        if self.weights is not None:
            settings["weight"] = self.weights.to(outputs.device, outputs.dtype)
        if self.ignored is not None:
            settings["ignore_index"] = self.ignored
        if self.loss == "nll":
            return F.nll_loss(outputs, targets, **settings)
        return F.cross_entropy(outputs, targets, label_smoothing=self.smoothing, **settings)

    def check(self, batch: Batch, outputs: Any) -> None:
        """Where a loss would broadcast, or raise from deep inside."""
        outputs, targets = checked_pair(batch, outputs)
        vectors, samples, classes, shape = targets.dim() == 2, len(targets), self.classes, tuple(outputs.shape)
        fits = len(shape) == 2 and shape[0] == samples and (shape[1] == classes or (shape[1] > classes and not vectors))
        if not fits or not outputs.is_floating_point():
            raise ConfigError(
                f"model: got outputs {outputs.dtype} {list(shape)}, expected a float tensor [{samples}, {classes}] for "
                f"{samples} samples: a number for each of {classes} classes"
            )
        if vectors and (self.weights is not None or self.ignored is not None):
            raise ConfigError(
                "task.args: got class_weights or ignore_index for targets that are vectors, which have no class "
                "number, expected numbers; leave it out, or write --data.one_hot false"
            )

    def notes(self, batch: Batch, outputs: Any) -> list[str]:
        """Where outputs are of no class."""
        given = tensor_of(outputs).shape[1]
        if given == self.classes:
            return []
        last = self.classes - 1
        return [
            f"model: gives {given} outputs for {self.classes} classes, so that those after number {last} are never "
            f"right; build it with {self.classes}, unless that is meant"
        ]

    def examiner(self, data: Data, feed: Feed, world: World) -> Mistakes | None:
        """Which classes are taken for which, and the worst samples, where samples are pairs."""
        return Mistakes(self, feed, tuple(data.classes), world) if feed.paired else None
