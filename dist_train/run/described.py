"""A sample of the training split, as people know it: its file, class, numbers or text, and its picture."""

from typing import Any

import numpy as np
import torch

from dist_train.data.batch import is_branch, leaves_of, names_of
from dist_train.data.sets import Columns, Gathered
from dist_train.run.assemble import Parts
from dist_train.tasks.worst import pixels

SHOWN_NUMBERS, SHOWN_TEXT = 8, 80


def described(parts: Parts, number: int) -> str:
    """A line about a sample: what its data set says of it, and what it is trained towards."""
    split, tree = parts.data.train, parts.feed.read(np.array([number]))
    if isinstance(split, Gathered) and split.describe:
        return split.describe(number)  # text, which token numbers say no more than
    told = [split.describe(number)] if not isinstance(split, Columns) and split.describe else []
    if parts.feed.paired:
        return ", ".join([*told, *(_shown(leaf, parts.data.classes) for leaf in leaves_of(tree)[1:])])
    names = names_of(tree) if is_branch(tree) else [""]
    shown = [f"{name} {_shown(leaf, ())}".strip() for name, leaf in zip(names, leaves_of(tree), strict=True)]
    return ", ".join(told + shown)


def picture(parts: Parts, number: int) -> np.ndarray | None:
    """The input of a sample where it is a picture, uint8 [channels, height, width] or [height, width]."""
    shape = tuple(parts.data.input_shape or ())
    if not parts.feed.paired or len(shape) not in (2, 3) or (len(shape) == 3 and shape[0] not in (1, 3)):
        return None
    return pixels(parts.feed.inputs(np.array([number]))[0])


def _shown(leaf: Any, classes: tuple[str, ...]) -> str:
    """One sample's part of a batch of one, in few words."""
    if not isinstance(leaf, torch.Tensor):
        text = " ".join(str(leaf[0] if isinstance(leaf, (list, tuple)) and leaf else leaf).split())
        return repr(text if len(text) <= SHOWN_TEXT else text[:SHOWN_TEXT] + "...")
    value = leaf[0]
    if value.dim() == 0 and not value.is_floating_point() and 0 <= int(value) < len(classes):
        return f"class {classes[int(value)]}"
    if value.numel() > SHOWN_NUMBERS and value.dim() > 1:
        return f"{str(leaf.dtype).removeprefix('torch.')} {list(value.shape)}"
    numbers = " ".join(f"{one:.6g}" for one in value.flatten()[:SHOWN_NUMBERS].tolist())
    return numbers + (" ..." if value.numel() > SHOWN_NUMBERS else "")
