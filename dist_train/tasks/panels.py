"""What a task or a hook of the user's own adds to a run's report: tables, and figures of plotly. Data alone, as JSON:
nothing in the file is ever executed. No torch.
"""

import json
import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dist_train.whole import write_text

NAME = "panels.json"
MOST_ROWS = 2000
MOST_BYTES = 1 << 24


@dataclass(frozen=True)
class Table:
    """Rows below a heading.

    Args:
        title: of the panel; one panel of a run has it.
        columns: their names.
        rows: of each a text, a number, or None for each column.
        note: a line below it.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""


@dataclass(frozen=True)
class Plot:
    """A figure of plotly.

    Args:
        title: of the panel; one panel of a run has it. It takes the place of the figure's own.
        figure: of plotly, or a dict with `data`, a list of traces, and `layout`.
        note: a line below it.
    """

    title: str
    figure: Any
    note: str = ""


Panel = Table | Plot


def encoded(panels: Iterable[Panel]) -> dict[str, dict[str, Any]]:
    """What the file holds of these panels, by title. Raises ValueError for what is no panel."""
    found: dict[str, dict[str, Any]] = {}
    for panel in panels:
        if not isinstance(panel, (Table, Plot)):
            raise ValueError(f"got a panel of type {type(panel).__name__}, expected Table(...) or Plot(...)")
        for what, text in (("title", panel.title), ("note", panel.note)):
            if not isinstance(text, str) or (what == "title" and not text.strip()):
                raise ValueError(f"got {text!r} as the {what} of a panel, expected text")
        if panel.title in found:
            raise ValueError(f"got two panels with the title {panel.title!r}, expected one of each")
        body = _table(panel) if isinstance(panel, Table) else _plot(panel)
        found[panel.title] = {"title": panel.title, "note": panel.note} | body
    return found


def write(folder: Path, found: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes the file, whole or not at all."""
    write_text(folder / NAME, json.dumps({"panels": list(found.values())}, allow_nan=False) + "\n")


def read(folder: Path) -> list[Panel]:
    """The panels in a run's folder; none if it has no file of them. Raises ValueError or OSError for a bad one."""
    try:
        tree = json.loads((folder / NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    try:
        found = [_decoded(one) for one in tree["panels"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no panels in it: {type(error).__name__} {error}") from None
    encoded(found)
    return found


def _decoded(one: Mapping[str, Any]) -> Panel:
    if one["kind"] == "table":
        return Table(one["title"], one["columns"], one["rows"], one["note"])
    return Plot(one["title"], {"data": one["data"], "layout": one["layout"]}, one["note"])


def _table(table: Table) -> dict[str, Any]:
    name, columns = f"the table {table.title!r}", [str(column) for column in table.columns]
    rows = [list(row) for row in table.rows]
    if len(rows) > MOST_ROWS:
        raise ValueError(f"got {len(rows):,} rows in {name}, expected at most {MOST_ROWS:,}; keep those that matter")
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(
                f"got a row of {len(row)} cells in {name}, expected {len(columns)}: {', '.join(columns) or 'none'}"
            )
    return {"kind": "table", "columns": columns, "rows": [[_cell(cell, name) for cell in row] for row in rows]}


def _cell(cell: Any, name: str) -> str | int | float | bool | None:
    if cell is None or isinstance(cell, (str, bool)):
        return cell
    if isinstance(cell, numbers.Integral):
        return int(cell)
    try:
        value = float(cell)
    except (TypeError, ValueError, RuntimeError):  # torch's, of a tensor with several numbers
        raise ValueError(
            f"got a cell of type {type(cell).__name__} in {name}, expected text, a number or None"
        ) from None
    return value if np.isfinite(value) else str(value)


def _plot(plot: Plot) -> dict[str, Any]:
    name, figure = f"the plot {plot.title!r}", plot.figure
    if not isinstance(figure, Mapping):
        to_json = getattr(figure, "to_json", None)
        text = to_json() if callable(to_json) else None
        if not isinstance(text, str):
            raise ValueError(
                f"got {type(figure).__name__} as the figure of {name}, expected one of plotly, or a dict with data and "
                f"layout"
            )
    else:
        try:
            text = json.dumps(figure, default=_plain)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"got a figure in {name} that cannot be written as JSON: {error}") from None
    if len(text) > MOST_BYTES:
        raise ValueError(
            f"got {len(text) / 1e6:,.0f} MB of JSON in {name}, expected at most {MOST_BYTES / 1e6:,.0f}; draw fewer "
            f"points"
        )
    tree = json.loads(text, parse_constant=lambda _: None)  # plotly's word for what is not finite
    tree = tree if isinstance(tree, dict) else {}
    data, layout = tree.get("data"), tree.get("layout") or {}
    if not isinstance(data, list) or not isinstance(layout, dict) or not all(isinstance(one, dict) for one in data):
        raise ValueError(f"got a figure without a list of traces in {name}, expected a dict with data and layout")
    return {"kind": "plot", "data": data, "layout": {key: value for key, value in layout.items() if value is not None}}


def _plain(value: Any) -> Any:
    """Lists and numbers of an array, or of a tensor."""
    array = np.asarray(value)
    if array.dtype == object:
        raise TypeError(f"{type(value).__name__} is no number, text or array")
    return array.tolist()
