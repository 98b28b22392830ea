"""The figures of a run that people ask for first, and where runs differ."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from dist_train.report.read import Run
from dist_train.report.text import duration, figure, number

ABSENT = "–"
# Key, label, what a run has, and which of several is the best.
_RowOf = tuple[str, str, Callable[["Run"], "Cell"], Callable[[list[float]], float] | None]


@dataclass(frozen=True)
class Cell:
    """A figure of a run.

    Args:
        text: for people.
        value: to compare by; None where there is nothing to compare.
        detail: more about it.
        best: the best of several runs.
    """

    text: str
    value: float | None = None
    detail: str = ""
    best: bool = False


@dataclass(frozen=True)
class Row:
    """A figure of every run.

    Args:
        key: of the row.
        label: for people.
        cells: by run.
    """

    key: str
    label: str
    cells: list[Cell]


def rows(runs: list[Run]) -> list[Row]:
    """The summary table. What no run has is left out; the best of several is marked."""
    found = []
    for key, label, cell_of, better in [*_ROWS[:WHERE], *_of_metrics(runs), *_of_units(runs), *_ROWS[WHERE:]]:
        cells = [cell_of(run) for run in runs]
        if all(cell.text == ABSENT for cell in cells):
            continue
        values = [cell.value for cell in cells if cell.value is not None and math.isfinite(cell.value)]
        if better and len(values) > 1 and len(set(values)) > 1:
            best = better(values)
            cells = [replace(cell, best=cell.value == best) for cell in cells]
        found.append(Row(key, label, cells))
    return found


def shown(value: Any) -> str:
    """A value of a config as text."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def config_rows(runs: list[Run]) -> list[Row]:
    """Every key of the configs, with its value in each run."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    return [
        Row(key, key, [Cell(shown(run.config[key]) if key in run.config else ABSENT) for run in runs]) for key in keys
    ]


def differing(table: list[Row]) -> list[Row]:
    """The rows in which the runs differ."""
    return [row for row in table if len({cell.text for cell in row.cells}) > 1]


def environment_rows(runs: list[Run]) -> list[Row]:
    """What the runs were computed with and where."""
    keys = dict.fromkeys(key for run in runs for key in run.environment)
    return [Row(key, key, [Cell(run.environment.get(key, ABSENT)) for run in runs]) for key in keys]


def _cell(value: Any, text: Callable[[float], str] = number) -> Cell:
    if not isinstance(value, int | float):
        return Cell(ABSENT)
    return Cell(text(value), float(value))


def _best(run: Run, metric: str) -> Cell:
    found = run.series[metric].best(not run.lowest(metric)) if metric in run.series else None
    return Cell(figure(metric, found[0]), found[0], f"at step {found[1]:,}") if found else Cell(ABSENT)


def _last(run: Run, metric: str, text: Callable[[float], str] = number) -> Cell:
    return _cell(run.series[metric].last(), text) if metric in run.series else Cell(ABSENT)


def _steps(run: Run) -> Cell:
    of = f"of {run.total_steps:,}" if run.total_steps is not None and run.total_steps != run.steps else ""
    return Cell(f"{run.steps:,}", run.steps, of)


def _seconds(run: Run) -> Cell:
    last = [series.time_s[-1] for series in run.series.values()]
    return _cell(run.summary.get("train_s", float(np.max(last)) if last else None), duration)


def _rate(run: Run, unit: str = "samples") -> Cell:
    name = f"{unit}_per_s"
    rate = run.summary.get(name)
    if rate is None and f"train/{name}" in run.series:
        rate = float(np.median(run.series[f"train/{name}"].value))
    return _cell(rate)


def _of_units(runs: list[Run]) -> list[_RowOf]:
    """How many of what the tasks count, where these are no samples."""
    units = [unit for unit in dict.fromkeys(run.unit for run in runs) if unit not in ("", "samples")]
    return [(f"{unit}_per_s", f"{unit.capitalize()}/s", partial(_rate, unit=unit), max) for unit in units]


def _step_ms(run: Run) -> Cell:
    times = run.summary.get("step_ms")
    if not isinstance(times, dict) or not {"p50", "p95"} <= times.keys():
        return Cell(ABSENT)
    return Cell(f"{number(times['p50'])} ms", times["p50"], f"95% below {number(times['p95'])} ms")


def _saves(run: Run) -> Cell:
    stalls = run.series.get("checkpoint/stall_s")
    if stalls is None:
        return Cell(ABSENT)
    waited = f"training waited {duration(float(np.median(stalls.value)))} for each"
    return Cell(f"{len(stalls.value):,}", len(stalls.value), waited)


def _restarts(run: Run) -> Cell:
    count = sum(event.kind == "resume" for event in run.events)
    return Cell(str(count), count) if count else Cell(ABSENT)


def _not_finite(run: Run) -> Cell:
    count = sum(int((~np.isfinite(series.value)).sum()) for name, series in run.series.items() if name in _WATCHED)
    return Cell(f"{count:,}", count) if count else Cell(ABSENT)


def key_of(metric: str) -> str:
    """The key of the row that has the last value of a metric of evaluations."""
    name = metric.removeprefix("eval/")
    return "eval_loss" if name == "loss" else name


def headlines(run: Run) -> list[str]:
    """The keys of the rows that stand in the card of a run: the best of what the best is decided by, and the loss."""
    first = run.metrics[:1]
    losses = [metric for metric in run.metrics if run.parts_of(metric) == (run.parts_of(first[0])[0], "loss")]
    keys = [*(f"best_{key_of(metric)}" for metric in first), *map(key_of, losses[:1] or first)]
    return [*keys, "steps", "train_s", f"{run.unit or 'samples'}_per_s"]


def _of_metrics(runs: list[Run]) -> list[_RowOf]:
    """The best and the last value of each metric of evaluations."""
    found: list[_RowOf] = []
    for metric in dict.fromkeys(metric for run in runs for metric in run.metrics):
        run = next(run for run in runs if metric in run.series)
        split, name = run.parts_of(metric)
        name = "evaluation loss" if name == "loss" else name.replace("_", " ")
        label = f"{name} of {split}" if split else name
        better = min if run.lowest(metric) else max
        text = partial(figure, metric)
        found.append((f"best_{key_of(metric)}", f"Best {label}", partial(_best, metric=metric), better))
        found.append((key_of(metric), f"Last {label}", partial(_last, metric=metric, text=text), better))
    return found


_WATCHED = ("train/loss", "train/grad_norm", "eval/loss")
WHERE = 4  # the rows of metrics stand after so many others
_ROWS: tuple[_RowOf, ...] = (
    ("status", "Status", lambda run: Cell(run.status), None),
    ("backend", "Backend", lambda run: Cell(run.environment.get("backend", ABSENT)), None),
    ("world_size", "Ranks", lambda run: Cell(run.environment.get("world size", ABSENT)), None),
    ("steps", "Steps", _steps, None),
    ("train_loss", "Last training loss", lambda run: _last(run, "train/loss"), min),
    ("train_s", "Training time", _seconds, None),
    ("samples_per_s", "Samples/s", _rate, max),
    ("step_ms", "Step time, median", _step_ms, min),
    ("saves", "Checkpoints", _saves, None),
    ("restarts", "Restarts", _restarts, None),
    ("skipped_steps", "Skipped steps", lambda run: _last(run, "train/skipped_steps"), None),
    ("not_finite", "Values not finite", _not_finite, None),
)
