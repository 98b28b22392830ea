"""The cost of a step by its parts: measured here, fitted, and predicted for larger world sizes.

python benchmarks/scaling.py measure [--rounds 3] [--out benchmarks/scaling.json]
python benchmarks/scaling.py show [--of benchmarks/scaling.json] [--picture docs/images/scaling.png]

`show` also prints and draws what meshes.py predicts of decoders on many GPUs.

`measure` goes through the package's own loop, in one process and as DDP on gloo, and times all-reduces and the feed:
all of them in turns, in rounds of new processes. Of each figure it keeps the duration that one in twenty falls below,
as most of the others were waiting for a core that another program had. `show` prints the tables of docs/scaling.md and
draws its picture; it needs matplotlib.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import meshes
import numpy as np

ROOT = Path(__file__).parent.parent
WEIGHTS = 784 * 512 + 512 + 512 * 512 + 512 + 512 * 10 + 10  # of the default model on 28x28 pixels
GRADIENT_BYTES = 4 * WEIGHTS
BATCHES = (1, 16, 64, 256, 1024)
TOGETHER = (64, 256, 1024)  # global batches of DDP
REDUCED_BYTES = (1 << 12, 1 << 16, 1 << 20, GRADIENT_BYTES, 1 << 24)
TURNS = 6
SAMPLES_A_TURN, MOST_STEPS = 8192, 100
REDUCTIONS_A_TURN = 20
Measured = dict[str, dict[str, float]]  # milliseconds


# -- measured ---------------------------------------------------------------------------------------------------------


def measure(rounds: int) -> Measured:
    """Of each figure the duration that one in twenty falls below."""
    found: dict[str, dict[str, list[float]]] = {}
    for done in range(rounds):
        for ranks in (1, 2, 4):
            for name, taken in _start(ranks).items():
                for key, ms in taken.items():
                    found.setdefault(name, {}).setdefault(key, []).extend(ms)
        print(f"round {done + 1} of {rounds}", file=sys.stderr, flush=True)
    return {
        name: {key: round(statistics.quantiles(ms, n=20)[0], 4) for key, ms in taken.items()}
        for name, taken in found.items()
    }


def _start(ranks: int) -> dict[str, dict[str, list[float]]]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = ["timeout", "300", sys.executable, *torchrun, __file__, "work"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: code {done.returncode}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def work() -> None:
    """A rank of `measure`: takes what it measures in turns. Rank 0 prints."""
    import torch

    from dist_train.ranks import dist, ending
    from dist_train.ranks.launcher import detect

    torch.set_num_threads(1)
    with dist.joined(detect(), torch.device("cpu")) as world:
        cells: dict[tuple[str, int], Callable[[], list[float]]] = {}
        if world.size == 1:
            cells |= {("alone", batch): stepper("single", batch, world) for batch in BATCHES}
            cells |= {("feed", batch): feeder(batch) for batch in BATCHES}
        else:
            cells |= {(f"reduce {world.size}", size): reducer(size) for size in REDUCED_BYTES}
        cells |= {(f"ddp {world.size}", batch): stepper("ddp", batch, world) for batch in TOGETHER}
        found: dict[str, dict[int, list[float]]] = {}
        for turn in range(TURNS + 1):
            for (name, key), cell in cells.items():
                taken = cell()
                if turn:  # the first is not warm
                    found.setdefault(name, {}).setdefault(key, []).extend(taken)
        if world.is_main:
            print(json.dumps(found), flush=True)
    ending.leave(ending.OK)


def stepper(name: str, batch: int, world: Any) -> Callable[[], list[float]]:
    """Steps of a backend, by the package's own loop."""
    from dist_train import backends
    from dist_train.config.load import load
    from dist_train.loop import optim
    from dist_train.loop.meter import Control
    from dist_train.loop.train import train
    from dist_train.loop.work import Work
    from dist_train.run import assemble
    from dist_train.tools.trajectory import Recorder

    steps = min(MOST_STEPS, SAMPLES_A_TURN // batch)
    argv = ["--backend.name", name, "--data.name", "synthetic", "--data.args.n_test", "64", "--train.device", "cpu"]
    argv += ["--train.global_batch_size", str(batch), "--train.max_steps", str(steps), "--train.epochs", "1000"]
    config = load([*argv, "--train.eval_every_epochs", "null", "--train.threads", "1"])
    parts = assemble.build(config, world.device)
    backend = backends.create(config, world, parts.findings)
    prepared = backend.prepare(parts.model, optim.factory(config.optim, parts.model))
    of = config, world, backend, *prepared, parts.task, parts.feed, parts.evaluation(config, world)
    return lambda: train(Work(*of, Recorder(), Control(), lambda meter: None)).step_ms


def feeder(batch: int) -> Callable[[], list[float]]:
    """Batches of the feed, which are a part of every step: the mean of a pass, as it gathers small ones together."""
    import torch

    from dist_train.data.feed import Feed
    from dist_train.data.order import Plan
    from dist_train.data.synthetic import synthetic

    data = synthetic("", False, n=SAMPLES_A_TURN, n_test=64)
    feed = Feed(data.train, data, torch.device("cpu"), torch.float32, True, False)

    def once() -> list[float]:
        begin = time.perf_counter()
        count = sum(1 for _ in feed(Plan(len(data.train), 0, batch, None, True, 0, 1).indices(0)))
        return [(time.perf_counter() - begin) / count * 1e3]

    return lambda: [ms for _ in range(5) for ms in once()]


def reducer(size: int) -> Callable[[], list[float]]:
    """All-reduces of `size` bytes."""
    import torch
    import torch.distributed as torch_dist

    tensor = torch.zeros(size // 4)

    def once() -> float:
        torch_dist.barrier()
        begin = time.perf_counter()
        torch_dist.all_reduce(tensor)
        return (time.perf_counter() - begin) * 1e3

    return lambda: [once() for _ in range(REDUCTIONS_A_TURN)]


# -- fitted -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Link:
    """What joins the ranks.

    Args:
        latency_s: of a message.
        bytes_per_s: in one direction.
    """

    latency_s: float
    bytes_per_s: float

    def ring_s(self, ranks: int, size: float) -> float:
        """An all-reduce in a ring: every rank sends its share of `size` bytes 2 (n - 1) times."""
        return 2 * (ranks - 1) * (self.latency_s + size / ranks / self.bytes_per_s)

    def tree_s(self, ranks: int, size: float) -> float:
        """Up a binary tree and down again, whole messages."""
        return 2 * math.log2(ranks) * (self.latency_s + size / self.bytes_per_s)

    def piped_s(self, ranks: int, size: float) -> float:
        """The same in small pieces, of which many are on the way at once."""
        return 2 * math.log2(ranks) * self.latency_s + (ranks > 1) * 2 * size / self.bytes_per_s


@dataclass(frozen=True)
class Fit:
    """The parameters of the model on this machine, in seconds."""

    overhead_s: float  # of a step in one process, whatever its batch
    sample_s: float  # of a sample: forward, backward, and the feed
    ddp_s: float  # of a step under DDP, beside the reduction
    link: Link  # of 2 ranks

    def alone_s(self, batch: float) -> float:
        """A step of one process."""
        return self.overhead_s + self.sample_s * batch

    def ddp_step_s(self, ranks: int, batch: float) -> float:
        """A step of DDP on `ranks` of one core each, of a global batch; nothing of the reduction is hidden."""
        return self.alone_s(batch / ranks) + self.ddp_s + self.link.ring_s(ranks, GRADIENT_BYTES)


def line(points: dict[int, float]) -> tuple[float, float]:
    """a and b of a + b x, least squares of the relative error."""
    x, y = (np.array(list(v), float) for v in (points.keys(), points.values()))
    matrix = np.stack([np.ones_like(x), x], 1) / y[:, None]
    a, b = np.linalg.lstsq(matrix, np.ones_like(y), rcond=None)[0]
    return float(a), float(b)


def seconds(of: dict[str, float]) -> dict[int, float]:
    """From the file's milliseconds."""
    return {int(key): ms / 1e3 for key, ms in of.items()}


def fit(measured: Measured) -> Fit:
    """The parameters; of DDP only what one rank of it takes longer is used, so that 2 ranks are a prediction."""
    overhead_s, sample_s = line(seconds(measured["alone"]))
    latency_s, byte_s = line(seconds(measured["reduce 2"]))
    alone, ddp = seconds(measured["alone"]), seconds(measured["ddp 1"])
    ddp_s = statistics.median(ddp[batch] - alone[batch] for batch in ddp)
    return Fit(overhead_s, sample_s, ddp_s, Link(latency_s / 2, 1 / byte_s))


# -- predicted --------------------------------------------------------------------------------------------------------

# Figures of the makers; docs/scaling.md names the sources. Latencies of a step of a ring are NCCL's own.
NVLINK = Link(3.4e-6, 450e9)
CARDS_8, CARD_1 = Link(9.6e-6, 400e9), Link(9.6e-6, 50e9)
GPUS_A_NODE = 8
PEAK_FLOPS, USED = 989e12, 0.4
MODEL_WEIGHTS, TOKENS = 1.3e9, 8192
COMPUTE_S = 6 * MODEL_WEIGHTS * TOKENS / (PEAK_FLOPS * USED)
WORLDS = (1, 2, 8, 16, 64, 256, 1024, 8192, 100_000)
REDUCTIONS: dict[str, Callable[[Link, int, float], float]] = {
    "ring": Link.ring_s,
    "tree": Link.tree_s,
    "piped tree": Link.piped_s,
}


def link_of(ranks: int, between: Link) -> Link:
    """A ring's link: its bandwidth is the narrowest's, its latency the mean over its steps."""
    if ranks <= GPUS_A_NODE:
        return NVLINK
    outside = 1 / GPUS_A_NODE
    latency_s = outside * between.latency_s + (1 - outside) * NVLINK.latency_s
    return Link(latency_s, min(NVLINK.bytes_per_s, between.bytes_per_s))


def efficiency(ranks: int, between: Link, reduction: str, overlap: float) -> float:
    """Of a rank of many, with a batch of the same size for each."""
    reduced_s = REDUCTIONS[reduction](link_of(ranks, between), ranks, 4 * MODEL_WEIGHTS)
    return COMPUTE_S / (COMPUTE_S + (1 - overlap) * reduced_s)


# -- shown ------------------------------------------------------------------------------------------------------------


def tables(measured: Measured, model: Fit) -> str:
    """As they stand in docs/scaling.md."""
    out = ["| parameter | fitted to what was measured |", "|---|---|"]
    out += [f"| step of one process, whatever its batch | {model.overhead_s * 1e6:.0f} us |"]
    out += [f"| and for each sample | {model.sample_s * 1e6:.2f} us |"]
    feed = line(seconds(measured["feed"]))
    out += [f"| of these the feed | {feed[0] * 1e6:.1f} us, and {feed[1] * 1e6:.2f} us for each sample |"]
    out += [f"| DDP on one rank takes longer by | {model.ddp_s * 1e6:.0f} us |"]
    out += [f"| gloo, 2 ranks: latency of a message | {model.link.latency_s * 1e6:.0f} us |"]
    out += [f"| gloo, 2 ranks: bandwidth | {model.link.bytes_per_s / 1e9:.2f} GB/s |"]
    out += ["", "| one process, batch | measured | fitted | error |", "|---|---|---|---|"]
    for batch, taken in seconds(measured["alone"]).items():
        out += [_row(f"{batch:,}", taken, model.alone_s(batch))]
    out += ["", "| all-reduce, 2 ranks | measured | fitted | error |", "|---|---|---|---|"]
    for size, taken in seconds(measured["reduce 2"]).items():
        out += [_row(f"{size / 1024:,.0f} KiB", taken, model.link.ring_s(2, size))]
    out += ["", "| DDP, global batch | ranks | step measured | step predicted | efficiency measured | predicted |"]
    out += ["|---|---|---|---|---|---|"]
    alone = seconds(measured["alone"])
    for ranks in (2, 4):
        for batch, taken in seconds(measured[f"ddp {ranks}"]).items():
            predicted = model.ddp_step_s(ranks, batch)
            efficient = [alone[batch] / ranks / taken, model.alone_s(batch) / ranks / predicted]
            more = " (2 cores)" if ranks == 4 else ""
            cells = f"{taken * 1e3:.2f} ms | {predicted * 1e3:.2f} ms ({predicted / taken - 1:+.0%})"
            out += [f"| {batch:,} | {ranks}{more} | {cells} | {efficient[0]:.2f} | {efficient[1]:.2f} |"]
    out += ["", "| ranks | " + " | ".join(f"{name}, {o:.0%} hidden" for name, o in _columns()) + " |"]
    out += ["|---" * (1 + len(_columns())) + "|"]
    for ranks in WORLDS[1:]:
        cells = [f"{efficiency(ranks, CARDS_8, *c):.2f} / {efficiency(ranks, CARD_1, *c):.2f}" for c in _columns()]
        out += [f"| {ranks:,} | " + " | ".join(cells) + " |"]
    return "\n".join(out)


def _columns() -> list[tuple[str, float]]:
    return [("ring", 0.0), ("tree", 0.0), ("piped tree", 0.0), ("ring", 0.7), ("piped tree", 0.7)]


def _row(name: str, taken: float, fitted: float) -> str:
    return f"| {name} | {taken * 1e3:.3f} ms | {fitted * 1e3:.3f} ms | {fitted / taken - 1:+.0%} |"


def picture(measured: Measured, model: Fit, path: Path) -> None:
    """Left: steps here, measured and fitted. Middle: efficiency here. Right: predicted for many GPUs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    blue, orange, green = "#4c78a8", "#f58518", "#54a24b"
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.8))
    batches = np.geomspace(1, 1024, 50)
    left.plot(batches, [model.alone_s(b) * 1e3 for b in batches], color=blue, label="one process, fitted")
    left.plot(*_ms(measured["alone"]), "o", color=blue, label="one process, measured")
    more = np.geomspace(64, 1024, 50)
    left.plot(more, [model.ddp_step_s(2, b) * 1e3 for b in more], "--", color=orange, label="DDP, 2 ranks, predicted")
    left.plot(*_ms(measured["ddp 2"]), "s", color=orange, label="DDP, 2 ranks, measured")
    left.set(xscale="log", yscale="log", xlabel="global batch", ylabel="ms a step", title="A step on this machine")

    alone = seconds(measured["alone"])
    for batch, colour in ((64, green), (256, blue), (1024, orange)):
        worlds = np.geomspace(1, 64, 60)
        curve = [model.alone_s(batch) / n / model.ddp_step_s(n, batch) if n > 1 else 1.0 for n in worlds]
        middle.plot(worlds, curve, "--", color=colour, label=f"batch {batch:,}, predicted")
        taken = {n: seconds(measured[f"ddp {n}"]).get(batch) for n in (1, 2)}
        points = [(n, alone[batch] / n / s) for n, s in taken.items() if s]
        middle.plot(*zip(*points, strict=True), "o", color=colour, label=f"batch {batch:,}, measured")
    middle.set(xscale="log", xlabel="ranks, a core each, on gloo", ylabel="efficiency", ylim=(0, 1.1))
    middle.set(title="The same global batch on more ranks")

    worlds = np.array(WORLDS[1:])
    for between, name, style in ((CARDS_8, "8 cards a node", "-"), (CARD_1, "1 card a node", "--")):
        for (reduction, overlap), colour in zip((("ring", 0.0), ("piped tree", 0.0)), (blue, orange), strict=True):
            curve = [efficiency(n, between, reduction, overlap) for n in worlds]
            right.plot(worlds, curve, style, color=colour, label=f"{reduction}, {name}")
    right.set(xscale="log", xlabel="GPUs, 8 a node", ylabel="efficiency", ylim=(0, 1.1))
    right.set(title="1.3e9 weights on H200s, all predicted")
    for axes in (left, middle, right):
        axes.legend(fontsize=7, frameon=False)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    fig.tight_layout()
    path.parent.mkdir(exist_ok=True)
    fig.savefig(path, dpi=110)


def _ms(of: dict[str, float]) -> tuple[list[int], list[float]]:
    return [int(key) for key in of], list(of.values())


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands: Any = parser.add_subparsers(dest="command", required=True)
    of = commands.add_parser("measure")
    of.add_argument("--rounds", type=int, default=3)
    of.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    of = commands.add_parser("show")
    of.add_argument("--of", type=Path, default=Path(__file__).with_suffix(".json"))
    of.add_argument("--picture", type=Path, default=ROOT / "docs/images/scaling.png")
    commands.add_parser("work")
    arguments = parser.parse_args()
    if arguments.command == "work":
        work()
    elif arguments.command == "measure":
        arguments.out.write_text(json.dumps(measure(arguments.rounds), indent=1) + "\n")
    else:
        measured = json.loads(arguments.of.read_text())
        print(tables(measured, fit(measured)))
        picture(measured, fit(measured), arguments.picture)
        print(f"\n{meshes.tables()}")
        meshes.picture(arguments.picture.with_name("meshes.png"))


if __name__ == "__main__":
    main()
