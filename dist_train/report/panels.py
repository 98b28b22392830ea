"""What is plotted, apart from how: titles, axes, curves, events. A page and pictures draw the same panels."""

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dist_train.report.evaluated import Masked, Predictions, Wrong
from dist_train.report.read import TRAIN, Event, RankTimes, Run
from dist_train.report.replayed import Replayed
from dist_train.report.text import duration, number
from dist_train.tasks import panels as own
from dist_train.track.words import is_share

# After Okabe and Ito, told apart by the colour-blind: on a light and on a dark ground.
LIGHT = ("#0072b2", "#d55e00", "#009e73", "#b4528f", "#b87f00", "#3b9bd1", "#5b6470")
DARK = ("#4aa8e8", "#ff8b4a", "#2cc79b", "#e59ac6", "#f0b93a", "#9bd3f5", "#aab4c0")
POINTS_PER_CURVE = 2000
POINTS_PER_PANEL = 24_000
FEWEST_POINTS = 200
SHOWN_SAMPLES, SHOWN_LAYERS = 10, 20  # of a step
# More vertical lines than this would hide the curve; the time line has them all.
MOST_MARKS = 40
MOST_CHECKPOINTS = 400
# Where a heat map's colours end: a few outliers would leave the rest in one colour.
HEAT_QUANTILE = 0.99
# What plots of other things than metrics are called.
KEYS = {"loss", "lr", "grad_norm", "samples_per_s", "mfu", "timeline", "ranks", "confusion", "recall", "worst", "masks"}


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


@dataclass(frozen=True)
class Scatter:
    """Predicted against true.

    Args:
        key: names its file.
        title: of the plot.
        index: of samples, int64 [points].
        true: float64 [points].
        predicted: float64 [points].
        worst: of them, those with the largest loss, bool [points].
        note: about what is drawn.
        run: number of the run.
    """

    key: str
    title: str
    index: np.ndarray
    true: np.ndarray
    predicted: np.ndarray
    worst: np.ndarray
    note: str = ""
    run: int = 0


