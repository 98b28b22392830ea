"""What `task.metrics` says: names, and mappings with a name and arguments. Pure, and before torch is imported."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from dist_train.config.values import unknown
from dist_train.errors import ConfigError
from dist_train.tasks import METRICS

PATH = "task.metrics"
TOP_K = "top_k_accuracy"
EXAMPLE = "a name such as accuracy, or {name: NAME, ARGUMENT: VALUE}"


@dataclass(frozen=True)
class Item:
    """One metric of the list."""

    name: str
    """Of its results, `eval/NAME`."""
    row: str
    """A name of the table, or module:Class."""
    arguments: Mapping[str, Any]
    """Of the class's constructor."""

    @property
    def is_torchmetrics(self) -> bool:
        """Whether it is a class of torchmetrics."""
        return self.row.partition(":")[0].partition(".")[0] == "torchmetrics"

    @property
    def is_own(self) -> bool:
        """Whether it is the user's own class."""
        return ":" in self.row and not self.is_torchmetrics


def problems(items: Sequence[Any], kind: str | None) -> Iterator[str]:
    """A line for every mistake that can be seen without importing what is named.

    Args:
        items: the list in the config.
        kind: the kind of task, a key of METRICS; None for a task whose outputs are of another kind.
    """
    names: list[str] = []
    for given in items:
        try:
            item = _item(given, kind)
        except ConfigError as error:
            yield from error.lines
            continue
        if item.name in names:
            yield f"{PATH}: got two metrics {item.name}, expected one; name one of them with {{name: ..., as: OTHER}}"
        names.append(item.name)
        if item.is_torchmetrics and find_spec("torchmetrics") is None:
            yield (
                f"{PATH}: got {item.row}, but torchmetrics is not installed; pip install 'dist-train[metrics]', or "
                f"take one of {', '.join(METRICS.get(kind, ())) or 'your own, as module:Class'}"
            )


def parsed(items: Sequence[Any], kind: str | None) -> list[Item]:
    """The list as `problems` has it. Raises ConfigError with all of its lines."""
    lines = list(problems(items, kind))
    if lines:
        raise ConfigError(*lines)
    return [_item(given, kind) for given in items]


def _item(given: Any, kind: str | None) -> Item:
    whole = dict(given) if isinstance(given, dict) else {"name": given}
    row, name = whole.pop("name", None), whole.pop("as", None)
    if not isinstance(row, str) or not all(isinstance(key, str) for key in whole):
        raise ConfigError(f"{PATH}: got {given!r}, expected {EXAMPLE}")
    name = name if name is not None else row.rpartition(":")[2]
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name) or name == "loss":
        raise ConfigError(f"{PATH}: got {name!r} as the name of {row}, expected letters and digits, and not loss")
    if ":" in row:
        return Item(name, row, whole)
    table = METRICS.get(kind, {})
    top = re.fullmatch(r"top_([1-9][0-9]*)_accuracy", row)
    if TOP_K in table and (top or row == TOP_K):
        if not top or "k" in whole:
            raise ConfigError(f"{PATH}: got {given!r}, expected the number in the name, such as top_5_accuracy")
        return Item(name, TOP_K, {**whole, "k": int(top[1])})
    if row not in table:
        raise ConfigError(_unknown(row, kind))
    return Item(name, row, whole)


def _unknown(row: str, kind: str | None) -> str:
    table = METRICS.get(kind, {})
    line = unknown(PATH, row, [*table, "torchmetrics:Class", "or your own as module:Class"], "metric", near=[*table])
    others = [other for other, rows in METRICS.items() if row in rows and other != kind]
    return f"{line}; {row} is of the tasks {', '.join(others)}" if others else line
