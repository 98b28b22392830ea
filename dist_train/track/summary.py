"""summary.json of a run that finished."""

import json
import math
import statistics
import subprocess
from pathlib import Path
from typing import Any

import torch

from dist_train.config.tree import Config
from dist_train.loop.meter import Result
from dist_train.ranks.dist import World, device_name
from dist_train.track.base import Course, Summary
from dist_train.versions import versions


def finished(config: Config, world: World, backend: str, result: Result, stalls_s: list[float], unit: str) -> Summary:
    """What a run did, how fast, and with what.

    Args:
        config: of the run.
        world: this rank's place.
        backend: that trained.
        result: of the run.
        stalls_s: seconds that training waited for each checkpoint.
        unit: of the task.
    """
    return {
        "status": "finished",
        "backend": backend,
        "world_size": world.size,
        "steps": result.steps,
        "epochs": result.epochs,
        "samples": result.samples,
        "train_s": result.train_s,
        **{f"{name}_per_s": rate for name, rate in result.rates(unit).items()},
        **result.evaluation,
        "first_step_s": result.first_step_s,
        **_compiled(config, result),
        **_saved(stalls_s),
        **_profiled(result),
        **_durations(result.step_ms),
        "launcher": world.launcher,
        "device": str(world.device.type),
        "device_name": device_name(world.device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "git_commit": _git_commit(),
    }


def best(path: Path, course: Course) -> Summary:
    """`best`: of each metric of an evaluation its best value in the whole run, and the step of it.

    Args:
        path: metrics.jsonl, which knows the evaluations of all starts of the run.
        course: says which way the metrics get better.
    """
    found: dict[str, dict[str, float]] = {}
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if '"eval/' in line]
    except (OSError, ValueError):  # the file's tracker may have failed
        return {}
    for line in lines:
        for name in course.results:
            value, before = line.get(name), found.get(name)
            if not isinstance(value, int | float) or not math.isfinite(value):
                continue
            better = before is None or (value < before["value"] if name in course.lowest else value > before["value"])
            if better:
                found[name] = {"value": value, "step": line["step"]}
    return {"best": found} if found else {}


def _saved(stalls_s: list[float]) -> dict[str, dict[str, float]]:
    if not stalls_s:
        return {}
    stall = {"median": statistics.median(stalls_s), "max": max(stalls_s)}
    return {"checkpoint": {"saves": len(stalls_s), "stall_s": stall}}


def _profiled(result: Result) -> dict[str, Any]:
    """What `profile/a` and `profile/b/c` give, as keys within keys."""
    tree: dict[str, Any] = {}
    for name, value in result.profile.items():
        *sections, key = name.split("/")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[key] = value
    return tree


def _durations(step_ms: list[float]) -> dict[str, dict[str, float]]:
    if not step_ms:  # killed after the last checkpoint: no step was left
        return {}
    quantiles = statistics.quantiles(step_ms, n=20, method="inclusive") if len(step_ms) > 1 else None
    return {"step_ms": {"p50": statistics.median(step_ms), "p95": quantiles[18] if quantiles else step_ms[0]}}


def _compiled(config: Config, result: Result) -> dict[str, dict[str, float]]:
    if config.compile.mode == "off" and config.compile.scope == "model":
        return {}
    names = ("graphs", "recompilations", "cached_graphs", "first_step_s")
    names += ("prepare_s",) if config.compile.scope == "step" else ()
    return {"compile": {name: getattr(result, name) for name in names}}


def _git_commit() -> str | None:
    """The commit of the folder that the run was started in; None outside a repository."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
