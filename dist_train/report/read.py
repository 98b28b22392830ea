"""A run's folder as data, whatever state it was left in: what is missing is None, what is damaged is said."""

import itertools
import json
import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from dist_train.checkpoint import manifest
from dist_train.config import strict_yaml
from dist_train.errors import ConfigError
from dist_train.report.evaluated import Evaluated
from dist_train.report.evaluated import read as read_evaluated
from dist_train.report.files import METRICS, is_run
from dist_train.report.replayed import Replayed
from dist_train.report.replayed import read as read_replayed
from dist_train.run.lock import holder
from dist_train.track.status import summary_of
from dist_train.track.words import lower_is_better, parts_of

TRAIN = ("train/loss", "train/grad_norm", "train/lr", "train/samples_per_s", "train/skipped_steps", "train/mfu")
SAVE = ("checkpoint/stall_s",)
# Sections of names that are no curves, or are read by themselves.
NOT_CURVES = ("ranks", "straggler", "checkpoint", "profile", "compile")
MOST_SERIES = 500  # names that a mistake in the user's own code makes of numbers should not take the memory
KNOWN = {"step", "epoch", "time_s", "at", "event", "ranks/own_ms", *TRAIN, *SAVE}
LINES_AT_ONCE = 1000
# Columns of a heat map of ranks; there may be up to twice as many.
COLUMNS = 200


@dataclass(frozen=True)
class Series:
    """A metric over a run. Three float64 arrays of the same length.

    Args:
        step: optimizer steps done.
        time_s: seconds since the run's start, over restarts.
        value: may be not finite.
    """

    step: np.ndarray
    time_s: np.ndarray
    value: np.ndarray

    def best(self, largest: bool) -> tuple[float, int] | None:
        """The best finite value and its step."""
        there = np.flatnonzero(np.isfinite(self.value))
        if not len(there):
            return None
        values = self.value[there]
        at = there[values.argmax() if largest else values.argmin()]
        return float(self.value[at]), int(self.step[at])

    def last(self) -> float | None:
        """The newest value."""
        return float(self.value[-1]) if len(self.value) else None


@dataclass(frozen=True)
class Event:
    """A start, resume or stop.

    Args:
        kind: one of these words.
        step: optimizer steps done then.
        time_s: seconds since the run's start, over restarts.
        at: unix seconds; None if the line has none.
        facts: the rest of its line: backend, world_size, host; by.
    """

    kind: str
    step: float
    time_s: float
    at: float | None
    facts: dict[str, Any]


@dataclass(frozen=True)
class RankTimes:
    """What each rank spends in what it does alone, binned over lines of metrics.

    Args:
        first_step: [columns] of each bin's lines.
        last_step: [columns] likewise.
        own_ms: [ranks, columns] mean milliseconds a step; nan where a rank was not there.
        lines_per_column: 1 if nothing was binned.
    """

    first_step: np.ndarray
    last_step: np.ndarray
    own_ms: np.ndarray
    lines_per_column: int