@dataclass(frozen=True)
class MaskGallery:
    """The samples whose masks a model gets most wrong.

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
    worst: list[Masked]
    run: int = 0


@dataclass(frozen=True)
class Rows:
    """A table.

    Args:
        key: names its file.
        title: of the table.
        columns: their names.
        rows: of each a text, a number, a picture (PNG), or None for each column.
        note: about what is in it.
        worst: it belongs to what is most wrong.
    """

    key: str
    title: str
    columns: list[str]
    rows: list[list[str | float | bytes | None]]
    note: str = ""
    worst: bool = False


@dataclass(frozen=True)
class Plotly:
    """A figure of the user's own, which only a page draws.

    Args:
        key: names it.
        title: of the plot.
        data: traces.
        layout: of the plot.
        note: about what is drawn.
    """

    key: str
    title: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    note: str = ""


Panel = Lines | TimeLine | RankHeat | Confusion | Gallery | Scatter | MaskGallery | Rows | Plotly


def panels(runs: list[Run]) -> list[Panel]:
    """All that there is to plot of these runs, in the order of a page."""
    found: list[Panel] = []
    marks, checkpoints_thinned = _marks(runs)
    of_metrics = _curves_of_metrics(runs)
    units = list(dict.fromkeys(run.unit for run in runs if run.unit))
    others = {unit: f"train/{unit}_per_s" for unit in units if unit != "samples"}
    unit = f"loss, mean over {units[0]}" if len(units) == 1 else "loss"
    evaluated = {_named("evaluation", *parts): name for parts, name in of_metrics.pop("loss", {}).items()}
    if loss := _lines(runs, "loss", "Loss", unit, {"train": "train/loss"} | evaluated, marks):
        found.append(loss)
    fixed = (
        ("lr", "Learning rate", "learning rate", "train/lr"),
        ("grad_norm", "Gradient norm", "global norm before clipping", "train/grad_norm"),
        ("samples_per_s", "Throughput", "samples/s over all ranks", "train/samples_per_s"),
        *(
            (_key(f"{unit}_per_s"), f"{unit.capitalize()}/s", f"{unit}/s over all ranks", name)
            for unit, name in others.items()
        ),
        ("mfu", "Model FLOPs utilisation", "share of the devices' peak", "train/mfu"),
    )
    for name, curves in of_metrics.items():
        metrics = {_named("", *parts): metric for parts, metric in curves.items()}
        if panel := _lines(runs, _key(name), title_of(name), f"{name} of the evaluation", metrics, []):
            found.append(panel)
    for key, title, unit, metric in fixed:
        if panel := _lines(runs, key, title, unit, {"": metric}, []):
            found.append(panel)
    for name in dict.fromkeys(name for run in runs for name in run.series):  # what the user's own code logged
        own_one = name.partition("/")[0] not in ("eval", "checkpoint") and name not in (*TRAIN, *others.values())
        if own_one and (panel := _lines(runs, _key(name), name, name, {"": name}, [])):
            found.append(panel)
    if any(run.lines for run in runs):
        found.append(_time_line(runs, marks, checkpoints_thinned))
    for i, run in enumerate(runs):
        suffix, of = (f"-{run.name.replace('/', '-')}", f", {run.name}") if len(runs) > 1 else ("", "")
        if run.ranks is not None:
            found.append(_rank_heat(run.ranks, i, suffix, of))
        found += _of_classes(run, i, suffix, of)
        if run.evaluated.predictions is not None:
            found += _of_predictions(run.evaluated.predictions, i, suffix, of)
        masks = run.evaluated.masks
        if masks is not None and masks.worst:
            found.append(MaskGallery(f"masks{suffix}", f"Largest losses{of}", masks.classes, masks.worst, i))
        found += [_own(panel, j, suffix, of) for j, panel in enumerate(run.evaluated.panels)]
        for step in run.replayed:
            found += _of_step(step, suffix, of)
    return found


def title_of(name: str) -> str:
    """A metric as a heading: mean_iou is Mean iou."""
    words = name.replace("_", " ")
    return words[:1].upper() + words[1:]


def _curves_of_metrics(runs: list[Run]) -> dict[str, dict[tuple[str, str], str]]:
    """Of the metrics of evaluations those that belong into one plot, by its name: f1 and f1/micro, of all splits. The
    curves of a plot are by split and by what follows the name."""
    found: dict[str, dict[tuple[str, str], str]] = {}
    for run in runs:
        for metric in run.metrics:
            split, name = run.parts_of(metric)
            name, _, rest = name.partition("/")
            found.setdefault(name, {})[split, rest] = metric
    return found


def _named(first: str, *others: str) -> str:
    return ", ".join(part for part in (first, *others) if part)


def _key(name: str) -> str:
    """Names the file of a metric's plot."""
    key = "".join(c if c.isalnum() or c in "-_." else "-" for c in name)
    return f"metric-{key}" if key in KEYS else key


def _of_classes(run: Run, i: int, suffix: str, of: str) -> list[Panel]:
    if run.evaluated.classes is None:
        return []
    classes, counts, worst = (getattr(run.evaluated.classes, name) for name in ("classes", "confusion", "worst"))
    found: list[Panel] = [] if counts is None else [_confusion(classes, counts, i, suffix, of)]
    return found + ([Gallery(f"worst{suffix}", f"Largest losses{of}", classes, worst, i)] if worst else [])


