"""Runs as one HTML file that asks for nothing from outside: plotly's script, the data and the pictures are in it."""

import base64
import hashlib
import json
import time
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from dist_train.config.tree import Config, to_tree
from dist_train.errors import ConfigError
from dist_train.report.panels import (
    DARK,
    LIGHT,
    Confusion,
    Gallery,
    Lines,
    Mark,
    MaskGallery,
    Panel,
    Plotly,
    RankHeat,
    Rows,
    Scatter,
    TimeLine,
)
from dist_train.report.read import Run
from dist_train.report.samples import gallery, masks, table
from dist_train.report.summary import (
    ABSENT,
    Cell,
    Row,
    config_rows,
    differing,
    environment_rows,
    headlines,
    rows,
    shown,
)
from dist_train.report.text import number, percent

HERE = Path(__file__).parent
LONGEST_LABEL = 14


def page(runs: list[Run], panels: list[Panel]) -> bytes:
    """The file, in UTF-8. Raises ConfigError where plotly is not installed.

    Args:
        runs: at least one.
        panels: of these runs.
    """
    plotly = _plotly()
    script = (HERE / "page.js").read_text(encoding="utf-8")
    style = (HERE / "page.css").read_text(encoding="utf-8")
    data = json.dumps(_data(runs, panels), ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    allowed = " ".join(f"'sha256-{_digest(text)}'" for text in (plotly, script))
    # Nothing may be asked for, and no script may run but these two.
    policy = (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        f"base-uri 'none'; form-action 'none'"
    )
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    text = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)} · training report</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
{_body(title, runs, panels)}
<noscript><p class="note">The plots of this page need JavaScript.</p></noscript>
<script type="application/json" id="data">{data}</script>
<script>{plotly}</script>
<script>{script}</script>
</body>
</html>
"""
    return text.encode(errors="backslashreplace")  # a folder's name may be no text


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise ConfigError(
            "report: got no plotly, which draws the page, expected it installed; pip install 'dist-train[report]'"
        ) from None
    return get_plotlyjs().replace("\r\n", "\n")  # as a browser reads it, whose hash is compared


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


# -- what the script draws ---------------------------------------------------------------------------------------------


def _data(runs: list[Run], panels: list[Panel]) -> dict[str, Any]:
    drawn = [(i, panel) for i, panel in enumerate(panels) if type(panel) in _KINDS]
    spans = [span for panel in panels if isinstance(panel, TimeLine) for span in panel.spans]
    steps, seconds = (max((span[i] for span in spans), default=0.0) for i in (0, 1))
    return {
        "runs": [_plotly_text(run.name) for run in runs],
        "palette": {"light": LIGHT, "dark": DARK},
        "steps": steps,
        "seconds": seconds,
        "panels": [_KINDS[type(panel)](panel) | {"key": panel.key, "key_id": i} for i, panel in drawn],
    }


def _lines(panel: Lines) -> dict[str, Any]:
    curves = [
        {
            "label": _plotly_text(curve.label),
            "run": curve.run,
            "colour": curve.colour,
            "points": curve.points,
            "x": _numbers(curve.x),
            "t": _numbers(curve.time_s, decimals=3) if curve.time_s is not None else _numbers(curve.x),
            "y": _numbers(curve.y),
        }
        for curve in panel.curves
    ]
    about = {name: _plotly_text(getattr(panel, name)) for name in ("x_label", "y_label")}
    return about | {
        "kind": "lines", "percent": panel.percent, "curves": curves, "marks": [_mark(mark) for mark in panel.marks]
    }  # fmt: skip


def _time_line(panel: TimeLine) -> dict[str, Any]:
    return {
        "kind": "timeline",
        "x_label": "optimizer step",
        "rows": [_plotly_text(_short(name, 2 * LONGEST_LABEL)) for name in panel.rows],
        "spans": [{"x": steps, "t": seconds} for steps, seconds in panel.spans],
        "marks": [_mark(mark) for mark in panel.marks],
    }


def _rank_heat(panel: RankHeat) -> dict[str, Any]:
    times = panel.times
    rounded = np.round(times.own_ms, 4)
    middle = (times.first_step + times.last_step) / 2
    rank_rows = [_numbers(row) for row in rounded]
    return {
        "kind": "ranks",
        "x": _numbers(middle),
        "z": rank_rows,
        "smallest": panel.smallest,
        "largest": panel.largest,
    }


def _confusion(panel: Confusion) -> dict[str, Any]:
    names = [_plotly_text(name) for name in panel.classes]
    # Equal names would be one column.
    own = [name if names.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(names)]
    short = [_plotly_text(_short(name, LONGEST_LABEL)) for name in panel.classes]
    return {"kind": "confusion", "classes": own, "short": short, "counts": panel.counts.tolist()}


def _scatter(panel: Scatter) -> dict[str, Any]:
    finite = np.concatenate([part[np.isfinite(part)] for part in (panel.true, panel.predicted)])
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    return {
        "kind": "scatter",
        "x": _numbers(panel.true),
        "y": _numbers(panel.predicted),
        "index": panel.index.tolist(),
        "worst": np.flatnonzero(panel.worst).tolist(),
        "range": [low - 0.04 * (high - low or 1.0), high + 0.04 * (high - low or 1.0)],
    }


def _own(panel: Plotly) -> dict[str, Any]:
    return {"kind": "own", "data": panel.data, "layout": panel.layout}


_KINDS: dict[type, Any] = {
    Lines: _lines, TimeLine: _time_line, RankHeat: _rank_heat, Confusion: _confusion, Scatter: _scatter, Plotly: _own,
}  # fmt: skip


def _mark(mark: Mark) -> dict[str, Any]:
    x, t = _numbers(np.array([mark.x, mark.time_s]))
    return {
        "kind": _plotly_text(mark.kind),
        "x": x,
        "t": t,
        "text": _plotly_text(mark.text),
        "run": mark.run,
        "colour": mark.colour,
    }


def _numbers(values: np.ndarray, decimals: int | None = None) -> list[float | int | None]:
    """For JSON, which has no NaN: None where a value is not finite. Whole numbers are written without a point."""
    if np.isfinite(values).all() and (values == np.trunc(values)).all() and (abs(values) < 2**53).all():
        return values.astype(np.int64).tolist()
    values = values if decimals is None else np.round(values, decimals)
    return [value if np.isfinite(value) else None for value in values.tolist()]


def _plotly_text(text: str) -> str:
    """As plotly wants it, which takes some tags and entities in a text, and &quot; for what it is."""
    return escape(text, quote=False)


def _short(name: str, most: int) -> str:
    """A long name without its middle: names that differ often differ at an end."""
    end = (most - 1) // 2
    return name if len(name) <= most else f"{name[: most - 1 - end]}…{name[-end:]}"


# -- what stands in the page -------------------------------------------------------------------------------------------


def _body(title: str, runs: list[Run], panels: list[Panel]) -> str:
    table = rows(runs)
    parts: dict[str, list[str]] = {}
    for i, panel in enumerate(panels):
        parts.setdefault(_section(panel), []).append(_figure(i, panel))
    sections = [("summary", "Summary", _table(runs, table))]
    for key, name, form in (
        ("curves", "Curves", "plots"), ("results", "Results", "plots"), ("classes", "Classes", "plots"),
        ("worst", "Most wrong", "stack"), ("ranks", "Ranks", "stack"),
    ):  # fmt: skip
        if key in parts:
            sections.append((key, name, f'<div class="{form}">{"".join(parts[key])}</div>'))
    sections.append(("config", "Config", _config(runs)))
    sections.append(("environment", "Environment", _table(runs, environment_rows(runs), "mono")))
    links = "".join(f'<li><a href="#{key}">{name}</a></li>' for key, name, _ in sections)
    axis = _choice("horizontal axis", "axis", ("step", "time"), "") if "curves" in parts else ""
    cards = "".join(_card(i, runs, table) for i in range(len(runs)))
    body = "".join(f'<section id="{key}"><h2>{name}</h2>{text}</section>\n' for key, name, text in sections)
    return f"""<header>