@dataclass
class Run:
    """What a run left so far.

    Args:
        folder: of the run.
        name: that tells it from the other runs read with it.
        status: running, finished, preempted, or unfinished.
        config: value by config path, such as optim.lr; empty if it cannot be read.
        summary: of summary.json; empty if there is none.
        series: by metric, those of TRAIN, of evaluations, of SAVE, and of the user's own.
        events: in their order; none in runs of versions without them.
        ranks: None if no line has ranks/own_ms.
        evaluated: what the last evaluation left.
        replayed: steps that were taken again, by step.
        environment: text by name: what it was computed with and where.
        steps: optimizer steps done.
        total_steps: that the config asks for, as far as it is known.
        lines: of metrics.jsonl.
        problems: what could not be read, a line each.
    """

    folder: Path
    name: str
    status: str
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    series: dict[str, Series] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    ranks: RankTimes | None = None
    evaluated: Evaluated = field(default_factory=Evaluated)
    replayed: list[Replayed] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    steps: int = 0
    total_steps: int | None = None
    lines: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def metrics(self) -> list[str]:
        """The metrics of evaluations, that which the best is decided by first, and losses last."""
        found = [name for name in self.series if name.startswith("eval/")]
        best = self._said("best_metric")
        return sorted(found, key=lambda name: (name != best, self.parts_of(name)[1] == "loss"))

    def parts_of(self, metric: str) -> tuple[str, str]:
        """The test split of a metric of evaluations, empty where it has no name, and the metric's name there."""
        return parts_of(metric, self._names("test_splits"))

    def lowest(self, metric: str) -> bool:
        """Whether the least of a metric of evaluations is the best."""
        return lower_is_better(self.parts_of(metric)[1], {"loss", *self._names("lower_is_better")})

    @property
    def unit(self) -> str:
        """What the loss is a mean over; empty where nothing says it."""
        said = self._said("unit")
        return said if isinstance(said, str) else ""

    def _names(self, key: str) -> list[str]:
        said = self._said(key)
        return [name for name in said if isinstance(name, str)] if isinstance(said, list) else []

    def _said(self, key: str) -> Any:
        """What the newest start says."""
        return next((event.facts[key] for event in reversed(self.events) if key in event.facts), None)


def read(folders: list[Path]) -> list[Run]:
    """The runs in these folders, in this order. Raises ConfigError for a folder that is no run's, or stands twice."""
    for folder in folders:
        if not is_run(folder):
            raise ConfigError(
                f"report: got {folder}, which holds no {METRICS}, expected the folder of a run; python -m dist_train "
                f"runs lists them"
            )
    places = [folder.resolve() for folder in folders]
    for place in places:
        if places.count(place) > 1:
            raise ConfigError(f"report: got {place} twice, expected each run once; leave one out")
    return [_read(folder, name) for folder, name in zip(folders, _names(places), strict=True)]


