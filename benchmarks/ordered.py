"""python benchmarks/ordered.py [--rounds 5] [--layers 12] [--width 1024] [--slices 8] [--samples 32] [--json FILE]

What sums in a fixed order (backend.reduce: ordered) cost: time and memory of a step, by those of backend.reduce: fast.

A step is of as many slices (train.micro_batch_size) with so many samples each. fast is measured twice: with the same
slices, and with none, as one would run it where memory allows. Every cell has processes of its own, as many as ranks,
with one thread each; the cells take turns. Time is the CPU time of all ranks, the median of the rounds' ratios. Memory
is what the largest rank held at its peak, less that of a tiny model, as in memory.py.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from memory import M_MMAP_THRESHOLD, TINY, answers_of, leave, memory

STEPS = 3
WAYS = {"ordered": ("ordered", True), "slices": ("fast", True), "whole": ("fast", False)}
BACKENDS = ("single:1", "ddp:2", "fsdp2:2")


def rank(backend: str, ranks: int, way: str, options: Any, width: int, number: int, folder: str, answers: Any) -> None:
    """In a process: puts the CPU time of its steps, in seconds, and its peak, in bytes, into `answers`."""
    import ctypes

    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 1 << 16)

    import torch
    import torch.distributed as torch_dist
    from torch import nn

    from dist_train import backends
    from dist_train.config.tree import BackendConfig, Config, OptimConfig
    from dist_train.loop.optim import factory
    from dist_train.ranks.dist import World

    torch.set_num_threads(1)
    if ranks > 1:
        torch_dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=number, world_size=ranks)
    reduce, sliced = WAYS[way]
    config = Config(backend=BackendConfig(backend, reduce=reduce))
    starter = "torchrun" if ranks > 1 else "none"
    made = backends.create(config, World(number, ranks, number, ranks, torch.device("cpu"), starter))
    torch.manual_seed(0)
    model, _ = made.prepare(
        nn.Sequential(*(nn.Linear(width, width) for _ in range(options.layers))),
        factory(OptimConfig("AdamW"), unfused=reduce == "ordered"),
    )
    pieces = options.slices // ranks if sliced else 1
    inputs = torch.ones(options.slices * options.samples // ranks // pieces, width)

    def step() -> None:
        for piece in range(1, pieces + 1):
            with made.accumulate(last=piece == pieces):
                made.backward(model(inputs).square().mean())
        made.step(None, measure=False)

    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # counts VmHWM from here
    step()
    begin = time.process_time()
    for _ in range(STEPS):
        step()
    leave(answers, (time.process_time() - begin, memory("VmHWM")), ranks)


def run(cell: str, way: str, options: Any, width: int) -> tuple[float, int]:
    """CPU seconds of all ranks, and bytes of the largest."""
    backend, _, ranks = cell.partition(":")
    got = answers_of(rank, cell, int(ranks), backend, int(ranks), way, options, width)
    return sum(seconds for seconds, _ in got), max(peak for _, peak in got)


def main() -> None:
    """Measures, and prints a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=1024, help="of a layer, a square matrix and a bias")
    parser.add_argument("--slices", type=int, default=8, help="of a step, over all ranks")
    parser.add_argument("--samples", type=int, default=64, help="of a slice")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    weights = options.layers * (options.width**2 + options.width)
    step = f"a step of {options.slices} slices of {options.samples} samples"
    print(f"{weights:,} weights, {step}, {options.rounds} rounds\n")
    print("| | time / fast with slices | time / fast in one piece | memory | fast with slices |\n|---|---|---|---|---|")
    rows = {}
    for cell in BACKENDS:
        tiny = {way: run(cell, way, options, TINY)[1] for way in WAYS}
        got = {way: [] for way in WAYS}
        for turn in range(options.rounds):
            for way in sorted(WAYS, reverse=bool(turn % 2)):
                got[way].append(run(cell, way, options, options.width))
        times = {
            way: statistics.median(a[0] / b[0] for a, b in zip(got["ordered"], got[way], strict=True))
            for way in ("slices", "whole")
        }
        held = {way: (statistics.median(peak for _, peak in got[way]) - tiny[way]) / (4 * weights) for way in WAYS}
        rows[cell] = {"times": times, "held": held}
        backend, _, ranks = cell.partition(":")
        name = backend if ranks == "1" else f"{backend} x{ranks}"
        print(
            f"| {name} | {times['slices']:.2f} | {times['whole']:.2f} | {held['ordered']:.1f} | {held['slices']:.1f} |",
            flush=True,
        )
    print("\nMemory is in sizes of the whole model, of which weights and AdamW's state are three.")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
