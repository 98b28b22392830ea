"""A run at a glance, without reading all of what it recorded: for lists of many runs."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dist_train.report.files import METRICS
from dist_train.report.read import newest, status_of, total_steps
from dist_train.track.status import summary_of
from dist_train.track.words import lower_is_better, parts_of

TAIL_BYTES = 1 << 16
BLOCK_BYTES = 1 << 22
EVALUATED, STARTED = b'"eval/', b'"world_size"'


@dataclass(frozen=True)
class Glance:
    """What a list of runs says of one.

    Args:
        folder: of the run.
        status: running, finished, preempted, or unfinished.
        backend: None where nothing says it.
        world_size: likewise.
        steps: optimizer steps done.
        total_steps: that its config asks for, if it is known.
        metric: that the best is decided by, such as eval/accuracy; None before the first evaluation.
        best: its best value.
        best_step: at which step.
        loss: the newest train/loss.
        written_at: unix seconds, when it last recorded something.
    """

    folder: Path
    status: str
    backend: str | None
    world_size: int | None
    steps: int
    total_steps: int | None
    metric: str | None
    best: float | None
    best_step: int | None
    loss: float | None
    written_at: float


def glance(folder: Path) -> Glance:
    """Reads the end of metrics.jsonl, and of the rest only the lines with an evaluation or a start."""
    summary = summary_of(folder)
    path = folder / METRICS
    try:
        tail, written_at = _tail(path), path.stat().st_mtime
        best, start = _scan(path)
    except OSError:  # not there yet, or not ours to read
        tail, best, start, written_at = [], None, {}, (folder / "config.yaml").stat().st_mtime
    last = next((line for line in reversed(tail) if _number(line.get("step")) is not None), {})
    loss = next((line["train/loss"] for line in reversed(tail) if "train/loss" in line), None)
    status = status_of(folder, summary)
    steps = int(_number(summary.get("steps") if status == "finished" else last.get("step")) or 0)
    who = summary if "backend" in summary else start
    if not who and (checkpoint := newest(folder)):
        who = {"backend": checkpoint.backend, "world_size": checkpoint.world_size}
    total = steps
    if status != "finished":
        total = total_steps(_config(folder), steps, _number(last.get("epoch")) or 0.0)
    backend, world_size = who.get("backend"), _number(who.get("world_size"))
    return Glance(
        folder, status, backend if isinstance(backend, str) else None, int(world_size) if world_size else None, steps,
        total, *(best or (None, None, None)), _number(loss), written_at,
    )  # fmt: skip


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def _json(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _tail(path: Path) -> list[dict[str, Any]]:
    """The last whole lines."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        lines = file.read(TAIL_BYTES).split(b"\n")
    return [_json(line) for line in lines[-9:-1]]


def _scan(path: Path) -> tuple[tuple[str, float, int] | None, dict[str, Any]]:
    """What the best is decided by, its best value with the step, and the newest line about who trains. Of other lines
    nothing is parsed."""
    best: tuple[str, float, int] | None = None
    start: dict[str, Any] = {}
    with path.open("rb") as file:
        rest = b""
        while block := file.read(BLOCK_BYTES):
            block = rest + block
            end = block.rfind(b"\n") + 1
            block, rest = block[:end], block[end:]
            for line in _lines_with(STARTED, block):
                start = line
            for line in _lines_with(EVALUATED, block):
                best = _better(best, line, start)
    return best, start


def _better(
    best: tuple[str, float, int] | None, line: dict[str, Any], start: dict[str, Any]
) -> tuple[str, float, int] | None:  # fmt: skip
    """The better one of the best so far and what a line has."""
    metric = start.get("best_metric")
    if not isinstance(metric, str) or metric not in line:  # of an older run, or of one that evaluates on its own
        metric = best[0] if best else next((name for name in ("eval/accuracy", "eval/loss") if name in line), "")
    found, step = _number(line.get(metric)), _number(line.get("step"))
    if found is None or step is None:
        return best
    splits, lower = (start.get(key) for key in ("test_splits", "lower_is_better"))
    name = parts_of(metric, splits if isinstance(splits, list) else ())[1]
    lowest = lower_is_better(name, {"loss", *(lower if isinstance(lower, list) else ())})
    if best is None or best[0] != metric or (found < best[1] if lowest else found > best[1]):
        return metric, found, int(step)
    return best


def _lines_with(word: bytes, block: bytes) -> list[dict[str, Any]]:
    found, at = [], block.find(word)
    while at >= 0:
        end = block.index(b"\n", at)
        found.append(_json(block[block.rfind(b"\n", 0, at) + 1 : end]))
        at = block.find(word, end)
    return found


def _config(folder: Path) -> dict[str, Any]:
    """Of the config the numbers that tell how long it trains: other types need the reader that knows the fields."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        train = yaml.load((folder / "config.yaml").read_text(encoding="utf-8"), loader)["train"]
        return {f"train.{key}": train.get(key) for key in ("epochs", "max_steps")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
        return {}
