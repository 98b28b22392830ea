"""Metrics as people read them, and which way they get better. No torch."""

import math
from collections.abc import Iterable

# Words in the names of metrics that are shares of 1.
SHARES = ("accuracy", "precision", "recall", "f1", "iou", "dice", "match")


def is_share(name: str, values: Iterable[float]) -> bool:
    """Whether a metric is a share of 1, by its name and its values: those that are not finite say nothing."""
    named = any(word in name.lower() for word in SHARES)
    return named and all(0 <= value <= 1 for value in values if math.isfinite(value))


def spoken(name: str, value: float) -> str:
    """A metric for people: `accuracy 97.49%`, `loss 0.0812`."""
    return f"{name} {value:.2%}" if is_share(name, [value]) else f"{name} {value:.4f}"


def parts_of(metric: str, splits: Iterable[str]) -> tuple[str, str]:
    """The test split and the name of `eval/NAME` or `eval/SPLIT/NAME`; the split is empty where it has no name."""
    name = metric.removeprefix("eval/")
    split, _, rest = name.partition("/")
    return (split, rest) if rest and split in splits else ("", name)


def lower_is_better(name: str, lower: Iterable[str]) -> bool:
    """Of a metric, or of one of its numbers, such as `mae/0`."""
    return name in lower or name.partition("/")[0] in lower
