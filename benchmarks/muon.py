"""torchrun --nproc_per_node=2 benchmarks/muon.py [--rounds 9] [--sizes 64x8,256x8,512x4,1024x2]

What Muon's orthogonalisation costs where each matrix is one rank's and results are exchanged, beside every rank doing
all of it: of matrices that all ranks hold (DDP), and of matrices sharded by rows (FSDP2; there, every rank first
gathers every matrix). A size is the width of a transformer's layers, of four matrices each, and their number. The ways
take turns; a ratio is of the times of one round.
"""

import argparse
import statistics
import time
from functools import partial

import torch
import torch.distributed as torch_dist

from dist_train.backends.matrices import Alone, Exchange, Matrix, Part, Work
from dist_train.loop.muon import orthogonalised
from dist_train.ranks import dist, launcher
from dist_train.ranks.dist import World

FUNCTION = partial(orthogonalised, coefficients=(3.4445, -4.7750, 2.0315), steps=5, eps=1e-7)
HEAD = ("matrices", "held", "of all ms", "of own ms", "all / own", "quartiles", "by CPU time")


def main() -> None:
    """Measures on all ranks, reports on rank 0."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--sizes", default="64x8,256x8,512x4,1024x2", help="width x layers, ...")
    options = parser.parse_args()
    with dist.joined(launcher.detect(), torch.device("cpu")) as world:
        torch.set_num_threads(1)
        if world.is_main:
            print(f"{world.size} ranks of 1 thread, gloo; milliseconds a step, median of {options.rounds} rounds")
            print("| " + " | ".join(HEAD) + " |\n" + "|---" * len(HEAD) + "|")
        for size in options.sizes.split(","):
            width, layers = map(int, size.split("x"))
            shapes = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)] * layers
            for held in ("whole", "rows"):
                line = _row(world, size, shapes, held, options.rounds)
                if world.is_main:
                    print(line, flush=True)


def _row(world: World, size: str, shapes: list[tuple[int, int]], held: str, rounds: int) -> str:
    work, exchange = [_work(world, shape, held) for shape in shapes], Exchange(world)
    everything = Alone().mapped if held == "whole" else partial(_gathered_by_all, world)
    ways = {"all": lambda: everything(work), "own": lambda: exchange.mapped(work)}
    for a, b in zip(*(way() for way in ways.values()), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    walls, processors = {name: [] for name in ways}, {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            torch_dist.barrier()
            begin, used = time.perf_counter(), time.process_time()
            way()
            used = time.process_time() - used
            torch_dist.barrier()
            walls[name].append(time.perf_counter() - begin)
            processors[name].append(sum(row[0] for row in dist.gather_numbers([used])))
    ratios = [a / b for a, b in zip(walls["all"], walls["own"], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    by_cpu = statistics.median(a / b for a, b in zip(processors["all"], processors["own"], strict=True))
    ms = [f"{1e3 * statistics.median(walls[name]):.1f}" for name in ways]
    ratio = f"{statistics.median(ratios):.2f} | {low:.2f}-{high:.2f} | {by_cpu:.2f}"
    return f"| {len(shapes)} of width {size.split('x')[0]} | {held} | {ms[0]} | {ms[1]} | {ratio} |"


def _work(world: World, shape: tuple[int, int], held: str) -> Work:
    rows, columns = shape
    ranges = [(0, rows * columns)] * world.size
    if held == "rows":
        each = -(-rows // world.size) * columns
        starts = [min(rank * each, rows * columns) for rank in range(world.size + 1)]
        ranges = [(start, past - start) for start, past in zip(starts, starts[1:], strict=False)]
    whole = torch.randn(rows * columns, generator=torch.Generator().manual_seed(rows))
    parts = tuple(Part(*of) for of in ranges)
    return Matrix(shape, 0, parts), whole.narrow(0, *ranges[world.rank]).clone(), FUNCTION


def _gathered_by_all(world: World, work: list[Work]) -> list[torch.Tensor]:
    """Every matrix is gathered on every rank, in one collective, and each rank keeps its share of the result."""
    counts = [[matrix.parts[rank].count for matrix, _, _ in work] for rank in range(world.size)]
    longest = max(sum(of) for of in counts)
    mine = torch.zeros(longest)
    torch.cat([part for _, part, _ in work], out=mine[: sum(counts[world.rank])])
    every = torch.empty(world.size * longest).split(longest)
    torch_dist.all_gather(list(every), mine)
    parts = [row[: sum(of)].split(of) for row, of in zip(every, counts, strict=True)]
    found = []
    for i, (matrix, _, function) in enumerate(work):
        whole = torch.cat([of_rank[i] for of_rank in parts]).view(matrix.shape)
        found.append(matrix.parts[world.rank].of(function(whole).contiguous()).reshape(-1))
    return found


if __name__ == "__main__":
    main()
