"""Panels as PNG files, drawn by matplotlib: those of a run, and any that is made from curves."""

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np

from dist_train.errors import ConfigError
from dist_train.report.images import colour_of, mask, picture
from dist_train.report.panels import (
    LIGHT,
    Confusion,
    Gallery,
    Lines,
    MaskGallery,
    Panel,
    Plotly,
    RankHeat,
    Rows,
    Scatter,
    TimeLine,
)
from dist_train.report.text import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, SOFT, GRID = "#1a2029", "#5c6675", "#e1e5ea"
HEAT = ("#edf4fa", "#9cc7e6", "#3b8fc9", "#0a5a96", "#062f52")
RIGHT, WRONG, NONE = "#0072b2", "#d04a02", "#eef1f5"
DASHES = ("-", "--", ":", "-.")
MARKERS = {"checkpoint": ("|", 160), "start": (">", 70), "resume": ("D", 90), "stop": ("s", 28)}
WIDTH_IN, DPI = 8.0, 160
MOST_ROWS = 30
GALLERY_COLUMNS = 8
MASKS_COLUMNS = 2
MOST_IN_TABLE = 40
MOST_IN_LEGEND = 12


def drawable(panels: list[Panel]) -> list[Panel]:
    """Without figures of plotly, which only a browser draws."""
    return [panel for panel in panels if not isinstance(panel, Plotly)]


