"""The promise: a backend changes speed and memory, and nothing else. And the faults that the measure must catch."""

import dataclasses
import itertools
from contextlib import nullcontext
from functools import cache

import numpy as np
import pytest
import torch
import torch.distributed as torch_dist
from torch import nn

from dist_train.backends.ddp import DDP
from dist_train.backends.fsdp2 import FSDP2
from dist_train.backends.single import Single
from dist_train.config.tree import BackendConfig, Config, ModelConfig, OptimConfig
from dist_train.loop import optim
from dist_train.loop.schedule import lr_at
from dist_train.ranks import dist
from dist_train.tools.agreement import FLOOR, Difference, Trajectory, beyond, difference, limit
from dist_train.tools.trajectory import rounding

from parity_cells import ALONE, BACKENDS, TOLERANCE, config, run_cells, run_single
from workers import run_ranks

# A covering part of the product: every pair of (optimizer, accumulation, clipping, precision) is there.
CELLS = [
    ("SGD", None, False, "float32"),
    ("SGD", 1, True, "float32"),
    ("AdamW", 1, False, "float32"),
    ("AdamW", None, True, "float32"),
    ("linear", 1, True, "float32"),
    ("SGD", 1, False, "float64"),
    ("AdamW", None, True, "float64"),
]
FULL = list(itertools.product(["SGD", "AdamW", "linear"], [None, 1], [False, True], ["float32", "float64"]))


@cache
def reference(optimizer: str, accumulation: int, clips: bool, precision: str, wide: bool) -> Trajectory:
    return run_single(_cell("deepspeed" if wide else "single", optimizer, accumulation, clips, precision, 1, "single"))


def _cell(backend, optimizer, accumulation, clips, precision, world_size, name=None) -> Config:
    micro_batch_size = 64 // world_size // 4 if accumulation else None  # four micro-batches in a full step
    cell = config(backend, optimizer, micro_batch_size, clips, precision)
    return dataclasses.replace(cell, backend=BackendConfig(name)) if name else cell


def compare(backend: str, world_size: int, cells: list[tuple]) -> None:
    wide = backend.startswith("deepspeed")
    cells = [cell for cell in cells if not (wide and cell[3] == "float64")]  # DeepSpeed has no float64
    runs = run_ranks(run_cells, world_size, [_cell(backend, *cell, world_size) for cell in cells], timeout_s=240)[0]
    for cell, run in zip(cells, runs, strict=True):
        found = difference(run, reference(*cell, wide))
        assert found.worst < TOLERANCE[cell[3]], f"{backend} on {world_size} ranks, {cell}: {found}"


# Every day two ranks, and one where state would be sharded.
DAILY = [*((backend, 2) for backend in BACKENDS), ("fsdp2", 1), ("deepspeed:3", 1)]
REST = [cell for cell in itertools.product(BACKENDS, (1, 4)) if cell not in DAILY]


@pytest.mark.parametrize(
    ("backend", "world_size"), [*DAILY, *(pytest.param(*cell, marks=pytest.mark.full) for cell in REST)]
)
def test_same_as_single(backend: str, world_size: int):
    compare(backend, world_size, CELLS)


@pytest.mark.full
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_same_as_single_in_full(backend: str, world_size: int):
    compare(backend, world_size, FULL)


# -- planted faults --------------------------------------------------------------------------------------------------


class NotDividedByAccumulation(DDP):
    def backward(self, loss):
        super().backward(loss * 4)


class DividedTwice(DDP):
    def backward(self, loss):
        super().backward(loss / 4)


class MeanOfRankMeans(DDP):
    def prepare(self, model, optimizer_fn):
        model.register_forward_pre_hook(lambda _, args: setattr(self, "count", len(args[0])))
        return super().prepare(model, optimizer_fn)

    def backward(self, loss):
        total = int(dist.sum_(torch.tensor(self.count)))
        super().backward(loss * total / (max(self.count, 1) * self.world.size))


