"""What a run's last evaluation left of single samples, and the panels of the user's own: read, and held to its form."""

import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from dist_train.tasks import panels as own

Left = TypeVar("Left")


@dataclass(frozen=True)
class Wrong:
    """A test sample that the model gets wrong, or right at a high loss.

    Args:
        index: in the test split.
        true: class number.
        predicted: class number.
        loss: of this sample.
        confidence: probability that the model gives its prediction.
        image: uint8, of the data set's input_shape.
    """

    index: int
    true: int
    predicted: int
    loss: float
    confidence: float
    image: np.ndarray


@dataclass(frozen=True)
class Classes:
    """A classifier on the test split.

    Args:
        classes: names by number.
        confusion: [true, predicted] counts; None above 1,000 classes.
        worst: samples with the largest loss, largest first.
    """

    classes: list[str]
    confusion: np.ndarray | None
    worst: list[Wrong]


@dataclass(frozen=True)
class Predictions:
    """A regression on the test split.

    Args:
        outputs: numbers of a sample; the arrays may have fewer of them, the first ones.
        index: of samples drawn from the split, int64 [samples].
        true: float64 [samples, numbers].
        predicted: likewise.
        worst_index: of the samples with the largest loss, largest first, int64 [worst].
        worst_loss: float64 [worst].
        worst_true: float64 [worst, numbers].
        worst_predicted: likewise.
    """

    outputs: int
    index: np.ndarray
    true: np.ndarray
    predicted: np.ndarray
    worst_index: np.ndarray
    worst_loss: np.ndarray
    worst_true: np.ndarray
    worst_predicted: np.ndarray


@dataclass(frozen=True)
class Masked:
    """A test sample whose mask the model gets wrong.

    Args:
        index: in the test split.
        loss: mean over its pixels that count.
        right: the share of them that are right.
        true: class numbers, int16 [height, width]; below 0 where a pixel does not count.
        predicted: class numbers likewise.
        image: uint8; None where samples are no pairs.
    """

    index: int
    loss: float
    right: float
    true: np.ndarray
    predicted: np.ndarray
    image: np.ndarray | None


@dataclass(frozen=True)
class Masks:
    """A segmentation on the test split.

    Args:
        classes: names by number.
        worst: samples with the largest loss, largest first.
    """

    classes: list[str]
    worst: list[Masked]


@dataclass(frozen=True)
class Evaluated:
    """What there is; None of what there is not.

    Args:
        classes: of a classification.
        predictions: of a regression.
        masks: of a segmentation.
        panels: of the user's own.
    """

    classes: Classes | None = None
    predictions: Predictions | None = None
    masks: Masks | None = None
    panels: list[own.Panel] = field(default_factory=list)


def read(folder: Path, problems: list[str]) -> Evaluated:
    """What lies in a run's folder. What cannot be read is put into `problems`, a line each."""
    try:
        shown = own.read(folder)
    except (OSError, ValueError) as error:
        problems.append(f"{own.NAME} cannot be read: {error}")
        shown = []
    return Evaluated(
        _read(folder / "evaluation.npz", _classes, problems),
        _read(folder / "predictions.npz", _predictions, problems),
        _read(folder / "masks.npz", _masks, problems),
        shown,
    )


def _read(path: Path, parse: Callable[[Mapping[str, Any]], Left], problems: list[str]) -> Left | None:
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            return parse(file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, IndexError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        problems.append(f"{path.name} cannot be read: {error}")
        return None


def _classes(file: Mapping[str, Any]) -> Classes:
    classes = [str(name) for name in file["classes"]]
    confusion = file.get("confusion")
    if confusion is not None and confusion.shape != (len(classes), len(classes)):
        raise ValueError("confusion does not fit the classes")
    keys = ("index", "true", "predicted", "loss", "confidence", "images")
    rows = zip(*(file[f"worst_{key}"] for key in keys), strict=True)
    worst = [Wrong(int(i), int(t), int(p), float(x), float(c), image) for i, t, p, x, c, image in rows]
    if not all(0 <= number < len(classes) for wrong in worst for number in (wrong.true, wrong.predicted)):
        raise ValueError("a class without a name")
    return Classes(classes, confusion, worst)


def _predictions(file: Mapping[str, Any]) -> Predictions:
    names = ("index", "true", "predicted", "worst_index", "worst_loss", "worst_true", "worst_predicted")
    index, true, predicted, worst_index, worst_loss, worst_true, worst_predicted = arrays = [file[n] for n in names]
    pairs = (index, true, predicted), (worst_index, worst_true, worst_predicted)
    for numbers, one, other in pairs:
        if one.ndim != 2 or one.shape != other.shape or numbers.shape != one.shape[:1]:
            raise ValueError("true and predicted do not fit each other")
    if worst_loss.shape != worst_index.shape or worst_true.shape[1:] != true.shape[1:]:
        raise ValueError("the worst do not fit the others")
    return Predictions(int(file["outputs"]), *arrays)


def _masks(file: Mapping[str, Any]) -> Masks:
    classes = [str(name) for name in file["classes"]]
    worst = []
    rows = zip(*(file[key] for key in ("index", "loss", "right", "true", "predicted")), strict=True)
    for i, (index, loss, right, true, predicted) in enumerate(rows):
        there = true > OUTSIDE
        height, width = int(there.any(1).sum()), int(there.any(0).sum())
        both = true[:height, :width], predicted[:height, :width]
        if max(int(one.max(initial=0)) for one in both) >= len(classes):
            raise ValueError("a class without a name")
        image = file.get(f"image_{i}")
        worst.append(Masked(int(index), float(loss), float(right), *both, image))
    return Masks(classes, worst)


OUTSIDE = -2  # of a mask that is smaller than the array
