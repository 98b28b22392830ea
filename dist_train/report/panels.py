"""What is plotted, apart from how: titles, axes, curves, events. A page and pictures draw the same panels."""

import time
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from dist_train.report.read import Event, RankTimes, Run, Wrong
from dist_train.report.text import duration, number

# After Okabe and Ito, told apart by the colour-blind: on a light and on a dark ground.
LIGHT = ("#0072b2", "#d55e00", "#009e73", "#b4528f", "#b87f00", "#3b9bd1", "#5b6470")
DARK = ("#4aa8e8", "#ff8b4a", "#2cc79b", "#e59ac6", "#f0b93a", "#9bd3f5", "#aab4c0")
POINTS_PER_CURVE = 2000
POINTS_PER_PANEL = 24_000
FEWEST_POINTS = 200
# More vertical lines than this would hide the curve; the time line has them all.
MOST_MARKS = 40
MOST_CHECKPOINTS = 400
# Where a heat map's colours end: a few outliers would leave the rest in one colour.
HEAT_QUANTILE = 0.99


@dataclass(frozen=True)
class Curve:
    """A line of a plot.

    Args:
        label: in the legend.
        x: float64 [points].
        y: float64 [points]; where it is not finite, the line has a gap.
        colour: number in the palette; beyond its end it starts anew with another dash.
        time_s: [points], the other x axis that a page offers.
        points: mark each point.
        run: number of the run.
    """

    label: str
    x: np.ndarray
    y: np.ndarray
    colour: int = 0
    time_s: np.ndarray | None = None
    points: bool = False
    run: int = 0


@dataclass(frozen=True)
class Mark:
    """Something that happened.

    Args:
        kind: start, resume, stop, or checkpoint.
        x: optimizer steps done then.
        time_s: seconds since the run's start.
        text: about it.
        run: number of the run.
        colour: number in the palette.
    """

    kind: str
    x: float
    time_s: float
    text: str
    run: int = 0
    colour: int = 0


@dataclass(frozen=True)
class Lines:
    """Curves over one axis.

    Args:
        key: names its file.
        title: of the plot.
        x_label: with unit.
        y_label: with unit.
        curves: to draw.
        marks: vertical lines.
        percent: y is a share.
        can_be_log: a logarithmic y axis makes sense.
        note: about what is drawn.
    """

    key: str
    title: str
    x_label: str
    y_label: str
    curves: list[Curve]
    marks: list[Mark] = field(default_factory=list)
    percent: bool = False
    can_be_log: bool = False
    note: str = ""


@dataclass(frozen=True)
class TimeLine:
    """What happened in each run, a row a run.

    Args:
        key: names its file.
        title: of the plot.
        rows: names of the runs.
        spans: by run, the last step, and the seconds until then.
        marks: to draw.
        note: about what is drawn.
    """

    key: str
    title: str
    rows: list[str]
    spans: list[tuple[float, float]]
    marks: list[Mark]
    note: str = ""


@dataclass(frozen=True)
class RankHeat:
    """Milliseconds a step by rank and step.

    Args:
        key: names its file.
        title: of the plot.
        times: to draw.
        smallest: where the colours begin.
        largest: where they end.
        note: about what is drawn.
        run: number of the run.
    """

    key: str
    title: str
    times: RankTimes
    smallest: float
    largest: float
    note: str = ""
    run: int = 0


@dataclass(frozen=True)
class Confusion:
    """Which class is taken for which.

    Args:
        key: names its file.
        title: of the plot.
        classes: names by number.
        counts: int64 [true, predicted].
        note: about what is drawn.
        run: number of the run.
    """

    key: str
    title: str
    classes: list[str]
    counts: np.ndarray
    note: str = ""
    run: int = 0

    def shares(self) -> np.ndarray:
        """[true, predicted] of the true class's samples; 0 for a class without any."""
        return self.counts / np.maximum(self.counts.sum(1, keepdims=True), 1)


