"""Segmentation: a class for each pixel."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from dist_train.data.batch import Batch
from dist_train.data.feed import Feed
from dist_train.data.sets import Data
from dist_train.errors import ConfigError
from dist_train.ranks.dist import World
from dist_train.tasks.base import inputs_and_targets
from dist_train.tasks.class_weights import weight_of, weights_of
from dist_train.tasks.masks import Masks
from dist_train.tasks.measured import Measured, Pair, checked_pair


class Segmentation(Measured):
    """A class for each pixel. The model gives a number for each class of each pixel, [batch, classes, height, width];
    targets are masks of class numbers, [batch, height, width]. The loss is the cross-entropy, a mean over pixels.

    Args:
        label_smoothing: share of the target that is spread over all classes.
        class_weights: of each class in the loss, which then is the mean weighted by them, as torch's is; by number.
        ignore_index: pixels of this class number count neither in the loss nor in metrics.
        metrics: names of METRICS["segmentation"], or one's own.
        classes: of the data set.
        target_shape: of every mask, where the data set says that all have one. Then no pixels are counted.
    """

    unit = "pixels"

    def __init__(
        self,
        label_smoothing: float = 0.0,
        class_weights: list[float] | None = None,
        ignore_index: int | None = None,
        metrics: Sequence[Any] = ("mean_iou", "pixel_accuracy"),
        classes: int | None = None,
        target_shape: tuple[int, ...] | None = None,
    ):
        if classes is None:
            raise ConfigError(
                "task.name: got segmentation of a data set without classes, expected their names; give them as "
                "Data(..., classes=(...))"
            )
        super().__init__("segmentation", metrics, {"classes": classes, "ignore_index": ignore_index})
        self.classes, self.smoothing, self.ignored = classes, label_smoothing, ignore_index
        self.weights = weights_of(class_weights, classes)
        self.shape = None if target_shape is None else tuple(target_shape)
        all_count = class_weights is None and ignore_index is None
        self.units_per_sample = math.prod(self.shape) if self.shape is not None and all_count else None

    def units(self, batch: Batch) -> torch.Tensor:
        """Pixels that count, by the weights of their classes."""
        return weight_of(inputs_and_targets(batch.tree)[1].long(), self.weights, self.ignored)

    def fitted(self, outputs: torch.Tensor, targets: torch.Tensor) -> Pair:
        """Masks as class numbers, whatever integers hold them. Raises ConfigError for one of another size than all."""
        if self.units_per_sample is not None and tuple(targets.shape[1:]) != self.shape:
            raise ConfigError(
                f"data.name: got masks {list(targets.shape)}, expected the size {self.shape}, as the data set's "
                f"target_shape says; leave it out where masks have several sizes"
            )
        return outputs, targets.long()

    def loss_of(self, outputs: torch.Tensor, targets: torch.Tensor, reduction: str) -> torch.Tensor:
        """The sum of the loss over all pixels of a batch, or the loss of each pixel, [batch, height, width].

        Args:
            outputs: [batch, classes, height, width].
            targets: class numbers, [batch, height, width].
            reduction: sum or none.
        """
        settings: dict[str, Any] = {"reduction": reduction, "label_smoothing": self.smoothing}
        if self.weights is not None:
            settings["weight"] = self.weights.to(outputs.device, outputs.dtype)
        if self.ignored is not None:
            settings["ignore_index"] = self.ignored
        return F.cross_entropy(outputs, targets, **settings)

    def check(self, batch: Batch, outputs: Any) -> None:
        """Where the loss would raise from deep inside."""
        outputs, targets = checked_pair(batch, outputs)
        if targets.dim() < 2 or targets.is_floating_point() or targets.dtype == torch.bool:
            raise ConfigError(
                f"data.name: got targets {targets.dtype} {list(targets.shape)}, expected masks of class numbers, "
                f"integers [{len(targets)}, height, width], for task.name segmentation"
            )
        shape = (len(targets), self.classes, *targets.shape[1:])
        if tuple(outputs.shape) != shape or not outputs.is_floating_point():
            raise ConfigError(
                f"model: got outputs {outputs.dtype} {list(outputs.shape)}, expected a float tensor {list(shape)}: a "
                f"number for each of {self.classes} classes of each pixel of the masks"
            )
        known = targets[targets != self.ignored].long() if self.ignored is not None else targets.long()
        beyond = known[(known < 0) | (known >= self.classes)]
        if beyond.numel():
            raise ConfigError(
                f"data.name: got the class number {beyond[0]} in a mask, expected 0 to {self.classes - 1}; for pixels "
                f"that are of no class write --task.args.ignore_index {beyond[0]}"
            )

    def examiner(self, data: Data, feed: Feed, world: World) -> Masks:
        """The worst samples, with their masks."""
        return Masks(self, self.ignored, feed, tuple(data.classes), world)
