"""What a run says: console lines, metrics.jsonl and summary.json, from rank 0 alone."""

import json
import os
import statistics
import subprocess
from pathlib import Path
from typing import Any

import torch

from dist_train.backends import chosen
from dist_train.config import Config
from dist_train.dist import World, device_name
from dist_train.folder import write
from dist_train.meter import Metrics, Result, duration
from dist_train.versions import versions


class Tracker:
    """Writes in the run's folder, and to the console; on the other ranks it does nothing.

    Args:
        folder: the run's folder; None on a rank that does not write.
        step: that the run goes on from. What was recorded after it is dropped, as it will come again.
    """

    def __init__(self, folder: Path | None, step: int = 0):
        self.folder = folder
        self.file = None
        if folder is not None:
            path = folder / "metrics.jsonl"
            path.touch()
            os.truncate(path, _end_of(path, step))
            self.file = path.open("a", encoding="utf-8", buffering=1)  # a line at a time

    def say(self, line: str) -> None:
        """A line for people."""
        if self.folder is not None:
            print(line, flush=True)

    def log(self, metrics: Metrics, line: str | None) -> None:
        """A line of metrics.jsonl, whose floats read back exactly, and one for people."""
        if self.file is not None:
            self.file.write(json.dumps(metrics) + "\n")
        if line is not None:
            self.say(line)

    def close(self) -> None:
        """No more is written."""
        if self.file is not None:
            self.file.close()

    def stopped(self, why: str, step: int) -> None:
        """summary.json of a run that was asked to end, and what to do next."""
        if self.folder is not None:
            summary = {"status": "preempted", "steps": step, "by": why}
            write(self.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
            self.say(f"stopped by {why} after step {step}, and saved; --run.dir {self.folder} goes on from there")

    def finish(self, config: Config, world: World, result: Result, stalls_s: list[float]) -> None:
        """summary.json, and a last line that says where the results are."""
        if self.folder is None:
            return
        summary = {
            "status": "finished",
            "backend": chosen(config.backend.name, world.launcher),
            "world_size": world.size,
            "steps": result.steps,
            "epochs": result.epochs,
            "samples": result.samples,
            "train_s": result.train_s,
            "samples_per_s": result.samples / result.train_s,
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
        if config.compile.mode != "off" and (result.recompilations or not result.graphs):
            self.say(
                f"compile: {result.graphs} graphs, {result.recompilations} after the first epoch and evaluation. "
                f"TORCH_LOGS=recompiles shows why; python -m dist_train explain shows where the graph breaks"
            )
        write(self.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        if stalls_s:
            median_ms = statistics.median(stalls_s) * 1e3
            self.say(f"{len(stalls_s)} checkpoints, for each of which training waited {median_ms:.0f} ms")
        self.say(
            f"finished: accuracy {result.evaluation['eval/accuracy']:.2%}, loss {result.evaluation['eval/loss']:.4f}, "
            f"{result.steps} steps in {duration(result.train_s)}, {summary['samples_per_s']:,.0f} samples/s\n"
            f"results in {self.folder}"
        )


def _end_of(path: Path, step: int) -> int:
    """Bytes of metrics.jsonl up to the last line of `step`. A line that was cut off by a kill ends it too."""
    end = 0
    with path.open("rb") as file:
        for line in file:
            try:
                if json.loads(line)["step"] > step or not line.endswith(b"\n"):
                    break
            except (ValueError, KeyError, TypeError):
                break
            end += len(line)
    return end


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
    if config.compile.mode == "off":
        return {}
    names = ("graphs", "recompilations", "cached_graphs", "first_step_s")
    return {"compile": {name: getattr(result, name) for name in names}}


def _git_commit() -> str | None:
    """The commit of the folder that the run was started in; None outside a repository."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