<h1>{escape(title)}</h1>
<p class="soft">Training report, {time.strftime("%Y-%m-%d %H:%M")}</p>
</header>
<nav aria-label="sections"><div><ul>{links}</ul>{axis}</div></nav>
<main>
<div class="cards{" one" if len(runs) == 1 else ""}">{cards}</div>
{body}</main>
<footer>dist_train. This file needs no network; plotly.js draws its plots.</footer>"""


def _card(i: int, runs: list[Run], table: list[Row]) -> str:
    """A run at a glance; of several also what its colour is, and the button that hides it."""
    run, several = runs[i], len(runs) > 1
    cells = {row.key: (row.label, row.cells[i]) for row in table}
    facts = "".join(
        f"<div><dt>{escape(cells[key][0])}</dt><dd>{_figures(cells[key][1])}</dd></div>"
        for key in headlines(run)
        if key in cells and cells[key][1].text != ABSENT
    )
    name = f'<span class="swatch"></span>{escape(run.name)}' if several else escape(_backend(run))
    hide = f'<button data-hide="{i}" aria-pressed="false">hide</button>' if several else ""
    problems = "".join(f"<li>{escape(problem)}</li>" for problem in run.problems)
    return f"""<article class="card run tone" id="run-{i}" style="{_colour(i)}">
