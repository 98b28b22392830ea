"""The table of precision.py is true under every backend."""

import dataclasses
import math
import subprocess
import sys

import pytest
import torch
from torch import nn

from dist_train import backends
from dist_train.backends.precision import LossScale, Precision
from dist_train.backends.rules import problems
from dist_train.config.tree import Config
from dist_train.loop import optim
from dist_train.ranks.dist import World
from dist_train.ranks.launcher import Launcher
from dist_train.tools.agreement import difference

from parity_cells import BACKENDS, config, run_cells, run_single, this_world
from workers import run_ranks

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, 1, CPU, "none")
TYPES = {"float32": torch.float32, "bfloat16": torch.float32, "float16": torch.float32, "float64": torch.float64}
PRODUCTS = {"bfloat16": torch.bfloat16, "float16": torch.float16}
# Of the evaluation's loss after 24 steps; measured 2e-5 and 7e-7.
FROM_FLOAT32 = {"bfloat16": 1e-3, "float16": 1e-4}
# Of every step and weight, between backends that round the same shares of a batch; measured 2e-6.
AMONG_BACKENDS = 1e-5


def has(backend: str, precision: str) -> bool:
    """Whether the backend takes the precision; `rules` says why not."""
    cell = config(backend, precision=precision)
    return not list(problems(cell, Launcher("torchrun", world_size=2), {}))


CELLS = [(b, name) for b in ("single", *BACKENDS) for name in TYPES if b == "single" or has(b, name)]


def test_what_the_libraries_do_not_have():
    without = {(backend.partition(":")[0], name) for backend in BACKENDS for name in TYPES if not has(backend, name)}
    assert without == {("deepspeed", "float16"), ("deepspeed", "float64")}


# -- the types ---------------------------------------------------------------------------------------------------------


class Watched(nn.Module):
    """Keeps the type of each matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
        self.products: list[torch.dtype] = []
        for layer in self.layers:
            layer.register_forward_hook(lambda module, inputs, output: self.products.append(output.dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def types(cell: Config, world: World | None = None) -> dict[str, set[torch.dtype]]:
    """In a worker: what a step computes with and keeps."""
    world = world or this_world()
    precision = Precision(cell.train.precision, world.device)
    watched, gradients = Watched().to(precision.dtype), set()
    backend = backends.create(cell, world)
    model, optimizer = backend.prepare(watched, optim.factory(cell.optim))
    for p in watched.parameters():
        p.register_hook(lambda gradient: gradients.add(gradient.dtype))
    with backend.accumulate(last=True):
        with precision.autocast():
            outputs = model(torch.ones(3, 4, dtype=precision.dtype))
        loss = outputs.to(precision.dtype).mean() / 100  # small enough for the first scale of float16
        backend.backward(loss)
    # DeepSpeed takes a gradient away when it is made; fully_shard has other parameters meanwhile.
    gradients |= {p.grad.dtype for p in watched.parameters() if p.grad is not None}
    backend.step(None, measure=False)
    states = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    assert states
    return {
        "products": set(watched.products),
        "parameters": {p.dtype for p in watched.parameters()},
        "state": {v.dtype for v in states if v.dim()},
        "gradients": gradients,
        "loss": {loss.dtype},
        "saved": {v.dtype for v in backend.weights().values()} or {precision.dtype},
    }


@pytest.mark.parametrize(("backend", "name"), CELLS)
def test_the_table(backend: str, name: str):
    cell = config(backend, "AdamW", precision=name)
    kept = {TYPES[name]}
    for found in [types(cell, ALONE)] if backend == "single" else run_ranks(types, 2, cell):
        assert found.pop("products") == {PRODUCTS.get(name, TYPES[name])}
        assert found == dict.fromkeys(found, kept)


# -- the results -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), [("bfloat16", "ddp"), ("bfloat16", "deepspeed"), ("float16", "ddp")])
def test_short_formats_end_near_float32(name: str, kind: str):
    """And near each other: what a backend adds is less than what the format does."""
    alone = config("single").backend
    whole, short = (
        run_single(dataclasses.replace(config(kind, precision=p), backend=alone)) for p in ("float32", name)
    )
    assert 0 < _far(short, whole) < FROM_FLOAT32[name]
    cells = [config(b, precision=name) for b in BACKENDS if ("deepspeed" in b) == (kind == "deepspeed")]
    runs = run_ranks(run_cells, 2, cells)[0]
    assert 0 < _far(runs[0], whole) < FROM_FLOAT32[name]
    for cell, run in zip(cells[1:], runs[1:], strict=True):
        assert difference(run, runs[0]).worst < AMONG_BACKENDS, cell.backend


def _far(run, reference) -> float:
    got, expected = run.evaluation["eval/loss"], reference.evaluation["eval/loss"]
    return abs(got - expected) / expected


# -- the scale of float16 ----------------------------------------------------------------------------------------------


def overflow(cell: Config, world: World | None = None) -> list[tuple]:
    """In a worker: the scale, whether the weights moved and the norm, step by step, from a scale that is too large on
    one rank's samples alone."""
    world = world or this_world()
    precision = Precision("float16", CPU)
    torch.manual_seed(0)
    backend = backends.create(cell, world)
    model, optimizer = backend.prepare(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), optim.factory(cell.optim))
    backend.scale.factor = 2.0**22
    steps = []
    for _ in range(14):
        before = [p.detach().clone() for p in model.parameters()]
        with backend.accumulate(last=True):
            with precision.autocast():
                outputs = model(torch.full((3, 4), 1.0 if world.is_main else 1e-3))
            backend.backward(outputs.float().mean())
        norm = float(backend.step(None, measure=True))
        after = list(model.parameters())
        moved = any(bool((_whole(a) != _whole(b)).any()) for a, b in zip(after, before, strict=True))
        steps.append((backend.scale.factor, moved, math.isfinite(norm)))
    return steps


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, torch.distributed.tensor.DTensor) else tensor


@pytest.mark.parametrize("backend", ["single", "ddp", "fsdp2", "accelerate"])
def test_a_step_that_overflows_is_left_out_on_all_ranks(backend: str):
    cell = config(backend, precision="float16")
    ranks = [overflow(cell, ALONE)] if backend == "single" else run_ranks(overflow, 2, cell)
    assert all(steps == ranks[0] for steps in ranks)
    left_out = [factor for factor, moved, _ in ranks[0] if not moved]
    assert left_out, "nothing overflowed"
    assert left_out == [2.0 ** (21 - i) for i in range(len(left_out))]
    assert all(moved == finite for _, moved, finite in ranks[0])
    assert {factor for factor, moved, _ in ranks[0] if moved} == {left_out[-1]}


def test_the_scale_grows_as_torchs_own():
    ours, theirs = LossScale(), torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=LossScale.GROWTH_STEPS)
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    for step in range(2 * LossScale.GROWTH_STEPS + 100):
        finite = step not in (3, 50, 51)
        theirs.scale(torch.ones(1))  # makes its state
        weight.grad = torch.full((1,), 1.0 if finite else float("inf"))
        theirs.step(optimizer)
        theirs.update()
        ours.saw(finite)
        assert ours.factor == theirs.get_scale(), step
    assert ours.factor == 2.0**15


def test_tf32_on_a_cpu_is_refused():
    command = [sys.executable, "-m", "dist_train", "--train.precision=tf32", "--train.device=cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "train.precision: got tf32 on cpu" in done.stderr
