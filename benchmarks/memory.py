"""python benchmarks/memory.py [--ranks 2] [--layers 24] [--width 2048] [--backends single,ddp,...] [--json FILE]

What a rank holds under each backend, against theory: 4 bytes a weight for itself, its gradient, and each of AdamW's two
averages, each divided by the ranks where the backend shares it out.

Every backend has processes of its own, as many as ranks, which train the model for a few steps. Counted is resident
memory (VmRSS of /proc/self/status), less that of the same run with a tiny model: the libraries and their threads.
Tensors are mapped each by itself and unmapped when they are freed, so that what is counted is what is in use, not what
glibc keeps for later. `steady` is after a step: gradients are gone then, so it may be less than theory. `peak` is the
most since before the first step, as the kernel counted it (VmHWM). Of the ranks, the largest.
"""

import argparse
import ctypes
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

GB = 1e9
STEPS = 3
M_MMAP_THRESHOLD = -3  # of malloc.h
TINY = 16  # width of the model that is taken off
BACKENDS = "single,ddp,accelerate,fsdp2,deepspeed:0,deepspeed:1,deepspeed:2,deepspeed:3"
# The parts of weights, gradients and optimizer state that a rank holds of N.
SHARED_OUT = {"fsdp2": (1, 1, 1), "deepspeed:1": (0, 0, 1), "deepspeed:2": (0, 1, 1), "deepspeed:3": (1, 1, 1)}


def theory(backend: str, weights: int, ranks: int) -> float:
    """Bytes a rank: weights, gradients, and optimizer state twice as large."""
    shared = SHARED_OUT.get(backend, (0, 0, 0))
    return sum(4 * weights * times / (ranks if part else 1) for times, part in zip((1, 1, 2), shared, strict=True))


def memory(key: str) -> int:
    """Bytes of this process, by a line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status: got no line {key}")


def rank(backend: str, ranks: int, layers: int, width: int, number: int, folder: str, answers: Any) -> None:
    """In a process: puts what it held after a step and at its peak into `answers`."""
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
    name, _, stage = backend.partition(":")
    config = Config(backend=BackendConfig(name, int(stage) if stage else None))
    starter = "torchrun" if ranks > 1 else "none"
    made = backends.create(config, World(number, ranks, number, ranks, torch.device("cpu"), starter))
    torch.manual_seed(0)
    model, _ = made.prepare(
        nn.Sequential(*(nn.Linear(width, width) for _ in range(layers))), factory(OptimConfig("AdamW"))
    )
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # counts VmHWM from here
    for _ in range(STEPS):
        with made.accumulate(last=True):
            made.backward(model(torch.ones(8, width)).square().mean())
        made.step(None, measure=False)
    peak = memory("VmHWM")
    libc.malloc_trim(0)
    leave(answers, (memory("VmRSS"), peak), ranks)


def leave(answers: Any, answer: Any, ranks: int) -> None:
    """Ends the process of a rank, with its answer."""
    import torch.distributed as torch_dist

    answers.put(answer)
    answers.close()
    answers.join_thread()
    if ranks > 1:
        torch_dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads abort the interpreter's exit now and then


def answers_of(function: Callable[..., None], name: str, ranks: int, *of: Any) -> list[Any]:
    """What as many processes as ranks answer, in any order.

    Args:
        function: of a rank, which calls `leave`: of these arguments, its number, a folder of all and where answers go.
        name: of what is measured.
        ranks: how many.
        of: arguments.
    """
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=function, args=(*of, i, folder, answers)) for i in range(ranks)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise SystemExit(f"{name}: a rank ended with {[process.exitcode for process in processes]}")
        return [answers.get() for _ in processes]


def run(backend: str, ranks: int, layers: int, width: int) -> tuple[int, int]:
    """What the rank that held most of a run held after a step, and at its peak, in bytes."""
    got = answers_of(rank, backend, ranks, backend, ranks, layers, width)
    return max(steady for steady, _ in got), max(peak for _, peak in got)


def table(rows: dict[str, dict[str, float]], ranks: int, weights: int, layer: int) -> list[str]:
    """Lines of Markdown, in GB a rank."""
    lines = [
        f"{weights:,} weights on {ranks} ranks; two layers are {2 * layer / GB:.2f} GB",
        "",
        "| | theory | steady | peak | peak / theory |",
        "|---|---|---|---|---|",
    ]
    for backend, row in rows.items():
        shown = " | ".join(f"{row[key] / GB:.2f}" for key in ("theory", "steady", "peak"))
        lines.append(f"| {backend} | {shown} | {row['peak'] / row['theory']:.2f} |")
    return lines


def main() -> None:
    """Measures, shows the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=2048, help="of a layer, a square matrix and a bias")
    parser.add_argument("--backends", default=BACKENDS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    layer = options.width**2 + options.width
    weights, rows = options.layers * layer, {}
    for backend in options.backends.split(","):
        ranks = 1 if backend == "single" else options.ranks
        libraries = run(backend, ranks, options.layers, TINY)
        steady, peak = (
            a - b for a, b in zip(run(backend, ranks, options.layers, options.width), libraries, strict=True)
        )
        rows[backend] = {"theory": theory(backend, weights, ranks), "steady": steady, "peak": peak}
    print("\n".join(table(rows, options.ranks, weights, 4 * layer)))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
