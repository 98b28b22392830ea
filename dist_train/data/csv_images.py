"""Images in a folder, with an annotations CSV of path and label: the layout of PyTorch's tutorial on data sets."""

import csv
import hashlib
import importlib
import math
import os
import re
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dist_train.data.image_files import MODES, ImageFiles, Row
from dist_train.data.order import chosen
from dist_train.data.randomness import kept_apart
from dist_train.data.sets import Data, Samples
from dist_train.errors import ConfigError

MOST_CLASSES = 100_000  # more are a mistake: labels that are years or serial numbers
LABELS = ("auto", "numbers", "names")
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?(nan|inf|infinity)", re.IGNORECASE)
CODE = re.compile(r"0\d+")  # such as a zip code: its zeros count
SHOWN = 60  # characters of a cell in a message


def csv_images(
    root: str,
    download: bool,
    annotations: str = "annotations.csv",
    test_annotations: str | None = None,
    test_fraction: float = 0.1,
    image_dir: str = ".",
    labels: str = "auto",
    mode: str = "UNCHANGED",
    upright: bool = True,
    transform: str | None = None,
    test_transform: str | None = None,
    target_transform: str | None = None,
    mean: tuple[float, ...] = (0.0,),
    std: tuple[float, ...] = (1.0,),
    transforms: Callable | None = None,
    test_transforms: Callable | None = None,
) -> Data:
    """Your own images, listed in a CSV file.

    The CSV has a header line, then a line for each image: its path, a comma, its label. A path that holds a comma
    stands in double quotes. Further columns are allowed, and not read.

    Labels are class numbers, counted from 0, or class names, which are numbered in sorted order; see `labels`.

    Args:
        root: folder that the other paths start from.
        download: not used.
        annotations: the CSV of the training images.
        test_annotations: the CSV of the test images; without it a part of the images of `annotations` is held out.
        test_fraction: the share of images that is held out, the same ones in every run; not with `test_annotations`.
        image_dir: folder that the paths in a CSV start from.
        labels: what the labels are. numbers: class numbers, whole and from 0, where 1.0 and 1e0 are 1. names: any text.
            auto: numbers where all are, names where none is; a mixture is refused with its row. A label with zeros
            before it, such as the zip code 00501, is a name, and so are all of its length.
        mode: how images are decoded: UNCHANGED, GRAY, GRAY_ALPHA, RGB or RGB_ALPHA. All but UNCHANGED take the upper 8
            bits of images with 16. UNCHANGED gives those to `transform` as uint16, for images that use fewer of their
            bits, such as X-rays; floats are taken as they are.
        upright: turn photographs as their EXIF orientation says, as every viewer does; false leaves them as stored.
        transform: applied to a training image, uint8 [channels, height, width]. Written module:attribute, of a function
            or of an object such as a torchvision.transforms.v2.Compose. It gives a tensor: uint8 pixels, or floats.
            What it draws at random depends on train.seed, the epoch and the image.
        test_transform: applied to a test image; without it `transform` is.
        target_transform: module:attribute, applied to a class number. It gives another, or a vector of floats:
            the probabilities of the classes.
        mean: subtracted from pixels in [0, 1] (data.normalize): a number per channel, or one for all.
        std: what they are then divided by, likewise.
        transforms: data.transforms, applied after `transform`.
        test_transforms: data.test_transforms, likewise.

    Raises:
        ConfigError: a CSV that cannot be read, or an image that cannot, named with its line.
    """
    base = Path(root)
    folder = base / image_dir
    for key, value, valid in (
        ("mode", mode, tuple(MODES)),
        ("labels", labels, LABELS),
        ("upright", upright, (True, False)),
    ):
        if value not in valid:
            raise ConfigError(f"data.args.{key}: got {value!r}, expected one of {', '.join(map(str, valid))}")
    rows = _read(base / annotations, folder, "annotations")
    if test_annotations is not None:
        test_rows = _read(base / test_annotations, folder, "test_annotations")
    else:
        rows, test_rows = held_out(rows, test_fraction, "give data.args.test_annotations")
    names, number = _classes([*rows, *test_rows], labels)
    if test_annotations is not None:
        _warn_of_unseen(rows, test_rows, number)
    own = _callable(transform, "transform")
    image = _both(own, transforms)
    test_image = _both(_callable(test_transform, "test_transform") or own, test_transforms)
    target = _callable(target_transform, "target_transform")

    def files(some: list[Row], image: Callable | None, shape: tuple[int, ...] | None) -> ImageFiles:
        return ImageFiles(some, folder, mode, upright, image, target, number, shape)

    with kept_apart():  # transforms may draw
        shape = tuple(files(rows[:1], image, None)[0][0].shape)
        classes = _targets(names, target)
    train, test = files(rows, image, shape), files(test_rows, test_image, shape)
    return Data(
        Samples(train, identity(rows), draws=bool(image or target), describe=train.path),
        Samples(test, identity(test_rows), draws=bool(test_image or target), describe=test.path),
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
    for number, line in lines:
        if len(line) < 2 or len(line) != len(header) or not line[0].strip() or not line[1].strip():
            raise ConfigError(
                f"{path} line {number}: got {_shown(','.join(line))}, expected an image path, a comma and a label, and "
                f"as many columns as the header; a path that holds a comma stands in double quotes"
            )
        if "\0" in line[0] + line[1]:
            raise ConfigError(
                f"{path} line {number}: got {_shown(','.join(line))} with a NUL character, expected text; save the "
                f"file as UTF-8"
            )
    if _is_file(folder / header[0]):
        raise ConfigError(
            f"{path} line 1: got the image {header[0]}, expected a header line such as file,label above it"
        )
    return [Row(f"{path} line {number}", line[0], line[1].strip()) for number, line in lines[1:]]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that no file can have
        return False


def _shown(text: str) -> str:
    """A cell or a line of the file as messages quote it."""
    text = text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
    return text if NUMBER.fullmatch(text) else repr(text)


def identity(rows: list[Row]) -> str:
    """Changes with the images' names, their order and their labels. Their pixels are not read for it."""
    return hashlib.sha256("\0".join(f"{row.path}\0{row.label}" for row in rows).encode()).hexdigest()


def held_out(rows: list[Row], fraction: float, other: str) -> tuple[list[Row], list[Row]]:
    """The rows to train on, and those held out; all rows of one image are on the same side. Raises ConfigError.

    Args:
        rows: of all images.
        fraction: data.args.test_fraction.
        other: what may be done instead, for a message.
    """
    images = list(dict.fromkeys(os.path.normpath(row.path) for row in rows))
    if not 0 < fraction < 1 or len(images) < 2:
        raise ConfigError(
            f"data.args.test_fraction: got {fraction} of {len(images)} images, expected above 0 and below 1 of "
            f"at least 2 images; or {other}"
        )
    count = min(max(1, round(fraction * len(images))), len(images) - 1)
    drawn = chosen(len(images), count)
    held = {images[i] for i in drawn}
    sides: tuple[list[Row], list[Row]] = [], []
    for row in rows:
        sides[os.path.normpath(row.path) in held].append(row)
    return sides


def _classes(rows: list[Row], kind: str) -> tuple[tuple[str, ...], dict[str, int]]:
    """Class names by number, and the number of each label. Raises ConfigError."""
    first = _first(rows)
    if kind == "auto":
        kind = _kind(first)
    if kind == "names":
        names = tuple(sorted(first))
        return names, {name: i for i, name in enumerate(names)}
    number = {}
    for label, row in first.items():
        value = float(label) if NUMBER.fullmatch(label) else math.nan
        if not (0 <= value < MOST_CLASSES and value == int(value)):
            raise ConfigError(
                f"{row.source}: got label {_shown(label)}, expected a class number from 0 to {MOST_CLASSES - 1}; mend "
                f"the line or take it out, or, where labels are names, --data.args.labels names"
            )
        number[label] = int(value)
    count, used = max(number.values()) + 1, len(set(number.values()))
    if used < count / 2:
        largest = next(row for label, row in first.items() if number[label] == count - 1)
        warnings.warn(
            f"{largest.source}: label {largest.label} makes {count:,} classes, of which {used:,} have images; to have "
            f"the labels numbered, write --data.args.labels names",
            stacklevel=2,
        )
    return tuple(map(str, range(count))), number


def _first(rows: list[Row]) -> dict[str, Row]:
    """The first row of each label, in the order of the rows."""
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(row.label, row)
    return first


def _kind(first: dict[str, Row]) -> str:
    """Whether labels are numbers or names: what all of them are. Raises ConfigError, with a row, for a mixture."""
    codes = {label for label in first if CODE.fullmatch(label)}
    if codes and len({len(label) for label in first}) == 1 and all(label.isdecimal() for label in first):
        return "names"
    numbers = {label for label in first if NUMBER.fullmatch(label)} - codes
    others = first.keys() - numbers
    if not others:
        return "numbers"
    if not numbers:
        return "names"
    stranger = next(label for label in first if (label in others) == (len(others) <= len(numbers)))
    got, expected = ("a name", "a number") if stranger in others else ("a number", "a name")
    why = ", for the zeros before it" if stranger in codes else ""
    raise ConfigError(
        f"{first[stranger].source}: got label {_shown(stranger)}, {got}{why}, expected {expected} as other labels are; "
        f"mend the line or take it out, or write --data.args.labels names, or numbers, for all"
    )


def _warn_of_unseen(rows: list[Row], test_rows: list[Row], number: dict[str, int]) -> None:
    """A class that is tested and never trained on is a typing mistake, more often than not."""
    seen = {number[row.label] for row in rows}
    unseen = [row for label, row in _first(test_rows).items() if number[label] not in seen]
    if unseen:
        more = f" (nor {len(unseen) - 1} others)" if len(unseen) > 1 else ""
        warnings.warn(
            f"{unseen[0].source}: no training image has label {_shown(unseen[0].label)}{more}; it cannot be learned",
            stacklevel=2,
        )


def _targets(names: tuple[str, ...], transform: Callable | None) -> tuple[str, ...]:
    """The class names after the target transform: as many as its vectors are long, or as its numbers go."""
    if transform is None:
        return names
    given = [torch.as_tensor(transform(i)) for i in range(len(names))]
    count = max(len(target) if target.dim() else int(target) + 1 for target in given)
    return names if count == len(names) else tuple(map(str, range(count)))


def _both(first: Callable | None, second: Callable | None) -> Callable | None:
    return partial(_after, first, second) if first and second else first or second


def _after(first: Callable, second: Callable, image: torch.Tensor) -> Any:
    return second(first(image))


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
