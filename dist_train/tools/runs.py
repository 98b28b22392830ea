"""python -m dist_train runs [DIR] [--json]: the runs in DIR (runs) and in the folders below it, newest first.

Age is the time since a run last recorded something. The best is that of the metric which the best checkpoint is decided
by: the first of task.metrics, unless checkpoint.best_metric names another.
"""

import dataclasses
import json
import time
from pathlib import Path

from dist_train.columns import columns
from dist_train.errors import ConfigError
from dist_train.ranks import ending
from dist_train.ranks.launcher import Launcher
from dist_train.report.files import runs_below
from dist_train.report.glance import Glance, glance
from dist_train.report.text import duration, figure, number

HEAD = ("run", "status", "backend", "steps", "best", "loss", "age")


def run(argv: list[str], launcher: Launcher) -> int:
    """Prints the table, or a list of JSON."""
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return ending.OK
    places = [word for word in argv if word != "--json"]
    if len(places) > 1 or any(word.startswith("-") for word in places):
        raise ConfigError(f"command line: got {' '.join(argv)}, expected at most a folder; write runs [DIR] [--json]")
    place = Path(*places or ["runs"])
    if not place.is_dir():
        raise ConfigError(
            f"command line: got {place}, which is no folder, expected one with runs in it; for example runs ."
        )
    found = sorted((glance(folder) for folder in runs_below(place)), key=lambda one: one.written_at, reverse=True)
    if "--json" in argv:
        print(json.dumps([dataclasses.asdict(one) | {"folder": str(one.folder)} for one in found]))
    elif not found:
        print(f"no runs in {place}")
    else:
        print(columns([HEAD, *(_row(one, place) for one in found)]))
    return ending.OK


def _row(one: Glance, place: Path) -> tuple[str, ...]:
    name = one.folder.relative_to(place).as_posix()
    of = f"/{one.total_steps}" if one.total_steps is not None else ""
    best = "-"
    if one.metric is not None and one.best is not None:
        best = f"{one.metric.removeprefix('eval/')} {figure(one.metric, one.best)} at {one.best_step}"
    return (
        name if name != "." else place.resolve().name,
        one.status,
        f"{one.backend or '?'} x {one.world_size or '?'}",
        f"{one.steps}{of}",
        best,
        number(one.loss) if one.loss is not None else "-",
        duration(max(1.0, time.time() - one.written_at)),
    )
