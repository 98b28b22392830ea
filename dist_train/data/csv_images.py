"""Images in a folder, with an annotations CSV of path and label: the layout of PyTorch's tutorial on data sets."""

import csv
import hashlib
import importlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from dist_train.data.image_files import MODES, ImageFiles, Row
from dist_train.data.randomness import kept_apart
from dist_train.data.sets import Data, FromFiles
from dist_train.errors import ConfigError

MOST_CLASSES = 100_000  # more are a mistake: labels that are years or serial numbers


def csv_images(
    root: str,
    download: bool,
    annotations: str = "annotations.csv",
    test_annotations: str | None = None,
    test_fraction: float = 0.1,
    image_dir: str = ".",
    mode: str = "UNCHANGED",
    transform: str | None = None,
    test_transform: str | None = None,
    target_transform: str | None = None,
    mean: tuple[float, ...] = (0.0,),
    std: tuple[float, ...] = (1.0,),
) -> Data:
    """Your own images, listed in a CSV file.

    The CSV has a header line, then a line for each image: its path, a comma, its label. A path that holds a comma
    stands in double quotes. Further columns are allowed, and not read.

    Where every label is a whole number, labels are class numbers, counted from 0. Otherwise they are class names, and
    are numbered in sorted order.

    Args:
        root: folder that the other paths start from.
        download: not used.
        annotations: the CSV of the training images.
        test_annotations: the CSV of the test images; without it a part of the images of `annotations` is held out.
        test_fraction: the share of images that is held out, the same ones in every run; not with `test_annotations`.
        image_dir: folder that the paths in a CSV start from.
        mode: how images are decoded: UNCHANGED, GRAY, GRAY_ALPHA, RGB or RGB_ALPHA.
        transform: applied to a training image, uint8 [channels, height, width]. Written module:attribute, of a function
            or of an object such as a torchvision.transforms.v2.Compose. It gives a tensor: uint8 pixels, or floats.
            What it draws at random depends on train.seed, the epoch and the image.
        test_transform: applied to a test image; without it `transform` is.
        target_transform: module:attribute, applied to a class number. It gives another, or a vector of floats:
            the probabilities of the classes.
        mean: subtracted from pixels in [0, 1] (data.normalize): a number per channel, or one for all.
        std: what they are then divided by, likewise.

    Raises:
        ConfigError: a CSV that cannot be read, or an image that cannot, named with its line.
    """
    base = Path(root)
    folder = base / image_dir
    if mode not in MODES:
        raise ConfigError(f"data.args.mode: got {mode!r}, expected one of {', '.join(MODES)}")
    rows = _read(base / annotations, folder, "annotations")
    if test_annotations is not None:
        test_rows = _read(base / test_annotations, folder, "test_annotations")
    else:
        rows, test_rows = _held_out(rows, test_fraction)
    names, number = _classes([*rows, *test_rows])
    image = _callable(transform, "transform")
    test_image = _callable(test_transform, "test_transform") or image
    target = _callable(target_transform, "target_transform")

    def files(some: list[Row], image: Callable | None, shape: tuple[int, ...] | None) -> ImageFiles:
        return ImageFiles(some, folder, mode, image, target, number, shape)

    with kept_apart():  # transforms may draw
        shape = tuple(files(rows[:1], image, None)[0][0].shape)
        classes = _targets(names, target)
    return Data(
        FromFiles(files(rows, image, shape), _identity(rows), draws=bool(image or target)),
        FromFiles(files(test_rows, test_image, shape), _identity(test_rows), draws=bool(test_image or target)),
        input_shape=shape,
        classes=classes,
        mean=tuple(mean),
        std=tuple(std),
    )


def _read(path: Path, folder: Path, key: str) -> list[Row]:
    """The rows of an annotations file. Raises ConfigError."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # a spreadsheet's file starts with a mark
            reader = csv.reader(file, strict=True)
            lines = [(reader.line_num, line) for line in reader if line]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(
            f"data.args.{key}: got {path}, expected an annotations CSV that can be read: {error}"
        ) from None
    if len(lines) < 2:
        raise ConfigError(
            f"data.args.{key}: got {path} without rows, expected a header line and lines of path and label"
        )
    header = lines[0][1]
    if (folder / header[0]).is_file():
        raise ConfigError(
            f"{path} line 1: got the image {header[0]}, expected a header line such as file,label above it"
        )
    for number, line in lines:
        if len(line) < 2 or len(line) != len(header) or not line[0].strip() or not line[1].strip():
            raise ConfigError(
                f"{path} line {number}: got {','.join(line)!r}, expected an image path, a comma and a label, and as "
                f"many columns as the header; a path that holds a comma stands in double quotes"
            )
    return [Row(f"{path} line {number}", line[0], line[1].strip()) for number, line in lines[1:]]


def _identity(rows: list[Row]) -> str:
    """Changes with the images' names, their order and their labels. Their pixels are not read for it."""
    return hashlib.sha256("\0".join(f"{row.path}\0{row.label}" for row in rows).encode()).hexdigest()


def _held_out(rows: list[Row], fraction: float) -> tuple[list[Row], list[Row]]:
    """The rows to train on, and those held out; all rows of one image are on the same side. Raises ConfigError."""
    images = list(dict.fromkeys(os.path.normpath(row.path) for row in rows))
    if not 0 < fraction < 1 or len(images) < 2:
        raise ConfigError(
            f"data.args.test_fraction: got {fraction} of {len(images)} images, expected above 0 and below 1 of "
            f"at least 2 images; or give data.args.test_annotations"
        )
    count = min(max(1, round(fraction * len(images))), len(images) - 1)
    # Drawn, because every n-th of a list that goes round its classes would be all of one class.
    drawn = np.random.Generator(np.random.Philox(0)).permutation(len(images))[:count]
    held = {images[i] for i in drawn}
    sides: tuple[list[Row], list[Row]] = [], []
    for row in rows:
        sides[os.path.normpath(row.path) in held].append(row)
    return sides


def _classes(rows: list[Row]) -> tuple[tuple[str, ...], dict[str, int]]:
    """Class names by number, and the number of each label."""
    labels = {row.label for row in rows}
    if not all(label.isdecimal() for label in labels):
        names = tuple(sorted(labels))
        return names, {name: i for i, name in enumerate(names)}
    number = {label: int(label) for label in labels}
    largest = max(rows, key=lambda row: number[row.label])
    if number[largest.label] >= MOST_CLASSES:
        raise ConfigError(
            f"{largest.source}: got label {largest.label}, expected a class number from 0 to {MOST_CLASSES - 1}; "
            f"write names to have the labels numbered"
        )
    return tuple(map(str, range(number[largest.label] + 1))), number


def _targets(names: tuple[str, ...], transform: Callable | None) -> tuple[str, ...]:
    """The class names after the target transform: as many as its vectors are long, or as its numbers go."""
    if transform is None:
        return names
    given = [torch.as_tensor(transform(i)) for i in range(len(names))]
    count = max(len(target) if target.dim() else int(target) + 1 for target in given)
    return names if count == len(names) else tuple(map(str, range(count)))


def _callable(reference: str | None, key: str) -> Callable | None:
    if reference is None:
        return None
    module, _, attribute = reference.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"data.args.{key}: got {reference!r}, expected module:attribute of a callable: {error}"
        ) from None
    if not callable(found):
        raise ConfigError(
            f"data.args.{key}: got {reference!r}, which is no callable; expected a function or a transform"
        )
    return found
