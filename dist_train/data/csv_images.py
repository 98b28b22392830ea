"""Images in a folder, with an annotations CSV of path and label: the layout of PyTorch's tutorial on data sets."""

import csv
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from torchvision.io import ImageReadMode, decode_image

from dist_train.data.sets import Data, FromFiles
from dist_train.errors import ConfigError

Row = tuple[str, int, str, Any]  # the CSV, the number of the line in it, the image's path, the label


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
    """A data set of image files.

    Labels that are all whole numbers are class numbers from 0; other labels are class names, numbered in sorted order.

    Args:
        root: folder that the other paths start from.
        download: not used: these are your own files.
        annotations: a CSV: a header line, then lines of image path and label.
        test_annotations: the same for the test split; without it every so many lines of `annotations` are held out.
        test_fraction: the share of lines held out where there is no `test_annotations`.
        image_dir: folder that the image paths start from.
        mode: how images are decoded, a name of torchvision.io.ImageReadMode: UNCHANGED, GRAY, RGB, ...
        transform: of a training image, module:attribute of a callable (a torchvision.transforms.v2 object, for one)
            from uint8 [channels, height, width] to a tensor. Random ones are seeded by seed, epoch and sample.
        test_transform: of a test image; without it `transform`.
        target_transform: of a label, from class number to class number.
        mean: of the pixels in [0, 1], a number per channel.
        std: their standard deviation.
    """
    base = Path(root)
    if mode not in ImageReadMode.__members__:
        raise ConfigError(f"data.args.mode: got {mode!r}, expected one of {', '.join(ImageReadMode.__members__)}")
    rows = _read(base / annotations, "annotations")
    if test_annotations is not None:
        test_rows = _read(base / test_annotations, "test_annotations")
    else:
        if not 0 < test_fraction < 1 or len(rows) < 2:
            raise ConfigError(
                f"data.args.test_fraction: got {test_fraction} of {len(rows)} rows, expected above 0 and below 1 of "
                f"at least 2 rows; or give data.args.test_annotations"
            )
        every = max(2, round(1 / test_fraction))
        test_rows = rows[every - 1 :: every] or rows[-1:]
        held_out = {row[1] for row in test_rows}
        rows = [row for row in rows if row[1] not in held_out]
    classes, number = _classes([*rows, *test_rows])
    image = _callable(transform, "transform")
    test_image = _callable(test_transform, "test_transform") or image
    target = _callable(target_transform, "target_transform")
    folder = base / image_dir
    shape = tuple(ImageFiles(rows[:1], folder, mode, image, target, number, None)[0][0].shape)
    return Data(
        FromFiles(ImageFiles(rows, folder, mode, image, target, number, shape)),
        FromFiles(ImageFiles(test_rows, folder, mode, test_image, target, number, shape)),
        input_shape=shape,
        classes=classes,
        mean=tuple(mean),
        std=tuple(std),
    )


class ImageFiles(Dataset[tuple[torch.Tensor, int]]):
    """A map-style data set of the rows of an annotations file: item i is (image, class number)."""

    def __init__(
        self,
        rows: list[Row],
        folder: Path,
        mode: str,
        transform: Callable | None,
        target_transform: Callable | None,
        number: dict[str, int],
        shape: tuple[int, ...] | None,
    ):
        self.rows, self.folder, self.mode = rows, folder, ImageReadMode[mode]
        self.transform, self.target_transform, self.number, self.shape = transform, target_transform, number, shape

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        file, line, path, label = self.rows[index]
        try:
            image = decode_image(str(self.folder / path), self.mode)
        except (RuntimeError, OSError, ValueError) as error:
            reason = "no such file" if not (self.folder / path).exists() else str(error).splitlines()[0]
            raise ConfigError(
                f"{file} line {line}: got {self.folder / path}, expected an image that can be decoded: {reason}; "
                f"mend the file or take the line out"
            ) from error
        if self.transform:
            image = self.transform(image)
        if self.shape is not None and tuple(image.shape) != self.shape:
            raise ConfigError(
                f"{file} line {line}: got {self.folder / path} of shape {tuple(image.shape)}, expected {self.shape} as "
                f"the first image has; resize it, or set data.args.transform or data.args.mode"
            )
        target = self.number[label]
        return image, self.target_transform(target) if self.target_transform else target


def _read(path: Path, key: str) -> list[Row]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = [(i, line) for i, line in enumerate(csv.reader(file), start=1) if line]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(
            f"data.args.{key}: got {path}, expected an annotations CSV that can be read: {error}"
        ) from None
    for i, line in lines:
        if len(line) < 2:
            raise ConfigError(f"{path} line {i}: got {','.join(line)!r}, expected an image path, a comma and a label")
    if len(lines) < 2:
        raise ConfigError(
            f"data.args.{key}: got {path} without rows, expected a header line and lines of path and label"
        )
    return [(str(path), i, line[0], line[1].strip()) for i, line in lines[1:]]


def _classes(rows: list[Row]) -> tuple[tuple[str, ...], dict[str, int]]:
    labels = {row[3] for row in rows}
    if all(label.isdecimal() for label in labels):
        count = max(map(int, labels)) + 1
        return tuple(map(str, range(count))), {label: int(label) for label in labels}
    names = tuple(sorted(labels))
    return names, {name: i for i, name in enumerate(names)}


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
