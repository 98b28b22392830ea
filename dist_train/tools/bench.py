"""python -m dist_train bench [--config FILE.yaml] [--backends B ...] [--world-sizes 2] [--batch-sizes 64,1024]
[--steps N] [--repeats 8] [--starts 1] [--json FILE] [--plot FILE.png]

Measures a config on this machine, and beside it what it could be at most (the ceiling), PyTorch's quickstart (the
tutorial), and the bare script of each library. They take turns in short slices, so that what else the machine does
falls on all of them alike. A backend is a name, or deepspeed:STAGE; `single` is one process, the others run at each
world size. A batch size is that of a step over all ranks. Other options are the config's own.
"""

import contextlib
import dataclasses
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dist_train.bench import machine, ranks, table
from dist_train.bench.ranks import NotRun, Ranks
from dist_train.bench.slices import OURS, WARM_STEPS, Ready
from dist_train.bench.table import Run
from dist_train.check import check
from dist_train.config import BackendConfig, Config, load, to_tree
from dist_train.errors import ConfigError
from dist_train.launcher import Launcher
from dist_train.tools.options import split
from dist_train.tools.parity import number, with_backend

SLICE_S = 0.4
LEAST_STEPS, MOST_STEPS = 3, 5000  # of a slice
# Default, and an example.
OPTIONS = {
    "--backends": ("single,ddp", "single,fsdp2"),
    "--world-sizes": ("2", "2,4"),
    "--batch-sizes": ("64,1024", "64,1024"),
    "--steps": (f"as many as take {SLICE_S} s", "100"),
    "--repeats": ("8", "8"),
    "--starts": ("1", "2"),
    "--json": ("", "bench.json"),
    "--plot": ("", "bench.png"),
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the command line asks for.

    Args:
        config: of all cells.
        cells: backends and numbers of ranks.
        batch_sizes: of a step over all ranks.
        steps: of a slice; None for as many as take SLICE_S.
        repeats: slices of each run.
        starts: of each run, in processes of their own.
    """

    config: Config
    cells: list[tuple[str, int]]
    batch_sizes: list[int]
    steps: int | None
    repeats: int
    starts: int


def run(argv: list[str], launcher: Launcher) -> int:
    """Prints the tables. Returns 1 if a cell failed, else 0."""
    options, rest = split(argv, OPTIONS, "bench")
    plan = _plan(options, load(rest, "python -m dist_train bench"))
    if launcher.name != "none":
        raise ConfigError(f"bench: got {launcher.name}, expected to be started alone: it starts the ranks by itself")
    single = dataclasses.replace(plan.config, backend=BackendConfig("single"))
    check(with_batch(single, plan.batch_sizes[0], 1), launcher, writes=False)
    draw = _drawing() if options["--plot"] else None
    before = machine.facts()
    cfg = plan.config
    print(f"{cfg.data.name}, {cfg.model.name}, {cfg.optim.name}, {cfg.train.precision}, compile {cfg.compile.mode}")
    print(f"{machine.describe(before)}; {cfg.train.threads} CPU threads a rank")
    if machine.busy(before):
        print(f"this machine is busy (load {before['load']:.1f} on {before['cores']} cores): look at ratios alone")
    runs: list[Run] = []
    seen: list[Ready] = []
    for batch_size in plan.batch_sizes:
        runs += measure(plan, batch_size, seen)
    after = machine.facts()
    rows = [table.summary(r, runs) for r in runs]
    found = table.ratios(runs)
    _show(runs, rows, found, seen)
    if options["--json"]:
        tree = _tree(plan, runs, rows, found, seen, [before, after])
        Path(options["--json"]).write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    if draw is not None:
        Path(options["--plot"]).write_bytes(draw(runs))
    return 1 if any(r.why for r in runs) else 0


def _plan(options: dict[str, str], config: Config) -> Plan:
    numbers = {o: [number(o, n) for n in options[o].split(",")] for o in ("--world-sizes", "--batch-sizes")}
    names = options["--backends"].split(",")
    for name in names:
        with_backend(config, name)  # a misspelt name, before anything runs
    own = options["--steps"] == OPTIONS["--steps"][0]
    steps = None if own else number("--steps", options["--steps"])
    starts = 0 if options["--starts"] == "0" else number("--starts", options["--starts"])
    if steps is None and not starts:
        raise ConfigError("--starts: got 0 without --steps, expected 1 or more, to see how long a step takes")
    sizes = numbers["--world-sizes"]
    cells = [(name, size) for name in names for size in ([1] if name == "single" else sizes)]
    train = dataclasses.replace(
        config.train, threads=config.train.threads or max(1, machine.cores() // max(size for _, size in cells)),
        eval_every_epochs=None, eval_every_steps=None, drop_last=True,
    )  # fmt: skip
    never = dataclasses.replace(config.checkpoint, resume="never")
    config = dataclasses.replace(config, train=train, checkpoint=never)
    return Plan(config, cells, numbers["--batch-sizes"], steps, number("--repeats", options["--repeats"]), starts)


def with_batch(config: Config, batch_size: int, steps: int) -> Config:
    """The config with so many samples a step, and so many steps."""
    train = dataclasses.replace(config.train, global_batch_size=batch_size, max_steps=steps, epochs=steps)
    return dataclasses.replace(config, train=train)


def measure(plan: Plan, batch_size: int, seen: list[Ready]) -> list[Run]:
    """All cells at a batch size. What ranks said of themselves goes to `seen`."""
    runs: dict[tuple[str, int, str], Run] = {}
    step_s: dict[tuple[str, int], list[float]] = {}

    def run_of(cell: tuple[str, int], name: str) -> Run:
        return runs.setdefault((*cell, name), Run(cell[0], name, cell[1], batch_size))

    def started(cell: tuple[str, int], name: str, processes: Ranks) -> None:
        it = run_of(cell, name)
        it.starts_s.append(processes.start_s)
        it.peak_bytes.append(max(ready.peak_bytes for ready in processes.ready))
        seen.append(processes.ready[0])
        if name == OURS:
            step_s.setdefault(cell, []).append(max(ready.step_s for ready in processes.ready))
        print(f"batch {batch_size}: {it.label.strip()} x{it.ranks} started in {processes.start_s:.1f} s", flush=True)

    cells = []
    for cell in plan.cells:
        try:
            config = with_backend(plan.config, cell[0])
            launcher = Launcher() if cell[0] == "single" else Launcher("torchrun", 0, cell[1], 0, cell[1])
            check(with_batch(config, batch_size, 1), launcher, writes=False)
            for start in range(plan.starts):
                names = [OURS] if start == 0 else [n for c1, c2, n in runs if (c1, c2) == cell]
                for name in names:
                    with ranks.of(with_batch(config, batch_size, WARM_STEPS + 1), name, cell[1]) as processes:
                        started(cell, name, processes)
                        processes.end()
                        names += processes.ready[0].references if start == 0 else ()
            cells.append(cell)
        except (ConfigError, NotRun) as error:
            run_of(cell, OURS).why = str(error)
    with contextlib.ExitStack() as stack:
        taking: dict[tuple[str, int], tuple[Ranks, int]] = {}
        for cell in cells:
            steps = plan.steps or min(MOST_STEPS, max(LEAST_STEPS, round(SLICE_S / statistics.median(step_s[cell]))))
            config = with_batch(with_backend(plan.config, cell[0]), batch_size, WARM_STEPS + plan.repeats * steps + 1)
            try:
                processes = stack.enter_context(ranks.of(config, OURS, cell[1]))
                started(cell, OURS, processes)
                processes.warm()
                taking[cell] = processes, steps
            except NotRun as error:
                run_of(cell, OURS).why = str(error)
        for turn in range(plan.repeats):
            begin = time.perf_counter()
            for cell, (processes, steps) in list(taking.items()):
                names = [OURS, *processes.ready[0].references]
                first = turn % len(names)
                try:
                    for name in names[first:] + names[:first]:
                        run_of(cell, name).slices.append(processes.turn(name, steps))
                except NotRun as error:
                    del taking[cell]
                    run_of(cell, OURS).why = str(error)
                    for name in names:
                        run_of(cell, name).slices.clear()
            if turn == 0:
                about_s = (time.perf_counter() - begin) * plan.repeats
                print(f"batch {batch_size}: {plan.repeats} rounds, about {about_s:.0f} s", flush=True)
        for cell, (processes, _) in taking.items():
            try:
                processes.end()
            except NotRun as error:
                run_of(cell, OURS).why = str(error)
    order = {cell: i for i, cell in enumerate(plan.cells)}
    return sorted(runs.values(), key=lambda r: order[r.cell, r.ranks])


def _show(runs: list[Run], rows: list[dict[str, Any]], found: list[table.Ratio], seen: list[Ready]) -> None:
    print(f"\n{table.HEAD}")
    for row, r in zip(rows, runs, strict=True):
        print(table.line(row, r.label))
    print("\n".join(_notes(runs)))
    print()
    for one in found:
        print(one.line())


def _notes(runs: list[Run]) -> Iterator[str]:
    yield "samples/s: median of the slices; spread: between their quartiles; start: from the command to the first step"
    yield "data, computing, rest (metrics, tracking, checkpoint policy): share of the step's time in ours"
    if any(r.cell != "single" for r in runs):
        yield "ceiling of several ranks: each by itself, no exchange; reduction: what ours computes longer than that"
        yield "scaling: samples/s by those of ranks times single, at the same batch size over all ranks"


def _tree(
    plan: Plan, runs: list[Run], rows: list[dict[str, Any]], found: list[table.Ratio], seen: list[Ready],
    machines: list[dict[str, Any]],
) -> dict[str, Any]:  # fmt: skip
    return {
        "machine": {"before": machines[0], "after": machines[1]},
        "device": seen[0].device if seen else None,
        "threads": seen[0].threads if seen else None,
        "versions": {name: version for ready in seen for name, version in ready.versions.items()},
        "config": to_tree(plan.config),
        "rows": rows,
        "ratios": [one.tree() for one in found],
        "runs": [dataclasses.asdict(r) for r in runs],
    }


def _drawing() -> Any:
    """The function that draws. Raises ConfigError where matplotlib is not installed."""
    from dist_train.bench.plot import load

    return load()
