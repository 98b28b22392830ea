"""python -m dist_train parity [--config FILE.yaml] [--backends B ...] [--world-sizes 1,2,4] [--steps 20]
    [--timeout-s 600] [--json FILE]

Runs a config under each backend and world size on this machine, and holds each run against `single`: what to do before
a job moves to other machines. A backend is a name, or deepspeed:STAGE. Other options are the config's own.
"""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dist_train import backends
from dist_train.backends.rules import STAGES
from dist_train.config.load import load
from dist_train.config.tree import BackendConfig, Config
from dist_train.config.values import unknown
from dist_train.errors import ConfigError
from dist_train.loop.shortened import shortened
from dist_train.ranks.launcher import Launcher
from dist_train.run.check import check
from dist_train.tools.cells import Cell, Failed, NotRun, measure
from dist_train.tools.options import split
from dist_train.whole import can_write, write

BACKENDS = ("ddp", "fsdp2", "accelerate", "deepspeed:0", "deepspeed:1", "deepspeed:2", "deepspeed:3")
KEPT = {
    "single": ("reduce",),
    "ddp": ("reduce",),
    "fsdp2": ("offload", "reduce", "mesh"),
    "deepspeed": ("offload", "config"),
}
# Default, and an example.
OPTIONS = {
    "--backends": (",".join(BACKENDS), "ddp"),
    "--world-sizes": ("1,2,4", "1,2,4"),
    "--steps": ("20", "20"),
    "--timeout-s": ("600", "600"),
    "--json": ("", "parity.json"),
}
SHARE = (
    "the result depends on how a batch is shared out: `single` itself gives another where it cuts its batches in two:"
)


@dataclass(frozen=True)
class Row:
    """A line of the table: a backend at a world size.

    Args:
        backend: the name, with DeepSpeed's stage.
        world_size: number of ranks.
        result: reference, rounding, pass, fail, or not run.
        loss: largest relative difference over the steps and the evaluation; None if it did not run.
        grad_norm: the same of the gradient norm.
        weights: of the final weights, by the norm of their update.
        exact: the largest of the three in float64; None where the backend or the model has none.
        samples_per_s: of the second half of the steps.
        why: it failed, or did not run.
    """

    backend: str
    world_size: int
    result: str
    loss: float | None = None
    grad_norm: float | None = None
    weights: float | None = None
    exact: float | None = None
    samples_per_s: float | None = None
    why: str = ""


def run(argv: list[str], launcher: Launcher) -> int:
    """Prints the table. Returns 0 if a cell ran and none failed, else 1."""
    options, rest = split(argv, OPTIONS, "parity", paths=("--json",))
    config = for_parity(load(rest, "python -m dist_train parity"), number("--steps", options["--steps"]))
    world_sizes = [number("--world-sizes", size) for size in options["--world-sizes"].split(",")]
    timeout_s = number("--timeout-s", options["--timeout-s"])
    names = options["--backends"].split(",")
    if launcher.name != "none":
        raise ConfigError(f"parity: got {launcher.name}, expected to be started alone: it starts the ranks by itself")
    check(dataclasses.replace(config, backend=BackendConfig("single")), launcher, writes=False)
    for backend in names:
        with_backend(config, backend)  # a misspelt name, before anything runs
    if options["--json"]:
        can_write(Path(options["--json"]), "--json")
    _head(config)
    rows = []
    for row in compare(config, names, world_sizes, timeout_s):
        rows.append(row)
        print(_line(row), flush=True)
    failed = [row for row in rows if row.result == "fail"]
    passed = [row for row in rows if row.result == "pass"]
    ran, left = len(passed) + len(failed), len([row for row in rows if row.result == "not run"])
    print(f"\n{len(passed)} of {ran} agree, {left} not run" + ("" if ran else ": nothing was compared"))
    if options["--json"]:
        table = {"precision": config.train.precision, "rows": [vars(row) for row in rows]}
        write(Path(options["--json"]), (json.dumps(table, indent=2) + "\n").encode(), "--json")
    return 0 if passed and not failed else 1


