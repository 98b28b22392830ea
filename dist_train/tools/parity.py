"""python -m dist_train parity [--config FILE.yaml] [--backends B ...] [--world-sizes 1,2,4] [--steps 20] [--json FILE]

Runs a config under each backend and world size on this machine, and holds each run against `single`: what to do before
a job moves to other machines. A backend is a name, or deepspeed:STAGE. Other options are the config's own.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dist_train import backends
from dist_train.backends.rules import STAGES
from dist_train.check import check
from dist_train.config import BackendConfig, Config, dump, load, unknown
from dist_train.errors import ConfigError
from dist_train.launcher import Launcher
from dist_train.tools.options import split
from dist_train.whole import can_write, write

if TYPE_CHECKING:
    from dist_train.tools.trajectory import Trajectory

BACKENDS = ("ddp", "fsdp2", "accelerate", "deepspeed:0", "deepspeed:1", "deepspeed:2", "deepspeed:3")
# Largest relative difference that passes. The short formats round each product, and other shares round otherwise.
TOLERANCE = {"float64": 1e-9, "float32": 1e-5, "tf32": 1e-3, "bfloat16": 5e-2, "float16": 5e-2}
CELL_TIMEOUT_S = 600
KEPT = {"fsdp2": ("offload",), "deepspeed": ("offload", "config")}
# Default, and an example.
OPTIONS = {
    "--backends": (",".join(BACKENDS), "ddp"),
    "--world-sizes": ("1,2,4", "1,2,4"),
    "--steps": ("20", "20"),
    "--json": ("", "parity.json"),
}


@dataclass(frozen=True)
class Row:
    """A line of the table: a backend at a world size.

    Args:
        backend: the name, with DeepSpeed's stage.
        world_size: number of ranks.
        result: pass, fail, or not run.
        loss: largest relative difference over the steps and the evaluation; None if it did not run.
        grad_norm: the same of the gradient norm.
        weights: of the final weights, the worst tensor's.
        samples_per_s: of the second half of the steps.
        why: it did not run, which is a failure of `single` alone.
    """

    backend: str
    world_size: int
    result: str
    loss: float | None = None
    grad_norm: float | None = None
    weights: float | None = None
    samples_per_s: float | None = None
    why: str = ""


def run(argv: list[str], launcher: Launcher) -> int:
    """Prints the table. Returns 1 if a cell failed, else 0."""
    options, rest = split(argv, OPTIONS, "parity")
    config = for_parity(load(rest, "python -m dist_train parity"), number("--steps", options["--steps"]))
    world_sizes = [number("--world-sizes", size) for size in options["--world-sizes"].split(",")]
    names = options["--backends"].split(",")
    if launcher.name != "none":
        raise ConfigError(f"parity: got {launcher.name}, expected to be started alone: it starts the ranks by itself")
    check(dataclasses.replace(config, backend=BackendConfig("single")), launcher, writes=False)
    for backend in names:
        with_backend(config, backend)  # a misspelt name, before anything runs
    if options["--json"]:
        can_write(Path(options["--json"]), "--json")
    tolerance = TOLERANCE[config.train.precision]
    print(
        f"{config.data.name}, {config.model.name}, {config.train.max_steps} steps of {config.train.global_batch_size}"
    )
    print(f"tolerance {tolerance:g} ({config.train.precision}), relative to single on one process\n")
    print(
        f"{'backend':<12} ranks  {'loss':>8}  {'grad norm':>9}  {'weights':>8}  {'samples/s':>10}  result", flush=True
    )
    rows = []
    for row in compare(config, names, world_sizes, tolerance):
        rows.append(row)
        print(_line(row), flush=True)
    failed = [row for row in rows if row.result == "fail"]
    ran = [row for row in rows if row.result != "not run"]
    print(f"\n{len(ran) - len(failed)} of {len(ran)} agree, {len(rows) - len(ran)} not run")
    if options["--json"]:
        table = {"tolerance": tolerance, "precision": config.train.precision, "rows": [vars(row) for row in rows]}
        write(Path(options["--json"]), (json.dumps(table, indent=2) + "\n").encode(), "--json")
    return 1 if failed else 0


def for_parity(config: Config, steps: int) -> Config:
    """The config with every step recorded, and threads fixed: their number changes the last bits."""
    train = dataclasses.replace(
        config.train, epochs=max(config.train.epochs, steps), max_steps=steps, threads=config.train.threads or 1,
        eval_every_epochs=None, eval_every_steps=None,
    )  # fmt: skip
    return dataclasses.replace(config, train=train, track=dataclasses.replace(config.track, every_steps=1))


def compare(config: Config, names: list[str], world_sizes: list[int], tolerance: float) -> Iterator[Row]:
    """A row for `single`, and for every backend at every world size."""
    from dist_train.tools.trajectory import difference

    reference = measure(config, "single", 1)
    if isinstance(reference, str):
        yield Row("single", 1, "fail", why=reference)  # and nothing to hold the others against
        return
    yield Row("single", 1, "reference", 0.0, 0.0, 0.0, reference.samples_per_s)
    for backend in names:
        for world_size in world_sizes:
            found = measure(config, backend, world_size)
            if isinstance(found, str):
                yield Row(backend, world_size, "not run", why=found)
                continue
            far = difference(found, reference)
            result = "pass" if far.worst <= tolerance else "fail"  # a nan fails
            yield Row(backend, world_size, result, far.loss, far.grad_norm, far.weights, found.samples_per_s)


def measure(config: Config, backend: str, world_size: int) -> "Trajectory | str":
    """The trajectory of a cell, run in processes of its own; or why it did not run."""
    from dist_train.tools.trajectory import read

    cell = with_backend(config, backend)
    alone = backend == "single"
    launcher = Launcher() if alone else Launcher("torchrun", 0, world_size, 0, world_size)
    try:
        check(cell, launcher, writes=False)
    except ConfigError as error:
        return error.lines[0]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.yaml").write_text(dump(cell), encoding="utf-8")
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"]
        command = [sys.executable, *([] if alone else torchrun), "-m", "dist_train.tools.trajectory", folder]
        environment = os.environ | {"OMP_NUM_THREADS": str(cell.train.threads)}
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=CELL_TIMEOUT_S, check=False
        )
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.startswith(("dist_train:", "[rank ")) or alone]
            return said[-1] if said else f"exit code {done.returncode}: {done.stderr[-300:]}"
        return read(Path(folder, "trajectory.npz"))


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
    if row.why:
        return head + f"{row.result}: {row.why}"
    differences = f"{row.loss:>8.1e}  {row.grad_norm:>9.1e}  {row.weights:>8.1e}"
    return head + f"{differences}  {row.samples_per_s:>10,.0f}  {row.result}"