<header><h3>{name}</h3>{hide}<span class="status {run.status}">{run.status}</span></header>
{f"<dl class='facts'>{facts}</dl>" if facts else ""}{f"<ul class='problems'>{problems}</ul>" if problems else ""}
</article>"""


def _figures(cell: Cell) -> str:
    return f"<b>{escape(cell.text)}</b>" + (f"<small>{escape(cell.detail)}</small>" if cell.detail else "")


def _backend(run: Run) -> str:
    backend, ranks = (run.environment.get(name) for name in ("backend", "world size"))
    return f"{backend} on {ranks} rank{'s' if ranks != '1' else ''}" if backend else run.folder.name


def _colour(i: int) -> str:
    return f"--on-light: {LIGHT[i % len(LIGHT)]}; --on-dark: {DARK[i % len(DARK)]}"


def _table(runs: list[Run], table: list[Row], form: str = "") -> str:
    """A column for each run."""
    heads = "".join(
        f'<th scope="col" class="tone" style="{_colour(i)}"><span class="swatch"></span>{escape(run.name)}</th>'
        for i, run in enumerate(runs)
    )
    head = f'<thead><tr><th scope="col"><span hidden>key</span></th>{heads}</tr></thead>' if len(runs) > 1 else ""
    lines, best = [], ' class="best" title="the best of these runs"'
    for row in table:
        cells = "".join(f"<td{best if cell.best else ''}>{_figures(cell)}</td>" for cell in row.cells)
        lines.append(f'<tr data-row="{escape(row.key)}"><th scope="row">{escape(row.label)}</th>{cells}</tr>')
    return (
        f"""<div class="card scroll {form}" tabindex="0"><table>{head}<tbody>{"".join(lines)}</tbody></table></div>"""
    )


def _config(runs: list[Run]) -> str:
    """What differs between the runs, or from the defaults, and everything below it."""
    table = config_rows(runs)
    if len(runs) > 1:
        different, what = differing([row for row in table if not row.key.startswith("run.")]), "between these runs"
    else:
        tree = to_tree(Config())
        default = {f"{section}.{key}": shown(value) for section, body in tree.items() for key, value in body.items()}
        different, what = [row for row in table if row.cells[0].text != default.get(row.key)], "from the defaults"
    told = f'<p class="soft">What differs {what}:</p>{_table(runs, different, "mono")}'
    if not different:
        told = f'<p class="soft">Nothing differs {what}.</p>'
    every = (
        f"<details class='card'><summary>All {len(table)} keys</summary>{_table(runs, table, 'mono bare')}</details>"
    )
    return told + (every if table else "")


def _choice(label: str, name: str, values: tuple[str, str], group: str) -> str:
    """Two buttons, of which one is pressed. Each has its value as data-NAME, or else the group has a name."""
    buttons = "".join(
        f'<button {f"data-{name}" if name else "value"}="{value}" aria-pressed="{str(not i).lower()}">{value}</button>'
        for i, value in enumerate(values)
    )
    return f'<div class="choice" role="group" aria-label="{label}"{group}>{buttons}</div>'


def _figure(i: int, panel: Panel) -> str:
    if type(panel) in _MARKUP:
        return _MARKUP[type(panel)](panel)
    log = isinstance(panel, Lines) and panel.can_be_log
    choice = _choice("vertical axis", "", ("linear", "log"), f' data-log="{panel.key}"') if log else ""
    half = isinstance(panel, (Confusion, Scatter, Plotly)) or (isinstance(panel, Lines) and panel.key != "loss")
    wide = "" if half else " wide"
    height = f' style="height: {_height_px(panel)}px"' if _height_px(panel) else ""
    figure = f"""<figure class="card plot{wide}" data-panel="{escape(panel.key)}">