class ExchangedTooOften(Single):
    def backward(self, loss):
        loss.backward()
        for p in self.model.parameters():
            torch_dist.all_reduce(p.grad)  # what was exchanged before is summed once more


class OptimizerBeforeSharding(FSDP2):
    def prepare(self, model, optimizer_fn):
        early = optimizer_fn(list(model.named_parameters()))
        super().prepare(model, optimizer_fn)
        self.optimizer = early
        return self.model, early


class WeightsDifferByRank(FSDP2):
    def prepare(self, model, optimizer_fn):
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1 + 0.01 * self.world.rank)
        return super().prepare(model, optimizer_fn)


class ClippedByLocalNorm(FSDP2):
    def step(self, max_norm, measure):
        for p in self.model.parameters():
            p.grad._local_tensor.mul_(min(1.0, max_norm / float(p.grad.to_local().norm())))
        return super().step(None, measure)


class ScheduledOncePerRank(DDP):
    done = 0

    def step(self, max_norm, measure):
        lr = lr_at(self.config.optim, self.done * self.world.size, self.config.train.max_steps)
        optim.set_lr(self.optimizer, max(lr, 0.0))
        self.done += 1
        return super().step(max_norm, measure)


class NothingExchanged(Single):
    def accumulate(self, last):
        return nullcontext()


FAULTS = {
    NotDividedByAccumulation: ("SGD", 8, False),
    DividedTwice: ("SGD", 8, False),
    MeanOfRankMeans: ("SGD", None, False),
    ExchangedTooOften: ("SGD", 8, False),
    OptimizerBeforeSharding: ("SGD", None, False),
    WeightsDifferByRank: ("SGD", None, False),
    ClippedByLocalNorm: ("SGD", None, True),
    ScheduledOncePerRank: ("linear", None, False),
    NothingExchanged: ("SGD", None, False),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault: type):
    cell = config("single", *FAULTS[fault])
    faulty = dataclasses.replace(cell, backend=BackendConfig(f"{__name__}:{fault.__name__}"))
    found = difference(run_ranks(run_cells, 2, [faulty])[0][0], run_single(cell))
    assert not found.worst < 10 * TOLERANCE["float32"], found


class ScaledALittle(DDP):
    def backward(self, loss):
        super().backward(loss * (1 + 3e-5))


class BiasNotExchanged(DDP):
    """One bias of ten numbers keeps the gradient of its own rank."""

    def prepare(self, model, optimizer_fn):
        DDP.prepare(self, model, optimizer_fn)
        self.bias = list(model.parameters())[-1]
        return self.model, self.optimizer

    def backward(self, loss):
        own = torch.autograd.grad(loss, self.bias, retain_graph=True)[0] * self.world.size
        super().backward(loss)
        self.bias.grad.copy_(own)


class DecayedTwice(DDP):
    def step(self, max_norm, measure):
        group = self.optimizer.param_groups[0]
        with torch.no_grad():
            for p in self.parameters:
                p.mul_(1 - group["lr"] * group["weight_decay"])
        return super().step(max_norm, measure)


SMALL_FAULTS = (ScaledALittle, BiasNotExchanged, DecayedTwice)


def kinked(precision: str = "float32") -> Config:
    """A model with ReLU, where the rule is what rounding does to one process."""
    cell = config("single", "AdamW", precision=precision)
    decays = OptimConfig(name="AdamW", lr=1e-3, weight_decay=0.01)
    return dataclasses.replace(cell, model=ModelConfig(hidden=[50, 30], activation="ReLU"), optim=decays)


@cache
def kinked_reference(precision: str) -> tuple[Trajectory, Difference]:
    run = run_single(kinked(precision))
    return run, rounding(kinked(precision), ALONE, run)


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("fault", SMALL_FAULTS)
def test_a_small_fault_is_caught_also_where_there_are_kinks(fault: type, precision: str):
    cell = kinked(precision)
    reference, around = kinked_reference(precision)
    cells = [dataclasses.replace(cell, backend=BackendConfig(name)) for name in (f"{__name__}:{fault.__name__}", "ddp")]
    faulty, sound = run_ranks(run_cells, 2, cells)[0]
    allowed = limit(precision, around)
    assert not beyond(difference(sound, reference), allowed)
    assert beyond(difference(faulty, reference), allowed)


