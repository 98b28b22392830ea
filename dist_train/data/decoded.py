"""A data set that was decoded, in one file beside its source: written once, mapped by every rank of a node.

The file: JSON, filled up with spaces to HEAD_BYTES; then the images and the labels of the training split, and those of
the test split, all uint8.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch

from dist_train.data.sets import Columns, InMemory
from dist_train.whole import whole

FORMAT = 1
HEAD_BYTES = 4096

Splits = tuple[Columns, Columns]


def write(path: Path, sources: Mapping[str, str], splits: Splits, classes: tuple[str, ...]) -> None:
    """Makes the file, whole or not at all.

    Args:
        path: of the file.
        sources: the files that the splits were decoded from, with their checksums.
        splits: for training and testing, with fewer than 256 classes.
        classes: names by class number.

    Raises:
        OSError: it cannot be written.
    """
    shapes = [list(split.tree[0].shape) for split in splits]
    head = {"format": FORMAT, "sources": dict(sources), "shapes": shapes, "classes": list(classes)}
    line = json.dumps(head).encode().ljust(HEAD_BYTES)
    assert len(line) == HEAD_BYTES
    with whole(path) as beside, beside.open("wb") as file:
        file.write(line)
        for split in splits:
            images, labels = split.tree
            file.write(images.contiguous().numpy())
            file.write(labels.to(torch.uint8).numpy())
        file.flush()
        os.fsync(file.fileno())  # or a power cut could leave a file of the right length without its pixels


def read(path: Path, sources: Mapping[str, str]) -> tuple[Splits, tuple[str, ...]]:
    """The splits, with images that are mapped as those of `idx.mapped` are, and the class names.

    Args:
        path: of the file.
        sources: what it must have been decoded from.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it was decoded from something else, is cut off, or is no such file.
    """
    with path.open("rb") as file:
        head = json.loads(file.read(HEAD_BYTES))
        size = os.fstat(file.fileno()).st_size
    if not isinstance(head, dict) or head.get("format") != FORMAT or head.get("sources") != dict(sources):
        raise ValueError(f"{path}: got one of another source or format, expected one decoded from {dict(sources)}")
    expected = HEAD_BYTES + sum(math.prod(shape) + shape[0] for shape in head["shapes"])
    if size != expected:
        raise ValueError(f"{path}: got {size} bytes, expected {expected}")
    body = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)[HEAD_BYTES:]
    splits = []
    for shape in head["shapes"]:
        images, labels, body = body.split([math.prod(shape), shape[0], len(body) - math.prod(shape) - shape[0]])
        splits.append(InMemory(images.view(shape), labels.to(torch.int64)))
    train, test = splits
    return (train, test), tuple(head["classes"])
