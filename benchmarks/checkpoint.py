"""torchrun --nproc_per_node=2 benchmarks/checkpoint.py [--dir DIR] [--repeats 5] [--width 2048]

What a save costs at 1 GB of state (AdamW, 85 million weights) under DDP, against a plain torch.save of the same bytes,
synced, by one process; and how long an asynchronous save holds up the loop, against the copy to host memory alone.
Interleaved in one run; every file is new.
"""

import argparse
import os
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_train import backends
from dist_train.backends.shards import HostCopy
from dist_train.checkpoint.manifest import Best
from dist_train.checkpoint.places import Local
from dist_train.checkpoint.save import Checkpoints, Facts
from dist_train.config.tree import CheckpointConfig, Config, RunConfig
from dist_train.data.order import Plan
from dist_train.loop.meter import Control, Meter
from dist_train.ranks import dist, ending, launcher

LAYERS = 20
ROWS = ("plain torch.save + sync", "synchronous save", "asynchronous save, stall", "copy to host memory")


class Silent:
    """Takes metrics and drops them."""

    def log(self, metrics: Any, line: str | None) -> None:
        """See meter.Sink."""


def main() -> None:
    """Measures on all ranks, reports on rank 0."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--dir", default="/tmp/dist_train_checkpoint_bench")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--width", type=int, default=2048, help="of the model's layers")
    options = parser.parse_args()
    start, device = launcher.detect(), torch.device("cpu")
    folder = Path(options.dir)
    with dist.joined(start, device) as world:
        config = Config(run=RunConfig(str(folder)))
        backend = backends.create(config, world)
        model = nn.Sequential(*(nn.Linear(options.width, options.width) for _ in range(LAYERS)))
        called, _ = backend.prepare(model, lambda parameters: torch.optim.AdamW(parameters))
        with backend.accumulate(last=True):
            backend.backward(called(torch.ones(1, options.width)).sum())
        backend.step(None, measure=False)
        savers = {}
        for asynchronous in (False, True):
            saving = Config(checkpoint=CheckpointConfig(every_steps=1, keep_last=1, asynchronous=asynchronous))
            place = Local(folder / str(asynchronous))
            savers[asynchronous] = Checkpoints(
                saving, world, place, Facts({}, 1, 1, lambda: ""), backend, Best("eval/loss", True)
            )
        plan = Plan.of(10**6, config, world)
        meter, host = Meter(Silent(), 10**6, plan, 10**6, device, Control()), HostCopy()
        times: dict[str, list[float]] = {row: [] for row in ROWS}
        for repeat in range(options.repeats + 1):
            meter.result.steps = repeat + 1
            took = (
                timed(lambda: plain(backend, folder) if world.is_main else None),
                timed(lambda: savers[False].save(meter)),
                timed(lambda: savers[True].save(meter)),
                timed(savers[True]._wait) * 0 + timed(lambda: host.of(backend.state())),
            )
            for row, seconds in zip(ROWS, took, strict=True):
                if repeat:  # the first allocates
                    times[row].append(seconds)
        for saver in savers.values():
            saver.close()
        if world.is_main:
            shutil.rmtree(folder)
            report(times)


def plain(backend: Any, folder: Path) -> None:
    """The same tensors in one file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"plain-{time.monotonic_ns()}.pt"
    state = {f"{name}-{i}": part for name, s in backend.state().items() for i, (_, part) in enumerate(s.boxes)}
    with path.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    path.unlink()


def timed(action: Any) -> float:
    """Seconds until all ranks are done, counted from when all begin."""
    dist.gather(None)
    start = time.perf_counter()
    action()
    seconds = time.perf_counter() - start
    return max(dist.gather(seconds))


def report(times: dict[str, list[float]]) -> None:
    """The table."""
    bases = {ROWS[1]: ROWS[0], ROWS[2]: ROWS[3]}
    for row, seconds in times.items():
        ratio = ""
        if row in bases:
            ratios = [a / b for a, b in zip(seconds, times[bases[row]], strict=True)]
            ratio = f"  {statistics.median(ratios):.2f} times the {bases[row]}"
        spread = f"{min(seconds):.2f}-{max(seconds):.2f}"
        print(f"{row:<26} {statistics.median(seconds):6.2f} s ({spread}){ratio}")


if __name__ == "__main__":
    main()
    ending.leave(ending.OK)