@dataclass(frozen=True)
class Gallery:
    """The samples that a model gets most wrong.

    Args:
        key: names its file.
        title: of the plot.
        classes: names by number.
        worst: to show.
        run: number of the run.
    """

    key: str
    title: str
    classes: list[str]
    worst: list[Wrong]
    run: int = 0


Panel = Lines | TimeLine | RankHeat | Confusion | Gallery


def panels(runs: list[Run]) -> list[Panel]:
    """All that there is to plot of these runs, in the order of a page."""
    found: list[Panel] = []
    marks, checkpoints_thinned = _marks(runs)
    if loss := _lines(runs, "loss", "Loss", "loss", {"train": "train/loss", "evaluation": "eval/loss"}, marks):
        found.append(loss)
    for key, title, unit, metric in (
        ("accuracy", "Accuracy", "accuracy of the evaluation", "eval/accuracy"),
        ("lr", "Learning rate", "learning rate", "train/lr"),
        ("grad_norm", "Gradient norm", "global norm before clipping", "train/grad_norm"),
        ("samples_per_s", "Throughput", "samples/s over all ranks", "train/samples_per_s"),
    ):
        if panel := _lines(runs, key, title, unit, {"": metric}, []):
            found.append(panel)
    if any(run.lines for run in runs):
        found.append(_time_line(runs, marks, checkpoints_thinned))
    for i, run in enumerate(runs):
        suffix, of = (f"-{run.name.replace('/', '-')}", f", {run.name}") if len(runs) > 1 else ("", "")
        if run.ranks is not None:
            found.append(_rank_heat(run.ranks, i, suffix, of))
        if run.evaluation is None:
            continue
        classes, counts, worst = run.evaluation.classes, run.evaluation.confusion, run.evaluation.worst
        if counts is not None:
            found.append(_confusion(classes, counts, i, suffix, of))
        if worst:
            found.append(Gallery(f"worst{suffix}", f"Largest losses{of}", classes, worst, i))
    return found