def _names(places: list[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    for parts in itertools.count(1):
        names = ["/".join(place.parts[-parts:]) for place in places]
        if len(set(names)) == len(names):
            return names
    raise AssertionError


def _read(folder: Path, name: str) -> Run:
    summary = summary_of(folder)
    run = Run(folder, name, status_of(folder, summary), summary=summary)
    run.config = _config(run)
    last_epoch = _metrics(run)
    run.steps = int(run.steps if run.status != "finished" else summary.get("steps", run.steps))
    run.total_steps = total_steps(run.config, *last_epoch)
    run.evaluated = read_evaluated(folder, run.problems)
    run.replayed = read_replayed(folder, run.problems)
    run.environment = _environment(run)
    return run


# -- what the list of runs reads as well -------------------------------------------------------------------------------


def status_of(folder: Path, summary: dict[str, Any]) -> str:
    """running, finished, preempted; unfinished for one that was killed, or failed."""
    if holder(folder) is not None:
        return "running"
    return summary["status"] if summary.get("status") in ("finished", "preempted") else "unfinished"


def total_steps(config: dict[str, Any], step: float, epoch: float) -> int | None:
    """The steps that a config asks for; None before a line of metrics shows how many make an epoch.

    Args:
        config: value by config path.
        step: of a line.
        epoch: of the same line.
    """
    limit, epochs = config.get("train.max_steps"), config.get("train.epochs")
    known = [limit] if isinstance(limit, int) else []
    if isinstance(epochs, int) and epoch > 0:
        known.append(round(step / epoch) * epochs)
    return min(known) if known and (epoch > 0 or not epochs) else None


# -- the parts of a run ------------------------------------------------------------------------------------------------


def _config(run: Run) -> dict[str, Any]:
    try:
        tree = strict_yaml.parse((run.folder / "config.yaml").read_text(encoding="utf-8"))
        return {f"{section}.{key}": value for section, body in tree.items() for key, value in body.items()}
    except FileNotFoundError:
        run.problems.append("config.yaml is missing")
    except (OSError, ValueError, AttributeError, yaml.YAMLError):
        run.problems.append("config.yaml cannot be read")
    return {}


def _metrics(run: Run) -> tuple[float, float]:
    """Fills in what metrics.jsonl holds; returns step and epoch of its last line."""
    kinds = {TRAIN[0]: TRAIN, SAVE[0]: SAVE}  # a line's first key tells its kind
    columns = {kind: [array("d") for _ in ("step", "time_s", *keys)] for kind, keys in kinds.items()}
    others: dict[str, list[array]] = {}
    ranks, unread, last = _Bins(), 0, {}
    try:
        with (run.folder / METRICS).open("rb") as file:
            for lines, bad in _parsed(file):
                run.lines += len(lines)
                unread += bad
                last = lines[-1] if lines else last
                for kind, keys in kinds.items():
                    of_kind = [line for line in lines if kind in line]
                    for key, column in zip(("step", "time_s", *keys), columns[kind], strict=True):
                        column.extend(_floats([line.get(key, math.nan) for line in of_kind]))
                _add_others(lines, others)
                run.events += [_event(line) for line in lines if "event" in line]
                ranks.add([line for line in lines if "ranks/own_ms" in line])
    except OSError as error:
        run.problems.append(f"{METRICS}: {error.strerror}")
    if unread:
        run.problems.append(f"{unread} lines of {METRICS} cannot be read")
    for kind, keys in kinds.items():
        step, time_s, *values = (np.frombuffer(column, np.float64) for column in columns[kind])
        for key, value in zip(keys, values, strict=True):
            if np.isfinite(value).any() or (len(value) and key == kind):
                run.series[key] = Series(step, time_s, value)
    run.series |= {name: Series(*(np.frombuffer(part, np.float64) for part in parts)) for name, parts in others.items()}
    run.ranks = ranks.result()
    step, epoch = _floats([last.get("step", 0), last.get("epoch", 0)])
    run.steps = int(step) if math.isfinite(step) else 0
    return run.steps, epoch if math.isfinite(epoch) else 0.0


def _add_others(lines: list[dict[str, Any]], found: dict[str, list[array]]) -> None:
    """Numbers of evaluations and of the user's own, by name: steps, seconds, values."""
    for line in lines:
        for name, value in line.items():
            section, slash, _ = name.partition("/")
            if not slash or name in KNOWN or section in NOT_CURVES or type(value) not in (int, float):
                continue
            if name not in found and len(found) == MOST_SERIES:
                continue
            numbers = _floats([line["step"], line.get("time_s", math.nan), value])
            for column, number in zip(found.setdefault(name, [array("d") for _ in "xty"]), numbers, strict=True):
                column.append(number)


def _parsed(file: Iterator[bytes]) -> Iterator[tuple[list[dict[str, Any]], int]]:
    """Lines of JSON, many at a time, and how many of these could not be read. A last line that was cut off, or is being
    written, counts for neither."""
    while lines := list(itertools.islice(file, LINES_AT_ONCE)):
        if not lines[-1].endswith(b"\n"):
            lines.pop()
        try:
            values = json.loads(b"[" + b",".join(lines) + b"]")  # half the time of a call for each line
        except ValueError:
            values = [_json(line) for line in lines]
        good = [value for value in values if isinstance(value, dict) and "step" in value]
        yield good, len(lines) - len(good)


def _json(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _floats(values: list[Any]) -> array:
    try:
        return array("d", values)
    except (TypeError, OverflowError):
        return array(
            "d", [v if isinstance(v, float) or type(v) is int and abs(v) < 2**63 else math.nan for v in values]
        )


def _event(line: dict[str, Any]) -> Event:
    step, time_s, at = _floats([line["step"], line.get("time_s", math.nan), line.get("at", math.nan)])
    known = {"event", "step", "epoch", "time_s", "at"}
    facts = {key: value for key, value in line.items() if key not in known}
    return Event(str(line["event"]), step, time_s, at if math.isfinite(at) else None, facts)


class _Bins:
    """Means over lines, by rank, in bins that double their width when there are too many: memory does not grow."""

    def __init__(self) -> None:
        self.width, self.lines = 1, 0
        self.sums, self.counts = (np.zeros((0, 2 * COLUMNS)) for _ in "ab")  # [ranks, bins]
        self.first, self.last = np.full(2 * COLUMNS, np.inf), np.full(2 * COLUMNS, -np.inf)

    def add(self, lines: list[dict[str, Any]]) -> None:
        """Lines that have ranks/own_ms."""
        for count, group in itertools.groupby(lines, key=lambda line: _length(line["ranks/own_ms"])):
            if count:
                same = list(group)
                values = np.array([_floats(line["ranks/own_ms"]) for line in same])  # [lines, ranks]
                self._add(np.array(_floats([line["step"] for line in same])), values)

    def _add(self, steps: np.ndarray, values: np.ndarray) -> None:
        more = values.shape[1] - len(self.sums)
        if more > 0:
            self.sums, self.counts = (np.pad(part, ((0, more), (0, 0))) for part in (self.sums, self.counts))
        numbers = self.lines + np.arange(len(steps))
        while numbers[-1] // self.width >= 2 * COLUMNS:
            self.width *= 2
            for part, neutral in ((self.sums, 0.0), (self.counts, 0.0)):
                part[:, :COLUMNS] = part[:, ::2] + part[:, 1::2]
                part[:, COLUMNS:] = neutral
            self.first[:COLUMNS] = np.minimum(self.first[::2], self.first[1::2])
            self.last[:COLUMNS] = np.maximum(self.last[::2], self.last[1::2])
            self.first[COLUMNS:], self.last[COLUMNS:] = np.inf, -np.inf
        bins = numbers // self.width
        there = np.isfinite(values)
        ranks = values.shape[1]
        np.add.at(self.sums[:ranks].T, bins, np.where(there, values, 0.0))
        np.add.at(self.counts[:ranks].T, bins, there)
        np.minimum.at(self.first, bins, steps)
        np.maximum.at(self.last, bins, steps)
        self.lines += len(steps)

    def result(self) -> RankTimes | None:
        """The bins so far; None if there was no line."""
        used = -(-self.lines // self.width)
        if not used:
            return None
        with np.errstate(invalid="ignore"):
            means = self.sums[:, :used] / self.counts[:, :used]
        return RankTimes(self.first[:used], self.last[:used], means, self.width)


def _length(value: Any) -> int:
    return len(value) if isinstance(value, list) else 0


def _environment(run: Run) -> dict[str, str]:
    """From the summary; of a run without one from its newest whole checkpoint and its events."""
    facts: dict[str, Any] = {}
    versions: Any = run.summary.get("versions")
    for event in run.events:
        facts |= {key: event.facts[key] for key in ("backend", "world_size", "mesh") if key in event.facts}
    if "backend" not in run.summary and (found := newest(run.folder)):
        facts = {"backend": found.backend, "world_size": found.world_size} | facts
        versions = found.versions
    names = ("backend", "world_size", "launcher", "device", "device_name", "threads", "git_commit")
    facts |= {name: run.summary[name] for name in names if run.summary.get(name) is not None}
    hosts = dict.fromkeys(str(event.facts["host"]) for event in run.events if "host" in event.facts)
    if hosts:
        facts["host"] = ", ".join(hosts)
    facts |= versions if isinstance(versions, dict) else {}
    return {name.replace("_", " "): str(value) for name, value in facts.items()}


def newest(folder: Path) -> manifest.Manifest | None:
    """Of its whole checkpoints; None if it has none."""
    try:
        found, _ = manifest.listed(folder)
    except ConfigError:
        return None
    return found[0][1] if found else None