def test_rounding_is_measured_and_its_limit_has_a_floor_and_a_cap():
    around = Difference(np.array([0.0, 1e-4, 1.0, np.nan]), np.array([1e-9, 2e-4, 3e-3]), 5.0)
    allowed = limit("float32", around)
    assert allowed.losses == pytest.approx([1e-5, 4e-4, 1e-2, 1e-2])
    assert allowed.grad_norms == pytest.approx([1e-5, 8e-4, 1e-2]) and allowed.weights == 1e-2
    assert limit("float64", around) == FLOOR["float64"] == 1e-9
    found = Difference(np.array([9e-6, 3e-4, 0.0, 0.0]), np.array([0.0, 0.0, 0.0]), 9e-3)
    assert not beyond(found, allowed)
    found.grad_norms[1] = 9e-4
    assert beyond(found, allowed) == "gradient norm of step 2 9.0e-04 off, expected at most 8.0e-04"
    found.losses[0] = np.nan
    assert beyond(found, allowed) == "loss of step 1 nan off, expected at most 1.0e-05"
    reference, measured = kinked_reference("float32")
    assert (np.diff(measured.grad_norms) >= 0).all() and measured.grad_norms[-1] > 0
    assert 0 < measured.weights < 1e-2, "moved weights are taken back: what is left is what training made of it"


def test_a_tensor_is_compared_on_the_scale_of_the_update():
    """A frozen bias of zeros, and a weight whose gradient is rounding alone, are no fault; a small wrong one is."""
    weights = {"w": np.full(1000, 3.0), "frozen": np.zeros(4), "key.bias": np.full(4, 1e-8), "bias": np.full(4, 0.1)}
    run = Trajectory([1.0], [1.0], weights, {"eval/loss": 1.0}, 0.0, 1.0, {"count": np.zeros(()), "mean": np.ones(3)})
    assert difference(run, run).worst == 0
    other = dataclasses.replace(run, weights=weights | {"key.bias": np.full(4, -1e-8)})
    assert 0 < difference(other, run).weights < 1e-6
    found = difference(dataclasses.replace(run, weights=weights | {"bias": np.full(4, 0.1001)}), run)
    assert found.weights == pytest.approx(2e-4) and found.worst_tensor == "bias"
    assert difference(dataclasses.replace(run, buffers=run.buffers | {"mean": np.full(3, 1.1)}), run).weights > 0.09
    still = dataclasses.replace(run, update=0.0)
    assert difference(still, still).worst == 0 and difference(other, still).weights == np.inf


def test_the_measure_refuses_unlike_runs():
    run = Trajectory([1.0], [1.0], {"w": torch.ones(2).numpy()}, {"eval/loss": 1.0}, 0.0, 1.0, {})
    with pytest.raises(ValueError, match="steps: got 1, expected 2"):
        difference(run, dataclasses.replace(run, losses=[1.0, 1.0]))
    with pytest.raises(ValueError, match="weights"):
        difference(run, dataclasses.replace(run, weights={"v": run.weights["w"]}))
    broken = difference(dataclasses.replace(run, losses=[float("nan")]), run)
    assert not broken.worst < 1e-5
    assert difference(run, run).worst == 0


def test_the_norm_is_torchs_own():
    """The definition of the norm that every backend is compared with."""
    model = nn.Linear(3, 2)
    single = Single(config(), ALONE)
    single.prepare(model, lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    model.weight.grad, model.bias.grad = torch.full((2, 3), 3.0), torch.full((2,), 4.0)
    assert float(single.step(None, measure=True)) == pytest.approx((6 * 9 + 2 * 16) ** 0.5)