def png(panel: Panel) -> bytes:
    """The file of a panel. Raises ConfigError where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(
            "--png: got no matplotlib, which draws the pictures, expected it installed; pip install "
            "'dist-train[report]'"
        ) from None
    with _style():
        figure = Figure(figsize=(WIDTH_IN, _height_in(panel)), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        _DRAW[type(panel)](panel, figure)
        figure.suptitle(_plain(panel.title), x=0.01, ha="left", fontsize=13, fontweight="bold", color=INK)
        file = BytesIO()
        figure.savefig(file, format="png")
    return file.getvalue()


@contextmanager
def _style() -> Iterator[None]:
    from matplotlib import rc_context

    with rc_context(
        {
            "font.size": 10, "axes.edgecolor": GRID, "axes.labelcolor": SOFT, "axes.grid": True, "grid.color": GRID,
            "axes.spines.top": False, "axes.spines.right": False, "xtick.color": SOFT, "ytick.color": SOFT,
            "axes.axisbelow": True, "legend.frameon": False, "text.parse_math": False,
        }
    ):  # fmt: skip
        yield


def _height_in(panel: Panel) -> float:
    match panel:
        case TimeLine():
            return 1.5 + 0.35 * len(panel.rows)
        case RankHeat():
            return 1.6 + 0.3 * max(2, min(16, len(panel.times.own_ms)))
        case Confusion():
            return 7.0
        case Gallery():
            return 0.5 + 1.5 * -(-len(panel.worst) // GALLERY_COLUMNS)
        case MaskGallery():
            return 1.0 + 1.5 * -(-len(panel.worst) // MASKS_COLUMNS)
        case Rows():
            return 0.7 + 0.22 * (1 + min(len(panel.rows), MOST_IN_TABLE))
        case Scatter():
            return 6.0
        case _:
            return 4.2


def _lines(panel: Lines, figure: "Figure") -> None:
    axes = figure.subplots()
    for curve in panel.curves:
        color, dash = LIGHT[curve.colour % len(LIGHT)], DASHES[curve.colour // len(LIGHT) % len(DASHES)]
        y = np.where(np.isfinite(curve.y), curve.y, np.nan)
        marker = "o" if curve.points or len(y) == 1 else None
        axes.plot(curve.x, y, dash, color=color, marker=marker, markersize=4, linewidth=1.4, label=_plain(curve.label))
        lost = curve.x[~np.isfinite(curve.y)]
        if len(lost):
            at_the_bottom = axes.get_xaxis_transform()
            axes.plot(lost, np.full(len(lost), 0.03), "x", color=WRONG, markersize=5, transform=at_the_bottom)
    for mark in panel.marks:
        if mark.kind != "start":
            style = ":" if mark.kind == "checkpoint" else "-"
            axes.axvline(mark.x, color=SOFT, linestyle=style, linewidth=0.8, alpha=0.5, zorder=0)
    axes.set(xlabel=panel.x_label, ylabel=panel.y_label)
    _format(axes, panel)
    if len(panel.curves) > 1:
        axes.legend(fontsize=9)
    _note(figure, panel.note)


def _format(axes: "Axes", panel: Lines) -> None:
    from matplotlib.ticker import FuncFormatter, PercentFormatter

    axes.yaxis.set_major_formatter(PercentFormatter(1.0) if panel.percent else FuncFormatter(lambda y, _: f"{y:,g}"))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}"))


def _time_line(panel: TimeLine, figure: "Figure") -> None:
    axes = figure.subplots()
    for i, (steps, _) in enumerate(panel.spans):
        axes.plot([0, steps], [i, i], color=LIGHT[i % len(LIGHT)], linewidth=6, alpha=0.35, solid_capstyle="butt")
    for kind, (marker, size) in MARKERS.items():
        marks = [mark for mark in panel.marks if mark.kind == kind]
        if marks:
            colors = [LIGHT[mark.colour % len(LIGHT)] for mark in marks]
            face = {"facecolors": "none", "edgecolors": colors} if kind == "resume" else {"color": colors}
            axes.scatter(
                [m.x for m in marks], [m.run for m in marks], size, marker=marker, label=kind, zorder=3, **face
            )
    axes.set(xlabel="optimizer step", ylim=(len(panel.rows) - 0.4, -0.6))
    axes.set_yticks(range(len(panel.rows)), [_plain(name) for name in panel.rows])
    axes.grid(visible=False, axis="y")
    if panel.marks:
        axes.legend(ncols=4, loc="lower left", bbox_to_anchor=(0, 1), fontsize=9)
    _note(figure, panel.note)


def _rank_heat(panel: RankHeat, figure: "Figure") -> None:
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.ticker import MaxNLocator

    axes, times = figure.subplots(), panel.times
    end = len(times.own_ms) - 0.5
    image = axes.imshow(
        times.own_ms, LinearSegmentedColormap.from_list("heat", HEAT), aspect="auto", interpolation="nearest",
        vmin=panel.smallest, vmax=panel.largest,
        extent=(float(times.first_step[0]), float(max(times.last_step[-1], times.first_step[0] + 1)), end, -0.5),
    )  # fmt: skip
    axes.set(xlabel="optimizer step", ylabel="rank")
    axes.grid(visible=False)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, label="ms", pad=0.01)
    _note(figure, panel.note)


def _confusion(panel: Confusion, figure: "Figure") -> None:
    from matplotlib.colors import LinearSegmentedColormap

    axes, shares, n = figure.subplots(), panel.shares(), len(panel.classes)
    wrong = np.where(np.eye(n, dtype=bool), 0, shares)
    # Right above 0, wrong below, each by the square root of its share.
    signed = np.sqrt(np.where(np.eye(n, dtype=bool), shares, 0)) - np.sqrt(wrong / max(wrong.max(), 1e-12))
    axes.imshow(signed, LinearSegmentedColormap.from_list("signed", (WRONG, NONE, RIGHT)), vmin=-1, vmax=1)
    stride = -(-n // MOST_ROWS)
    labels = [_plain(name if len(name) <= 16 else name[:15] + "…") for name in panel.classes[::stride]]
    axes.set_xticks(range(0, n, stride), labels, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(0, n, stride), labels)
    axes.set(xlabel="predicted", ylabel="true")
    axes.grid(visible=False)
    for i, j in np.argwhere(panel.counts) if n <= 20 else ():
        ink = "white" if abs(signed[i, j]) > 0.6 else INK
        axes.text(j, i, f"{panel.counts[i, j]:,}", ha="center", va="center", fontsize=8, color=ink)
    _note(figure, panel.note)


def _gallery(panel: Gallery, figure: "Figure") -> None:
    rows = -(-len(panel.worst) // GALLERY_COLUMNS)
    places = figure.subplots(rows, GALLERY_COLUMNS, squeeze=False)
    for axes in places.flat:
        axes.set_axis_off()
    for axes, wrong in zip(places.flat, panel.worst, strict=False):
        axes.imshow(np.asarray(picture(wrong.image)), cmap="gray", interpolation="nearest")
        true, said = panel.classes[wrong.true], panel.classes[wrong.predicted]
        said = "right" if wrong.true == wrong.predicted else f"→ {said}"
        axes.set_title(_plain(f"{true}\n{said}, {wrong.confidence:.0%}"), fontsize=7.5, color=INK)


def _scatter(panel: Scatter, figure: "Figure") -> None:
    axes = figure.subplots()
    for some, style in ((~panel.worst, {"s": 12, "alpha": 0.6}), (panel.worst, {"s": 26, "marker": "D"})):
        axes.scatter(panel.true[some], panel.predicted[some], color=WRONG if "marker" in style else RIGHT, **style)
    finite = np.concatenate([part[np.isfinite(part)] for part in (panel.true, panel.predicted)])
    ends = (finite.min(), finite.max()) if len(finite) else (0.0, 1.0)
    axes.plot(ends, ends, "--", color=SOFT, linewidth=1, zorder=0)
    axes.set(xlabel="true", ylabel="predicted")
    _note(figure, panel.note)


def _masks(panel: MaskGallery, figure: "Figure") -> None:
    from matplotlib.patches import Patch

    rows = -(-len(panel.worst) // MASKS_COLUMNS)
    places = figure.subplots(rows, 3 * MASKS_COLUMNS, squeeze=False)
    for axes in places.flat:
        axes.set_axis_off()
    for i, wrong in enumerate(panel.worst):
        row, first = i // MASKS_COLUMNS, 3 * (i % MASKS_COLUMNS)
        images = [mask(wrong.true), mask(wrong.predicted)]
        images = [picture(wrong.image) if wrong.image is not None else None, *images]
        for axes, image, title in zip(
            places[row, first : first + 3],
            images,
            (f"#{wrong.index}", "true", f"predicted, {wrong.right:.0%}"),
            strict=True,
        ):
            axes.set_title(title, fontsize=7.5, color=INK)
            if image is not None:
                axes.imshow(np.asarray(image), cmap="gray", interpolation="nearest")
    both = [numbers for wrong in panel.worst for numbers in (wrong.true, wrong.predicted)]
    present = np.unique(np.concatenate([numbers.ravel() for numbers in both])).tolist()[:MOST_IN_LEGEND]
    patches = [
        Patch(
            color=[c / 255 for c in colour_of(one)], label=_plain(panel.classes[one] if one >= 0 else "does not count")
        )
        for one in present
    ]
    figure.legend(handles=patches, loc="outside lower left", ncols=min(6, len(patches)), fontsize=8)


def _rows(panel: Rows, figure: "Figure") -> None:
    axes = figure.subplots()
    axes.set_axis_off()
    cells = [[_plain(_text(cell))[:40] for cell in row] for row in panel.rows[:MOST_IN_TABLE]]
    if cells and panel.columns:
        heads = [_plain(name)[:40] for name in panel.columns]
        lines = "horizontal"
        made = axes.table(cells, colLabels=heads, bbox=(0, 0, 1, 1), cellLoc="left", colLoc="left", edges=lines)
        made.auto_set_font_size(False)
        made.set_fontsize(8.5)
        for (row, _), cell in made.get_celld().items():
            cell.set(edgecolor=GRID, linewidth=0.8)
            cell.get_text().set_color(INK if row else SOFT)
    left_out = len(panel.rows) - len(cells)
    _note(figure, "; ".join(filter(None, [panel.note, f"and {left_out:,} more rows" if left_out else ""])))


def _text(cell: str | float | bytes | None) -> str:
    if cell is None or isinstance(cell, bytes):
        return "–"
    return str(cell) if isinstance(cell, str | bool) else number(cell)


def _note(figure: "Figure", note: str) -> None:
    if note:
        figure.supxlabel(note, x=0.01, ha="left", fontsize=8, color=SOFT)


def _plain(text: str) -> str:
    """Without what no font draws."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


_DRAW = {
    Lines: _lines, TimeLine: _time_line, RankHeat: _rank_heat, Confusion: _confusion, Gallery: _gallery,
    Scatter: _scatter, MaskGallery: _masks, Rows: _rows,
}  # fmt: skip