def _head(config: Config) -> None:
    from dist_train.tools.agreement import CAP, FLOOR, MULTIPLE

    precision = config.train.precision
    print(
        f"{config.data.name}, {config.model.name}, {config.train.max_steps} steps of {config.train.global_batch_size}"
    )
    floor = FLOOR[precision]
    wider = f", or {MULTIPLE} times what rounding does to single, at most {CAP:g}" if floor < CAP else ""
    own = "" if precision == "float64" else f"; in {precision} {floor:g}{wider}"
    print(f"expected: in float64 {FLOOR['float64']:g}{own}\n")
    numbers = f"{'loss':>8}  {'grad norm':>9}  {'weights':>8}  {'float64':>8}  {'samples/s':>10}"
    print(f"{'backend':<12} ranks  {numbers}  result", flush=True)


def for_parity(config: Config, steps: int) -> Config:
    """The config with every step recorded, and threads fixed: their number changes the last bits."""
    config = shortened(config, steps)
    train = dataclasses.replace(
        config.train, threads=config.train.threads or 1, eval_every_epochs=None, eval_every_steps=None
    )
    return dataclasses.replace(config, train=train, track=dataclasses.replace(config.track, every_steps=1))


def compare(config: Config, names: list[str], world_sizes: list[int], timeout_s: int) -> Iterator[Row]:
    """A row for `single` and one for what rounding does to it, and a row for every backend at every world size."""
    try:
        reference = measure(with_backend(config, "single"), 1, timeout_s)
    except (NotRun, Failed) as error:
        yield Row("single", 1, "fail", why=str(error))  # and nothing to hold the others against
        return
    why = reference.no_exact and f"no float64: {reference.no_exact}"
    exact = None if reference.exact is None else 0.0
    yield Row("single", 1, "reference", 0.0, 0.0, 0.0, exact, reference.own.samples_per_s, why)
    if (around := reference.rounding) is not None:
        yield Row("single", 1, "rounding", around.loss, around.grad_norm, around.weights)
    for backend in names:
        for world_size in world_sizes:
            cell = with_backend(config, backend)
            try:
                found = measure(cell, world_size, timeout_s, reference.exact is not None)
                yield _row(backend, world_size, config.train.precision, found, reference)
            except NotRun as error:
                yield Row(backend, world_size, "not run", why=str(error))
            except Failed as error:
                yield Row(backend, world_size, "fail", why=str(error))


def _row(backend: str, world_size: int, precision: str, found: Cell, reference: Cell) -> Row:
    from dist_train.tools.agreement import beyond, difference, limit

    try:
        far = difference(found.own, reference.own)
        exact = difference(found.exact, reference.exact) if found.exact and reference.exact else None
    except ValueError as error:
        raise Failed(str(error)) from error
    why = beyond(far, limit(precision, reference.rounding))
    if exact is not None and (further := beyond(exact, limit("float64"))):
        why = f"in float64 {further}"  # what rounding cannot explain
    if why and reference.share:
        why = f"{SHARE} {reference.share}"
    numbers = far.loss, far.grad_norm, far.weights, None if exact is None else exact.worst
    return Row(backend, world_size, "fail" if why else "pass", *numbers, found.own.samples_per_s, why)


def with_backend(config: Config, backend: str) -> Config:
    """The config with another backend: its name, with DeepSpeed's stage. Raises ConfigError."""
    valid = [*backends.BACKENDS, *(f"deepspeed:{stage}" for stage in STAGES)]
    if backend not in valid:
        raise ConfigError(unknown("--backends", backend, valid, "backend"))
    name, _, stage = backend.partition(":")
    # What the config says of its backend goes to those that have it; the rest of them refuse it.
    kept = {key: getattr(config.backend, key) for key in KEPT.get(name, ())}
    cell = BackendConfig(
        name, int(stage) if stage else config.backend.zero_stage if name == "deepspeed" else None, **kept
    )
    return dataclasses.replace(config, backend=cell)


def number(option: str, value: str) -> int:
    """An option's value. Raises ConfigError."""
    if not value.isdecimal() or int(value) < 1:
        raise ConfigError(f"{option}: got {value!r}, expected whole numbers of 1 or more; for example {option} 2")
    return int(value)


def _line(row: Row) -> str:
    head = f"{row.backend:<12} {row.world_size:>5}  "
    if row.loss is None:
        return head + f"{row.result}: {row.why}"
    exact = "-" if row.exact is None else f"{row.exact:.1e}"
    rate = "" if row.samples_per_s is None else f"{row.samples_per_s:,.0f}"
    differences = f"{row.loss:>8.1e}  {row.grad_norm:>9.1e}  {row.weights:>8.1e}  {exact:>8}"
    return head + f"{differences}  {rate:>10}  {row.result}" + (f": {row.why}" if row.why else "")