def _of_predictions(left: Predictions, run: int, suffix: str, of: str) -> list[Panel]:
    """A plot of each number that is predicted, and a table of the samples with the largest loss."""
    found: list[Panel] = []
    shown = left.true.shape[1]
    new = ~np.isin(left.worst_index, left.index)
    index = np.concatenate([left.index, left.worst_index[new]])
    true, predicted = (
        np.concatenate([some, worst[new]])
        for some, worst in ((left.true, left.worst_true), (left.predicted, left.worst_predicted))
    )
    worst = np.isin(index, left.worst_index)
    note = f"{len(index):,} test samples; marked: the {len(left.worst_index)} with the largest loss"
    if left.outputs > shown:
        note += f"; the first {shown} of {left.outputs:,} numbers of a sample are shown"
    for k in range(shown):
        one = f" of number {k}" if shown > 1 else ""
        key = f"predicted-{k}{suffix}" if shown > 1 else f"predicted{suffix}"
        title = f"Predicted against true{one}{of}"
        found.append(Scatter(key, title, index, true[:, k], predicted[:, k], worst, note, run))
    heads = [f"{what} {k}" if shown > 1 else what for k in range(shown) for what in ("true", "predicted")]
    both = np.stack([left.worst_true, left.worst_predicted], 2).reshape(len(left.worst_index), -1)
    rows = zip(left.worst_index.tolist(), left.worst_loss.tolist(), both.tolist(), strict=True)
    table = [[f"#{i:,}", loss, *values] for i, loss, values in rows]
    found.append(Rows(f"worst{suffix}", f"Largest losses{of}", ["test sample", "loss", *heads], table, "", True))
    return found


def _of_step(step: Replayed, suffix: str, of: str) -> list[Panel]:
    """A step that was taken again: its samples, and the gradient by parameter."""
    title, key = f"Step {step.step:,}, taken again", f"step-{step.step}"
    said = "the run recorded nothing to compare with" if step.off is None else f"at most {step.off:.1e} from the record"
    norm = "" if step.grad_norm is None else f", gradient norm {number(step.grad_norm)}"
    note = f"loss {number(step.loss)}{norm}; {'differs: ' if step.differs else ''}{said}"
    if step.unknown:
        note += f"; no loss of each sample, as {step.unknown}"
    shown = [one for one in step.samples if one.what] or step.samples[:SHOWN_SAMPLES]
    pictures = any(one.png for one in shown)
    head = ["sample", *(["picture"] if pictures else []), "loss", "what it is"]
    rows = [[f"#{one.index:,}", *([one.png or None] if pictures else []), one.loss, one.what] for one in shown]
    if len(step.samples) > len(shown):
        note += f"; and {len(step.samples) - len(shown):,} others"
    layers = sorted(step.layers.items(), key=lambda one: -one[1] if np.isfinite(one[1]) else -np.inf)
    norms = [[name, value] for name, value in layers[:SHOWN_LAYERS]]
    left = f"the largest {SHOWN_LAYERS} of {len(layers):,}" if len(layers) > SHOWN_LAYERS else ""
    return [
        Rows(f"{key}{suffix}", f"{title}{of}", head, rows, note),
        Rows(f"{key}-gradient{suffix}", f"{title}: gradient{of}", ["weights", "gradient norm"], norms, left),
    ]


def _own(panel: own.Panel, j: int, suffix: str, of: str) -> Panel:
    key, title = f"own-{j}{suffix}", f"{panel.title}{of}"
    if isinstance(panel, own.Table):
        return Rows(key, title, list(panel.columns), [list(row) for row in panel.rows], panel.note)
    return Plotly(key, title, panel.figure["data"], panel.figure["layout"], panel.note)


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
        label = _named(run.name if several else "", name) or title
        colour = i if several else list(metrics).index(name)
        points = metrics[name].startswith("eval/")
        curves.append(Curve(label, series.step[keep], series.value[keep], colour, series.time_s[keep], points, i))
        if len(keep) < n:
            kept, of = kept + len(keep), of + n
    notes = ["line: training, points: evaluation"] if several and key == "loss" and len(metrics) > 1 else []
    notes += [f"{kept:,} of {of:,} points; each bucket keeps its extremes"] if of else []
    of_run = Counter(mark.run for mark in marks)
    shown = [mark for mark in marks if of_run[mark.run] <= MOST_MARKS]
    shares = all(is_share(metrics[name], series.value) for _, _, name, series in there)
    return Lines(
        key, title, "optimizer step", unit, curves, shown, shares, key in ("loss", "grad_norm"),
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
        laid = f" ({facts['mesh']})" if "mesh" in facts else ""
        parts.append(f"{facts['backend']} on {facts.get('world_size', '?')} ranks{laid}")
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
