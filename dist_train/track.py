"""What a run says: console lines, metrics.jsonl and summary.json, from rank 0 alone."""

import contextlib
import itertools
import json
import os
import platform
import statistics
import subprocess
import time
from importlib.metadata import version
from pathlib import Path

import torch

from dist_train.backends import chosen
from dist_train.check import run_folder
from dist_train.config import Config, dump
from dist_train.dist import World, device_name
from dist_train.meter import Metrics, Result, duration

PACKAGES = ("dist-train", "torch", "torchvision", "numpy")


class Tracker:
    """Writes in the run's folder, and to the console; on the other ranks it does nothing.

    Args:
        folder: the run's folder; None on a rank that does not write.
    """

    def __init__(self, folder: Path | None):
        self.folder = folder
        self.file = None
        if folder is not None:
            self.file = (folder / "metrics.jsonl").open("w", encoding="utf-8", buffering=1)  # a line at a time

    def say(self, line: str) -> None:
        """A line for people."""
        if self.folder is not None:
            print(line, flush=True)

    def log(self, metrics: Metrics, line: str) -> None:
        """A line of metrics.jsonl, whose floats read back exactly, and one for people."""
        if self.file is not None:
            self.file.write(json.dumps(metrics) + "\n")
        self.say(line)

    def finish(self, config: Config, world: World, result: Result) -> None:
        """summary.json, and a last line that says where the results are."""
        if self.folder is None:
            return
        quantiles = statistics.quantiles(result.step_ms, n=20, method="inclusive") if len(result.step_ms) > 1 else None
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
            "step_ms": {
                "p50": statistics.median(result.step_ms),
                "p95": quantiles[18] if quantiles else result.step_ms[0],
            },
            "launcher": world.launcher,
            "device": str(world.device.type),
            "device_name": device_name(world.device),
            "threads": torch.get_num_threads(),
            "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
            "git_commit": _git_commit(),
        }
        if config.compile.mode != "off" and (result.recompilations or not result.graphs):
            self.say(
                f"compile: {result.graphs} graphs, {result.recompilations} after the first epoch and evaluation. "
                f"TORCH_LOGS=recompiles shows why; python -m dist_train explain shows where the graph breaks"
            )
        write(self.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        self.say(
            f"finished: accuracy {result.evaluation['eval/accuracy']:.2%}, loss {result.evaluation['eval/loss']:.4f}, "
            f"{result.steps} steps in {duration(result.train_s)}, {summary['samples_per_s']:,.0f} samples/s\n"
            f"results in {self.folder}"
        )


def _compiled(config: Config, result: Result) -> dict[str, dict[str, float]]:
    if config.compile.mode == "off":
        return {}
    names = ("graphs", "recompilations", "cached_graphs", "first_step_s")
    return {"compile": {name: getattr(result, name) for name in names}}


def open_folder(config: Config) -> Path:
    """Makes the run's folder and writes the resolved config in it. Called on rank 0."""
    folder = run_folder(config)
    if folder is None:
        folder = _new_folder(Path("runs"), f"{config.data.name}-{config.model.name}-{time.strftime('%Y%m%d-%H%M%S')}")
    elif (folder / "metrics.jsonl").exists():
        print(f"{folder} holds a run that did not finish; it starts anew", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "config.yaml", dump(config))
    return folder


def _new_folder(parent: Path, name: str) -> Path:
    """A folder that no other run has, also if several start in the same second."""
    parent.mkdir(parents=True, exist_ok=True)
    name = name.replace(":", ".").replace("/", ".")
    for attempt in itertools.count(1):
        folder = parent / (name if attempt == 1 else f"{name}-{attempt}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder
    raise AssertionError


def write(path: Path, text: str) -> None:
    """A file that is whole or absent."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def _git_commit() -> str | None:
    """The commit of the folder that the run was started in; None outside a repository."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