def thin(y: np.ndarray, most: int) -> np.ndarray:
    """Which points to draw of a long curve: of each bucket its smallest, its largest, and its first that is not finite.

    Args:
        y: float64 [n].
        most: points to keep.

    Returns:
        int64 numbers of the points in their order, the first and the last among them; all if there are not too many.
    """
    n = len(y)
    if n <= most:
        return np.arange(n)
    finite = np.isfinite(y)
    per_bucket = 2 if finite.all() else 3
    width = -(-n // ((most - 2) // per_bucket))
    padded = np.zeros(-(-n // width) * width)
    padded[:n] = y
    there, lost = (np.zeros(len(padded), bool) for _ in "ab")
    there[:n], lost[:n] = finite, ~finite
    rows, there, lost = (part.reshape(-1, width) for part in (padded, there, lost))
    starts, some, gap = np.arange(len(rows)) * width, there.any(1), lost.any(1)
    low = (starts + np.where(there, rows, np.inf).argmin(1))[some]
    high = (starts + np.where(there, rows, -np.inf).argmax(1))[some]
    gaps = (starts + lost.argmax(1))[gap]
    return np.unique(np.concatenate([[0], low, high, gaps, [n - 1]]))


def _lines(
    runs: list[Run], key: str, title: str, unit: str, metrics: dict[str, str], marks: list[Mark]
) -> Lines | None:
    """Of each run those of the metrics that it has. A colour for each run; of a single run, for each metric."""
    several = len(runs) > 1
    there = [
        (i, run, name, run.series[metric])
        for i, run in enumerate(runs)
        for name, metric in metrics.items()
        if metric in run.series
    ]
    if not there:
        return None
    most = min(POINTS_PER_CURVE, max(FEWEST_POINTS, POINTS_PER_PANEL // len(there)))
    curves, kept, of = [], 0, 0
    for i, run, name, series in there:
        keep, n = thin(series.value, most), len(series.value)
        label = ", ".join(part for part in (run.name if several else "", name) if part) or title
        colour = i if several else list(metrics).index(name)
        points = metrics[name].startswith("eval/")
        curves.append(Curve(label, series.step[keep], series.value[keep], colour, series.time_s[keep], points, i))
        if len(keep) < n:
            kept, of = kept + len(keep), of + n
    notes = ["line: training, points: evaluation"] if several and len(metrics) > 1 else []
    notes += [f"{kept:,} of {of:,} points; each bucket keeps its extremes"] if of else []
    of_run = Counter(mark.run for mark in marks)
    shown = [mark for mark in marks if of_run[mark.run] <= MOST_MARKS]
    return Lines(
        key, title, "optimizer step", unit, curves, shown, key == "accuracy", key in ("loss", "grad_norm"),
        "; ".join(notes),
    )  # fmt: skip


def _marks(runs: list[Run]) -> tuple[list[Mark], str]:
    """Of all runs; and how the checkpoints were thinned, if they were."""
    found, note = [], ""
    for i, run in enumerate(runs):
        for before, event in zip([None, *run.events], run.events, strict=False):
            found.append(Mark(event.kind, event.step, event.time_s, _story(event, before), i, i))
        saves = run.series.get("checkpoint/stall_s")
        if saves is None:
            continue
        keep = thin(saves.value, MOST_CHECKPOINTS)
        if len(keep) < len(saves.value):
            note = f"{len(keep):,} of {len(saves.value):,} checkpoints; each bucket keeps its extremes"
        for step, time_s, stall_s in zip(saves.step[keep], saves.time_s[keep], saves.value[keep], strict=True):
            text = f"checkpoint after step {step:,.0f}, training waited {duration(stall_s)}"
            found.append(Mark("checkpoint", float(step), float(time_s), text, i, i))
    return found, note


def _story(event: Event, before: Event | None) -> str:
    """What happened, in words."""
    facts = event.facts
    parts = [f"{event.kind} at step {event.step:,.0f}"]
    if "by" in facts:
        parts.append(f"by {facts['by']}")
    if "backend" in facts:
        parts.append(f"{facts['backend']} on {facts.get('world_size', '?')} ranks")
    if "host" in facts:
        parts.append(f"host {facts['host']}")
    if event.at is not None:
        parts.append(time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event.at)))
        if event.kind == "resume" and before is not None and before.kind == "stop" and before.at is not None:
            parts.append(f"{duration(max(0.0, event.at - before.at))} after the stop")
    return ", ".join(parts)


def _time_line(runs: list[Run], marks: list[Mark], note: str) -> TimeLine:
    spans = []
    for i, run in enumerate(runs):
        steps = [series.step[[0, -1]] for series in run.series.values()]
        times = [series.time_s[[0, -1]] for series in run.series.values()]
        own = [mark for mark in marks if mark.run == i]
        x = [value for value in [0.0, *np.ravel(steps), *(mark.x for mark in own)] if np.isfinite(value)]
        t = [value for value in [0.0, *np.ravel(times), *(mark.time_s for mark in own)] if np.isfinite(value)]
        spans.append((max(x), max(t)))
    return TimeLine("timeline", "Time line", [run.name for run in runs], spans, marks, note)


def _rank_heat(times: RankTimes, run: int, suffix: str, of: str) -> RankHeat:
    finite = times.own_ms[np.isfinite(times.own_ms)]
    begin, end, largest = (float(np.quantile(finite, q)) if len(finite) else 0.0 for q in (0.0, HEAT_QUANTILE, 1.0))
    notes = ["data and forward, what a rank does alone"]
    if times.lines_per_column > 1:
        notes.append(f"each column is the mean of {times.lines_per_column:,} lines")
    if largest > end:
        notes.append(
            f"colours end at the {HEAT_QUANTILE:.0%} quantile, {number(end)} ms; the largest is {number(largest)} ms"
        )
    return RankHeat(f"ranks{suffix}", f"Time of each rank{of}", times, begin, end, "; ".join(notes), run)


def _confusion(classes: list[str], counts: np.ndarray, run: int, suffix: str, of: str) -> Confusion:
    note = "colour goes by the square root of the share of a true class, so that rare mistakes show"
    return Confusion(f"confusion{suffix}", f"Confusion matrix{of}", classes, counts, note, run)
