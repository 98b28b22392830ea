"""python -m dist_train bench [--config FILE.yaml] [--backends B ...] [--world-sizes 2] [--batch-sizes 64,1024]
[--steps N] [--repeats 16] [--starts 1] [--json FILE] [--plot FILE.png]

Measures a config on this machine, and beside it what it could be at most (the ceiling), PyTorch's quickstart (the
tutorial), and a bare script of PyTorch or of the backend's library. They take turns in short slices, so that what else
the machine does falls on all of them alike. A backend is a name, or deepspeed:STAGE; `single` is one process, the
others run at each world size. A batch size is that of a step over all ranks. Other options are the config's own.
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dist_train.bench import machine, table
from dist_train.bench.lead import SLICE_S, Cell, Lead
from dist_train.bench.slices import Ready
from dist_train.bench.table import Ratio, Run
from dist_train.config.load import load
from dist_train.config.tree import BackendConfig, Config, to_tree
from dist_train.errors import ConfigError
from dist_train.ranks.launcher import Launcher
from dist_train.run.check import check
from dist_train.tools.options import split
from dist_train.tools.parity import number, with_backend
from dist_train.whole import can_write, write

AUTO_STEPS = f"as many as take {SLICE_S:g} s"
RATIOS = (
    "samples/s by those of the other, of each round the median (and quartiles); microseconds a step, less the other's"
)
# Default, and an example.
OPTIONS = {
    "--backends": ("single,ddp", "single,fsdp2"),
    "--world-sizes": ("2", "2,4"),
    "--batch-sizes": ("64,1024", "64,1024"),
    "--steps": (AUTO_STEPS, "100"),
    "--repeats": ("16", "16"),
    "--starts": ("1", "2"),
    "--json": ("", "bench.json"),
    "--plot": ("", "bench.png"),
}


def run(argv: list[str], launcher: Launcher) -> int:
    """Prints the tables. Returns 1 if a cell failed, else 0."""
    options, rest = split(argv, OPTIONS, "bench", paths=("--json", "--plot"))
    batch_sizes, world_sizes = (_numbers(options, name) for name in ("--batch-sizes", "--world-sizes"))
    steps = None if options["--steps"] == AUTO_STEPS else number("--steps", options["--steps"])
    repeats = number("--repeats", options["--repeats"])
    starts = 0 if options["--starts"] == "0" else number("--starts", options["--starts"])
    if steps is None and not starts:
        raise ConfigError("--starts: got 0 without --steps, expected 1 or more, to see how long a step takes")
    places = [(b, n) for b in options["--backends"].split(",") for n in ([1] if b == "single" else world_sizes)]
    config = for_bench(load(rest, "python -m dist_train bench"), max(ranks for _, ranks in places))
    if launcher.name != "none":
        raise ConfigError(f"bench: got {launcher.name}, expected to be started alone: it starts the ranks by itself")
    check(dataclasses.replace(config, backend=BackendConfig("single")), launcher, writes=False)
    cells = [Cell(backend, ranks, with_backend(config, backend)) for backend, ranks in places]
    if options["--json"]:
        can_write(Path(options["--json"]), "--json")
    if options["--plot"]:
        from dist_train.bench import plot

        plot.check()
        can_write(Path(options["--plot"]), "--plot")
    before = machine.facts()
    print(f"{config.data.name}, {config.model.name}, {config.optim.name}, {config.train.precision}")
    print(f"{machine.describe(before)}; {config.train.threads} CPU threads a rank")
    if machine.busy(before):
        print("this machine is busy with other programs: look at the ratios alone")
    runs: list[Run] = []
    ready: list[Ready] = []
    for batch_size in batch_sizes:
        lead = Lead(cells, batch_size, steps, repeats, starts)
        runs += lead.measure()
        ready += lead.ready
    rows, ratios = [table.summary(r, runs) for r in runs], table.ratios(runs)
    print(
        "\n".join(
            ["", table.HEAD, *map(table.line, rows, runs), *_notes(runs), "", RATIOS, *(r.line() for r in ratios)]
        )
    )
    if options["--json"]:
        tree = {
            "machine": {"before": before, "after": machine.facts()},
            "device": ready[0].device if ready else None,
            "versions": {name: version for one in ready for name, version in one.versions.items()},
            "config": to_tree(config),
        }
        tree |= _tree(runs, rows, ratios)
        write(Path(options["--json"]), (json.dumps(tree, indent=1) + "\n").encode(), "--json")
    if options["--plot"] and any(r.slices for r in runs):
        write(Path(options["--plot"]), plot.png(runs), "--plot")
    return 1 if any(r.failed for r in runs) else 0


def for_bench(config: Config, most_ranks: int) -> Config:
    """The config without evaluation and smaller last batches, and with as many threads for a rank in every cell."""
    train = dataclasses.replace(
        config.train, threads=config.train.threads or max(1, machine.cores() // most_ranks),
        eval_every_epochs=None, eval_every_steps=None, drop_last=True,
    )  # fmt: skip
    never = dataclasses.replace(config.checkpoint, resume="never")
    return dataclasses.replace(
        config, train=train, checkpoint=never, track=dataclasses.replace(config.track, profile={})
    )


def _numbers(options: dict[str, str], name: str) -> list[int]:
    return [number(name, one) for one in options[name].split(",")]


def _notes(runs: list[Run]) -> Iterator[str]:
    yield "samples/s: median of the slices; spread: between their quartiles; start: from the command to the first step"
    yield "data, computing, rest (metrics, tracking, checkpoint policy): shares of the loop's time; on an accelerator,"
    yield "of launching. MiB: the most that a rank used until its first steps were done"
    if any(r.cell != "single" for r in runs):
        yield "ceiling of several ranks: each by itself, no exchange; reduction: what ours computes longer than that"
        yield "scaling: samples/s by ranks times those of single, at the same batch size over all ranks"


def _tree(runs: list[Run], rows: list[dict[str, Any]], ratios: list[Ratio]) -> dict[str, Any]:
    return {
        "rows": rows,
        "ratios": [ratio.tree() for ratio in ratios],
        "runs": [dataclasses.asdict(r) for r in runs],
    }