<figcaption><h3>{escape(panel.title)}</h3>{choice}</figcaption>
<div class="canvas" id="plot-{i}"{height}></div><p class="note">{escape(panel.note)}</p></figure>"""
    return figure + (_recall(panel) if isinstance(panel, Confusion) else "")


def _height_px(panel: Panel) -> int | None:
    """Of a plot whose height depends on what is in it."""
    if isinstance(panel, TimeLine):
        return 110 + 34 * len(panel.rows)
    if isinstance(panel, RankHeat):
        return 80 + max(60, min(480, 26 * len(panel.times.own_ms)))
    if isinstance(panel, Plotly):
        asked = panel.layout.get("height")
        return int(min(max(asked, 160), 1200)) if isinstance(asked, int | float) else 360
    return {Confusion: 480, Scatter: 400}.get(type(panel))


def _recall(panel: Confusion) -> str:
    """By class, the worst first: how many are found, and what the others are taken for."""
    shares, lines = panel.shares(), []
    for i in np.argsort(np.diag(shares), kind="stable"):
        total = int(panel.counts[i].sum())
        others = np.where(np.arange(len(shares)) == i, 0, panel.counts[i])
        most = int(others.argmax())
        taken = f"{panel.classes[most]}, {number(int(others[most]))}" if others[most] else ABSENT
        found = shares[i, i]
        bar = f'<div class="bar"><span>{percent(found)}</span><b><i style="width: {found:.2%}"></i></b></div>'
        lines.append(
            f'<tr><th scope="row">{escape(panel.classes[i])}</th><td>{bar if total else ABSENT}</td>'
            f"<td>{escape(taken)}</td><td>{total:,}</td></tr>"
        )
    head = "".join(f'<th scope="col">{name}</th>' for name in ("class", "found", "mostly taken for", "samples"))
    title = escape(panel.title.replace("Confusion matrix", "Recall"))
    return f"""<figure class="card recall" data-panel="{escape(panel.key.replace("confusion", "recall"))}">
<figcaption class="head"><h3>{title}</h3></figcaption>
<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>
</figure>"""


def _section(panel: Panel) -> str:
    if isinstance(panel, Rows) and panel.worst:
        return "worst"
    return _SECTION[type(panel)]


_MARKUP: dict[type, Any] = {Gallery: gallery, MaskGallery: masks, Rows: table}
_SECTION: dict[type, str] = {
    Lines: "curves", TimeLine: "curves", RankHeat: "ranks", Confusion: "classes", Gallery: "worst",
    MaskGallery: "worst", Scatter: "results", Rows: "results", Plotly: "results",
}  # fmt: skip
