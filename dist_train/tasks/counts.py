"""Counts of classes, and the scores that are made of them.

Of a class: `predicted` says how often it is predicted, `actual` how often it is true, and `hits` how often both.
"""

import torch
from torch import Tensor

from dist_train.tasks.metrics import ratio


def tally(numbers: Tensor, counted: Tensor, size: int) -> Tensor:
    """How often each number below `size` stands among those that are counted, int64 [size].

    Not bincount, which waits for the device to know the largest number. Raises where a number is not below `size`.
    """
    zeros = torch.zeros(size, dtype=torch.int64, device=numbers.device)
    return zeros.scatter_add_(0, numbers.flatten(), counted.flatten().long())


def precision(hits: Tensor, predicted: Tensor, actual: Tensor) -> Tensor:
    """Of what is taken for a class, the share that is of it; 0 for a class that is never predicted."""
    return ratio(hits, predicted)


def recall(hits: Tensor, predicted: Tensor, actual: Tensor) -> Tensor:
    """Of what is of a class, the share that is taken for it; 0 for a class that does not occur."""
    return ratio(hits, actual)


def f1(hits: Tensor, predicted: Tensor, actual: Tensor) -> Tensor:
    """The harmonic mean of precision and recall, also called Dice; 0 for a class that is neither."""
    return ratio(2 * hits, predicted + actual)


def iou(hits: Tensor, predicted: Tensor, actual: Tensor) -> Tensor:
    """Intersection over union of what is of a class and what is taken for it; 0 for a class that is neither."""
    return ratio(hits, predicted + actual - hits)
