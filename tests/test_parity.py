"""The promise: a backend changes speed and memory, and nothing else. And the faults that the measure must catch."""

import dataclasses
import itertools
from contextlib import nullcontext
from functools import cache

import pytest
import torch
import torch.distributed as torch_dist
from torch import nn

from dist_train import dist, optim
from dist_train.backends.ddp import DDP
from dist_train.backends.fsdp2 import FSDP2
from dist_train.backends.single import Single
from dist_train.config import BackendConfig, Config
from dist_train.tools.trajectory import Trajectory, difference

from parity_cells import ALONE, BACKENDS, TOLERANCE, config, run_cells, run_single
from ranks import run_ranks

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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("world_size", [1, 2, 4])
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
        early = optimizer_fn(list(model.parameters()))
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
        lr = optim.lr_at(self.config.optim, self.done * self.world.size, self.config.train.max_steps)
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


def test_the_measure_refuses_unlike_runs():
    run = Trajectory([1.0], [1.0], {"w": torch.ones(2).numpy()}, {"eval/loss": 1.0}, 0.0)
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
