"""What a model gets wrong on the test data: which classes it takes for which, and the samples with the largest loss."""

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from dist_train.data.batch import Batch
from dist_train.data.feed import Feed
from dist_train.data.order import share
from dist_train.ranks import dist
from dist_train.ranks.dist import World
from dist_train.tasks.base import inputs_and_targets, tensor_of
from dist_train.tasks.worst import Worst, pixels, write_arrays

NAME = "evaluation.npz"
WORST = 24
CONFUSION_CLASSES = 1000  # above, the matrix is left out


class Classifier(Protocol):
    """What is asked of the task: see classification.py."""

    loss: str
    ignored: int | None

    def loss_of(self, outputs: torch.Tensor, targets: torch.Tensor, reduction: str) -> torch.Tensor:
        """The loss of each sample, [batch]."""


class Mistakes:
    """Watches an evaluation, batch by batch, and writes what it saw. Nothing here waits for the device before that, and
    between batches only the confusion matrix and the worst samples are kept.

    Args:
        task: gives the loss of each sample, and says what outputs are.
        feed: of the split.
        classes: their names.
        world: this rank's place.
    """

    def __init__(self, task: Classifier, feed: Feed, classes: tuple[str, ...], world: World):
        self.task, self.feed, self.classes = task, feed, classes
        self.next = share(len(feed.split), world.data_rank, world.data_size).start
        self.seen = False
        self.is_main = world.is_main
        self.confusion: torch.Tensor | None = None
        self.worst = Worst(WORST)

    def __call__(self, batch: Batch, outputs: Any) -> None:
        """The next batch of this rank's part of the split, in order, and the model's outputs [batch, classes]."""
        outputs, targets = tensor_of(outputs), inputs_and_targets(batch.tree)[1]
        count, width = outputs.shape
        true, predicted = targets if targets.dim() == 1 else targets.argmax(1), outputs.argmax(1)
        ignored = self.task.ignored
        counts = torch.ones_like(true, dtype=torch.bool) if ignored is None else true != ignored
        if not self.seen and len(self.classes) <= CONFUSION_CLASSES and width <= CONFUSION_CLASSES:
            self.classes += tuple(str(i) for i in range(len(self.classes), width))  # outputs that are no class
            size = len(self.classes)
            self.confusion = torch.zeros(size * size, dtype=torch.int64, device=outputs.device)
        if self.confusion is not None:
            size = len(self.classes)
            self.confusion.index_add_(0, true.where(counts, 0) * size + predicted, counts.to(torch.int64))
        loss = self.task.loss_of(outputs, targets, "none").masked_fill(~counts, -torch.inf)
        sure = self._confidence(outputs, predicted)
        of_each = {"true": true, "predicted": predicted, "confidence": sure}
        self.worst.add(loss, self.next, lambda worst: {name: value[worst] for name, value in of_each.items()})
        self.next += count
        self.seen = True

    def _confidence(self, outputs: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
        """The probability that the model gives its prediction. With mse, outputs are meant to be probabilities."""
        if self.task.loss == "cross_entropy":
            outputs = outputs.softmax(1)
        elif self.task.loss == "nll":
            outputs = outputs.exp()
        return outputs.gather(1, predicted[:, None])[:, 0].clamp(0, 1)

    def write(self, folder: Path) -> None:
        """Writes evaluation.npz, whole or not at all: see the README. Collective; rank 0 writes.

        Its content does not depend on the number of ranks, but for the rounding of what the model computes.
        """
        assert self.seen
        confusion = None if self.confusion is None else dist.sum_(self.confusion).cpu().numpy()
        worst = self.worst.over_ranks()
        if not self.is_main:
            return
        arrays = {f"worst_{name}": value for name, value in worst.items()}
        arrays["worst_images"] = np.stack([pixels(image) for image in self.feed.inputs(worst["index"])])
        arrays["classes"] = np.array([str(name) for name in self.classes], dtype=np.str_)
        if confusion is not None:
            arrays["confusion"] = confusion.reshape(len(self.classes), -1)
        write_arrays(folder / NAME, arrays)
