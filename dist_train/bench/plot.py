"""The rates of a benchmark as a picture, drawn by matplotlib."""

from collections.abc import Sequence
from io import BytesIO

from dist_train.bench.slices import BARE, CEILING, OURS, TUTORIAL
from dist_train.bench.table import Run, quartiles
from dist_train.errors import ConfigError
from dist_train.report.png import DPI, GRID, INK, SOFT, WIDTH_IN

COLOURS = {OURS: "#0072b2", BARE: "#5b6470", TUTORIAL: "#d55e00", CEILING: "#c9ced6"}
BAR_IN = 0.34


def check() -> None:
    """Raises ConfigError where matplotlib is not installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise ConfigError(
            "--plot: got no matplotlib, which draws it, expected it installed; pip install 'dist-train[report]'"
        ) from None


def png(runs: Sequence[Run]) -> bytes:
    """A panel for each batch size, a bar for each run: the median of the slices, with the quartiles."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    ran = [run for run in runs if run.slices]
    sizes = list(dict.fromkeys(run.batch_size for run in ran))
    counts = [sum(run.batch_size == size for run in ran) for size in sizes]
    figure = Figure(figsize=(WIDTH_IN, sum(BAR_IN * n + 0.85 for n in counts)), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(sizes), 1, squeeze=False, height_ratios=counts)[:, 0]
    for axes, size in zip(panels, sizes, strict=True):
        rows = [run for run in ran if run.batch_size == size]
        for y, run in enumerate(rows):
            low, middle, high = quartiles(run.rates())
            axes.barh(y, middle, color=COLOURS[run.name], height=0.72)
            axes.plot([low, high], [y, y], color=INK, linewidth=1.2)
            axes.annotate(
                f"{middle:,.0f}", (max(high, middle), y), (4, 0), textcoords="offset points", va="center", fontsize=8.5,
                color=INK,
            )  # fmt: skip
        labels = [run.title for run in rows]
        axes.set_yticks(range(len(rows)), labels, color=INK)
        for text, run in zip(axes.get_yticklabels(), rows, strict=True):
            text.set_fontweight("bold" if run.name == OURS else "normal")
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(0, 1.14 * max(quartiles(run.rates())[2] for run in rows))
        axes.set_title(f"{size:,} samples a step", loc="left", fontsize=11, fontweight="bold", color=INK)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        axes.grid(axis="x", color=GRID)
        axes.set_axisbelow(True)
        axes.tick_params(colors=SOFT, length=0, labelsize=9)
        for side in ("top", "right", "left", "bottom"):
            axes.spines[side].set_visible(False)
    panels[-1].set_xlabel("samples/s: median of the slices, and their quartiles", color=SOFT, fontsize=9)
    file = BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()
