"""The test samples whose masks a segmentation gets most wrong."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dist_train.data.batch import Batch
from dist_train.data.feed import Feed
from dist_train.data.order import share
from dist_train.ranks.dist import World
from dist_train.tasks.base import inputs_and_targets, tensor_of
from dist_train.tasks.measured import Measured
from dist_train.tasks.worst import Worst, pixels, write_arrays

NAME = "masks.npz"
WORST = 12
SIDE = 256  # pixels of a mask that are kept, each way; of a larger one every second, every third and so on
NO_CLASS = -1  # a pixel that does not count
OUTSIDE = -2  # no pixel of the mask


class Masks:
    """Watches an evaluation, batch by batch, and writes the samples with the largest loss, the mean over their own
    pixels that count. Nothing here waits for the device before it writes.

    Args:
        task: says how outputs and targets belong together, and gives the loss of each pixel.
        ignored: class number of pixels that do not count.
        feed: of the split.
        classes: their names.
        world: this rank's place.
    """

    def __init__(self, task: Measured, ignored: int | None, feed: Feed, classes: tuple[str, ...], world: World):
        self.task, self.ignored, self.feed, self.classes = task, ignored, feed, classes
        self.is_main = world.is_main
        self.next = share(len(feed.split), world.data_rank, world.data_size).start
        self.worst = Worst(WORST)

    def __call__(self, batch: Batch, outputs: Any) -> None:
        """See Examiner."""
        outputs, targets = self.task.fitted(tensor_of(outputs), inputs_and_targets(batch.tree)[1])
        counts = torch.ones_like(targets, dtype=torch.bool) if self.ignored is None else targets != self.ignored
        number = counts.flatten(1).sum(1)
        loss = self.task.loss_of(outputs, targets, "none").where(counts, 0).flatten(1).sum(1) / number.clamp(min=1)

        def columns(some: Tensor) -> Mapping[str, Tensor]:
            predicted, true, counted = outputs[some].argmax(1), targets[some], counts[some]
            right = ((predicted == true) & counted).flatten(1).sum(1) / number[some].clamp(min=1)
            true = true.where(counted, NO_CLASS)
            return {"right": right, "true": _kept(true), "predicted": _kept(predicted)}

        self.worst.add(loss.where(number > 0, -torch.inf), self.next, columns)
        self.next += len(targets)

    def write(self, folder: Path) -> None:
        """Writes masks.npz; see the README. Collective; rank 0 writes."""
        worst = self.worst.over_ranks()
        if not self.is_main:
            return
        arrays = dict(worst) | {"classes": np.array([str(name) for name in self.classes], dtype=np.str_)}
        if self.feed.paired:  # one by one, as sizes may differ
            inputs = [self.feed.inputs(worst["index"][i : i + 1])[0] for i in range(len(worst["index"]))]
            arrays |= {f"image_{i}": _shrunk(pixels(one)) for i, one in enumerate(inputs)}
        write_arrays(folder / NAME, arrays)


def _kept(masks: Tensor) -> Tensor:
    """Masks [some, ...] as int16 [some, SIDE, SIDE]. Of a volume it is the slice in the middle."""
    while masks.dim() > 3:
        masks = masks[:, masks.shape[1] // 2]
    masks = masks.unsqueeze(1) if masks.dim() == 2 else masks
    step = _step(masks.shape[1:])
    masks = masks[:, ::step, ::step].to(torch.int16)
    height, width = masks.shape[1:]
    return F.pad(masks, (0, SIDE - width, 0, SIDE - height), value=OUTSIDE)


def _shrunk(image: np.ndarray) -> np.ndarray:
    """A picture [channels, height, width], or less, that fits the kept mask."""
    while image.ndim > 3:
        image = image[:, image.shape[1] // 2]
    step = _step(image.shape[-2:])
    return image[..., ::step, ::step] if image.ndim > 1 else image[..., ::step]


def _step(size: tuple[int, ...]) -> int:
    return max(1, -(-max(size) // SIDE))
