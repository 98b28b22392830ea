"""Norms over a batch: of the whole step, or of fixed groups of it, whatever the ranks and micro-batches."""

import copy
import dataclasses
import unittest.mock
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from dist_train import backends
from dist_train.config.load import load
from dist_train.config.tree import BackendConfig, CompileConfig, Config, ModelConfig, OptimConfig, TrainConfig
from dist_train.data.order import share
from dist_train.models import statistics
from dist_train.models.running import running
from dist_train.models.statistics import exchange
from dist_train.ranks import dist
from dist_train.run import assemble
from dist_train.run.batch_statistics import notes
from dist_train.tools.agreement import Difference, Trajectory, beyond, difference, limit
from dist_train.tools.trajectory import rounding

import zoo_cells
from parity_cells import ALONE, BACKENDS, run_cells, run_single, this_world
from workers import run_ranks
from zygote import Run

FEATURES, SAMPLES = 3, 7
MODES = {"global": "global", "groups": {"group": 6}}


def wide(value: torch.Tensor) -> np.ndarray:
    return value.detach().double().numpy().copy()


# Each with the shape of a sample behind its features.
KINDS = {
    "1d": (lambda: nn.BatchNorm1d(FEATURES), ()),
    "1d of sequences": (lambda: nn.BatchNorm1d(FEATURES), (5,)),
    "2d": (lambda: nn.BatchNorm2d(FEATURES, momentum=0.3, eps=1e-3), (2, 4)),
    "3d": (lambda: nn.BatchNorm3d(FEATURES), (2, 1, 2)),
    "synchronised": (lambda: nn.SyncBatchNorm(FEATURES), (2, 2)),
    "cumulative": (lambda: nn.BatchNorm2d(FEATURES, momentum=None), (2, 2)),
    "no weights": (lambda: nn.BatchNorm2d(FEATURES, affine=False), (2, 2)),
    "no memory": (lambda: nn.BatchNorm2d(FEATURES, track_running_stats=False), (2, 2)),
}


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    """Of three steps, with means that are large beside the deviations."""
    generator = torch.Generator().manual_seed(4)
    each = [torch.randn(SAMPLES, FEATURES, *shape, generator=generator, dtype=torch.float64) for _ in range(3)]
    return [(x * 0.5 + 20.0).to(dtype) for x in each]


def outcome(norm: nn.Module, steps: list[torch.Tensor], counted: bool = True) -> dict[str, np.ndarray]:
    """The steps' outputs, gradients and memory, of a loss that differs in all values of all samples."""
    found = {}
    for i, x in enumerate(steps):
        x = x.clone().requires_grad_()
        with running(SimpleNamespace(size=len(x) if counted else 0)):
            y = norm(x)
            place = torch.arange(i + 1, i + 1 + y[0].numel(), dtype=y.dtype).view(y.shape[1:]).cos()
            loss = (torch.sin(3 * y) * place).sum() + (y**3).sum()
            (loss if counted else loss * 0.0).backward()
        found |= {f"{i} output": wide(y), f"{i} gradient": wide(x.grad)}
    found |= {f"sum {name}": wide(p.grad) for name, p in norm.named_parameters()}
    return found | {f"buffer {name}": wide(b) for name, b in norm.state_dict().items() if b is not None}


def drawn(kind: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(2)
    norm = KINDS[kind][0]().to(dtype)
    for parameter in norm.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    return norm


SHARES = {2: (0, 3), 3: (0, 2, 5), 4: (0, 0, 1, 4)}  # where each rank begins; the second of four has a stand-in


def on_ranks(kind: str, dtype: torch.dtype, forward=None) -> tuple[dict[str, np.ndarray], str]:
    """In a worker: this rank's share."""
    norm, world = drawn(kind, dtype), this_world()
    names = list(norm.state_dict())
    exchange(norm, None, world.size, compiles=False)
    assert list(norm.state_dict()) == names
    starts = (*SHARES[world.size], SAMPLES)
    mine = slice(starts[world.rank], starts[world.rank + 1])
    steps = inputs(KINDS[kind][1], dtype)
    counted = mine.stop > mine.start
    return outcome(norm, [x[mine] if counted else x[:2] for x in steps], counted), type(norm).__name__


def joined(by_rank: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """What the ranks have together."""
    starts = (*SHARES[len(by_rank)], SAMPLES)
    counted = [found for found, start, stop in zip(by_rank, starts, starts[1:], strict=False) if stop > start]
    whole = {}
    for name in by_rank[0]:
        every = [found[name] for found in by_rank]
        if name.startswith("sum"):
            whole[name] = sum(every)
        elif name.startswith("buffer"):
            assert all(np.array_equal(value, every[0]) for value in every)
            whole[name] = every[0]
        else:
            whole[name] = np.concatenate([found[name] for found in counted])
    return whole


def far(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    assert found.keys() == expected.keys()
    return max(np.abs(found[name] - expected[name]).max() / max(1.0, np.abs(expected[name]).max()) for name in found)


def all_kinds(dtype: torch.dtype) -> list[tuple[dict[str, np.ndarray], str]]:
    return [on_ranks(kind, dtype) for kind in KINDS]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_statistics_of_all_ranks_are_torchs_of_the_whole_batch(ranks: int, dtype: torch.dtype, tolerance: float):
    for kind, *by_rank in zip(KINDS, *run_ranks(all_kinds, ranks, dtype), strict=True):
        plain = drawn(kind, dtype)
        expected = outcome(plain, inputs(KINDS[kind][1], dtype))
        assert far(joined([found for found, _ in by_rank]), expected) < tolerance, kind
        assert {name for _, name in by_rank} == {type(plain).__name__}


# -- planted faults ----------------------------------------------------------------------------------------------------


def faulty(fault: str) -> dict[str, np.ndarray]:
    """In a worker: this rank's share, with a fault."""
    norm, world = drawn("2d", torch.float64), this_world()
    if fault != "of a share":
        exchange(norm, None, world.size, compiles=False)
    starts = (*SHARES[world.size], SAMPLES)
    mine = slice(starts[world.rank], starts[world.rank + 1])
    counted, steps = mine.stop > mine.start, inputs(KINDS["2d"][1], torch.float64)
    shares = [x[mine] if counted else x[:2] for x in steps]
    kept = statistics._remember
    if fault == "biased":
        statistics._remember = lambda norm, mean, var, count: kept(norm, mean, var * ((count - 1) / count), count)
    try:
        if fault == "stand-ins count":
            with unittest.mock.patch.object(statistics, "counts", lambda: True):
                return outcome(norm, shares, counted)
        return outcome(norm, shares, counted)
    finally:
        statistics._remember = kept


@pytest.mark.parametrize("fault", ["of a share", "biased", "stand-ins count"])
def test_a_planted_fault_is_caught(fault: str):
    by_rank = run_ranks(faulty, 4, fault)
    expected = outcome(drawn("2d", torch.float64), inputs(KINDS["2d"][1], torch.float64))
    if fault == "of a share":
        assert not np.array_equal(by_rank[0]["buffer running_mean"], by_rank[3]["buffer running_mean"])
        by_rank = [found | {name: by_rank[3][name] for name in found if "buffer" in name} for found in by_rank]
    found = joined(by_rank)
    assert far(found, expected) > 1e-3
    rest = [name for name in found if "running_var" not in name]
    exact = far({name: found[name] for name in rest}, {name: expected[name] for name in rest}) < 1e-12
    assert exact == (fault == "biased")


# -- groups ------------------------------------------------------------------------------------------------------------

GROUP = 3
GROUP_SHARES = {2: (0, 3), 3: (0, 3, 6), 4: (0, 3, 3, 6)}  # of 7 samples; the second of four has a stand-in


def grouped(kind: str, dtype: torch.dtype, ranks: int, rank: int) -> dict[str, np.ndarray]:
    """The steps of this rank's groups."""
    norm = drawn(kind, dtype)
    kept = exchange(norm, GROUP, ranks, compiles=False)
    starts = (*GROUP_SHARES.get(ranks, (0,)), SAMPLES)
    mine, found = slice(starts[rank], starts[rank + 1]), {}
    counted = mine.stop > mine.start
    for i, x in enumerate(inputs(KINDS[kind][1], dtype)):
        part = x[mine] if counted else x[:2]
        found |= {f"{i} {name}": value for name, value in outcome(norm, [part], counted).items()}
        kept.settle(taken=i != 1)  # the second step is left out
        found |= {f"buffer {i} {name}": wide(value) for name, value in norm.state_dict().items() if name in BUFFERS}
        norm.zero_grad()
    return found


BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
GROUPED = ("1d of sequences", "2d", "3d", "cumulative", "synchronised")


def all_grouped(dtype: torch.dtype) -> list[dict[str, np.ndarray]]:
    world = this_world()
    return [grouped(kind, dtype, world.size, world.rank) for kind in GROUPED]


def by_hand(kind: str, dtype: torch.dtype) -> dict[str, np.ndarray]:
    """torch's own norm on each group; and what is remembered by the words of the docs."""
    norm, found, remembered = drawn(kind, dtype), {}, (0.0, 1.0, 0)
    for i, x in enumerate(inputs(KINDS[kind][1], dtype)):
        norm.zero_grad()
        parts = [outcome(copy.deepcopy(norm), [part]) for part in x.split(GROUP)]
        for name in ("0 output", "0 gradient"):
            found[f"{i} {name}"] = np.concatenate([part[name] for part in parts])
        for name in ("sum weight", "sum bias"):
            found[f"{i} {name}"] = sum(part[name] for part in parts)
        if i != 1:
            values = [part.transpose(0, 1).flatten(1) for part in x.split(GROUP)]  # [features, values]
            share = torch.tensor([v.shape[1] for v in values], dtype=dtype)[:, None] / sum(v.shape[1] for v in values)
            seen = [(torch.stack([of(v) for v in values]) * share).sum(0) for of in (lambda v: v.mean(1), unbiased)]
            steps = remembered[2] + 1
            momentum = 1 / steps if norm.momentum is None else norm.momentum
            moved = [old + momentum * (wide(new) - old) for old, new in zip(remembered, seen, strict=False)]
            remembered = (*moved, steps)
        found |= {f"buffer {i} {name}": value for name, value in zip(BUFFERS, remembered, strict=True)}
    return found


def unbiased(values: torch.Tensor) -> torch.Tensor:
    return values.var(1)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_groups_are_normalized_each_by_itself_and_remembered_once_a_step(ranks: int):
    dtype = torch.float64
    every = [[grouped(kind, dtype, 1, 0) for kind in GROUPED]] if ranks == 1 else run_ranks(all_grouped, ranks, dtype)
    for kind, *by_rank in zip(GROUPED, *every, strict=True):
        expected, found = by_hand(kind, dtype), {}
        starts = (*GROUP_SHARES.get(ranks, (0,)), SAMPLES)
        counted = [part for part, start, stop in zip(by_rank, starts, starts[1:], strict=False) if stop > start]
        for name in expected:
            parts = [part[name] for part in counted]
            if name.startswith("buffer"):
                assert all(np.array_equal(part[name], by_rank[0][name]) for part in by_rank)
                found[name] = parts[0]
            else:
                found[name] = sum(parts) if " sum " in name else np.concatenate(parts)
        assert far(found, expected) < 1e-12, kind


# -- runs --------------------------------------------------------------------------------------------------------------


def kept(folder: Path, step: int, ranks: int) -> list[dict[str, torch.Tensor]]:
    return [torch.load(folder / f"{step}-{rank}.pt") for rank in range(ranks)]


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("mode", [[], ["--model.batch_statistics.group=8"]])
def test_running_statistics_are_equal_on_all_ranks_and_right_after_a_resume_elsewhere(mode, zygote, tmp_path: Path):
    argv = ["--model.name=statistics_runs:Net", "--train.max_steps=4", "--train.device=cpu", "--track.progress=lines"]
    # A bias below a norm has no gradient but rounding, which is 0 to this eps.
    argv += [*mode, "--train.eval_every_epochs=null", "--optim.args.eps=1e-3"]

    def start(name: str, ranks: int, *more: str) -> Run:
        hook = f"[{{name: statistics_runs:Keeps, folder: {tmp_path / name}}}]"
        return Run([*argv, f"--run.dir={tmp_path / f'run-{name}'}", f"--train.hooks={hook}", *more], ranks)

    first = zygote.run(start("ddp", 2, "--checkpoint.every_steps=2", "--checkpoint.keep_last=9"))[0].check()
    saved = f"--checkpoint.resume={tmp_path / 'run-ddp' / 'checkpoints' / 'step-00000002'}"
    elsewhere = start("fsdp2", 3, saved, "--backend.name=fsdp2"), start("single", 1, saved)
    for ended in zygote.run(*elsewhere):
        ended.check()
    for step in range(1, 5):
        assert equal(*kept(tmp_path / "ddp", step, 2))
    at_the_start, at_the_end = (kept(tmp_path / "ddp", step, 1)[0] for step in (2, 4))
    for name, ranks in (("fsdp2", 3), ("single", 1)):
        assert all(equal(found, at_the_start) for found in kept(tmp_path / name, 2, ranks))
        for found in kept(tmp_path / name, 4, ranks):
            for buffer in ("2.running_mean", "2.running_var", "2.num_batches_tracked"):
                torch.testing.assert_close(found[buffer], at_the_end[buffer], rtol=1e-5, atol=1e-6)
    of = "of groups of 8 samples" if mode else "of all samples of a step, exchanged among the ranks"
    assert f"batch statistics {of} (model.batch_statistics): 2\n" in first.out[0]
    assert "buffers that each rank changes by its own samples: brightness; after every step all" in first.out[0]


def test_buffers_that_no_sample_changes_are_not_said_to_differ():
    argv = ["--data.name=digits", "--model.name=statistics_runs:Spectral", "--train.device=cpu"]
    findings = assemble.build(load(argv), torch.device("cpu")).findings
    assert "calls" in findings.buffers and len(findings.buffers) == 3
    assert findings.by_samples == () and notes(load(argv), findings, 2) == []


# -- compiled ----------------------------------------------------------------------------------------------------------


def compiled(mode: str, compiles: bool) -> list[float]:
    """In a worker: losses of three steps, of shares that differ."""
    torch.manual_seed(0)
    model, world = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2)), this_world()
    config = Config(
        model=ModelConfig(batch_statistics=MODES[mode]),
        train=TrainConfig(device="cpu"),
        compile=CompileConfig(mode="default" if compiles else "off", fullgraph=mode == "groups"),
        backend=BackendConfig(name="ddp"),
    )
    backend, losses = backends.create(config, world), []
    called, _ = backend.prepare(model, lambda named: torch.optim.SGD([p for _, p in named], lr=0.1))
    x = torch.randn(3, 18, 4, generator=torch.Generator().manual_seed(1))
    for step in x:
        part = step[share(18, world.rank, world.size, 6 if mode == "groups" else 1)]
        loss = called(part).square().mul(torch.tensor([1.0, -2.0])).sum() / len(step)
        backend.backward(loss)
        backend.step(None, measure=False)
        losses.append(float(dist.sum_(loss.detach().clone())))
    return losses


@pytest.mark.parametrize("mode", ["global", "groups"])
def test_compiled_as_eager(mode: str):
    torch.testing.assert_close(run_ranks(compiled, 2, mode, True), run_ranks(compiled, 2, mode, False))


# -- ResNet-18 under every backend -------------------------------------------------------------------------------------

SGD = OptimConfig(name="SGD", lr=1e-3)


def resnet(backend: str, mode: str, precision: str, steps: int) -> Config:
    """Steps of 12. In float64 as it is, with a last step of 4 in each epoch where statistics are of all; in float32
    without the kinks, at which the last bit decides a gradient."""
    exact = precision == "float64"
    n = 28 if exact and mode == "global" else 24
    kind = "ResNet18Norms" if exact else "SmoothResNet18"
    cell = zoo_cells.config(kind, backend, n, SGD, precision=precision)
    model = dataclasses.replace(cell.model, batch_statistics=MODES[mode])
    return dataclasses.replace(cell, model=model, train=dataclasses.replace(cell.train, max_steps=steps))


@cache
def reference(mode: str, precision: str, steps: int) -> tuple[Trajectory, Difference | float]:
    """The run of one process, and how far another may be from it: in float32, four times as far as rounding takes one
    process; for DeepSpeed, which has no float64."""
    cell = resnet("single", mode, precision, steps)
    run = run_single(cell)
    return run, limit(precision, rounding(cell, ALONE, run) if precision == "float32" else None)


DAILY = (("ddp", "global", 2), ("fsdp2", "groups", 2))
CELLS = [
    pytest.param(backend, mode, ranks, 6, marks=pytest.mark.full)
    for backend in BACKENDS
    for mode in MODES
    for ranks in (1, 2, 3)
]


@pytest.mark.parametrize(("backend", "mode", "ranks", "steps"), [*((*cell, 3) for cell in DAILY), *CELLS])
def test_resnet18_trains_as_in_one_process(backend: str, mode: str, ranks: int, steps: int):
    precision = "float32" if backend.startswith("deepspeed") else "float64"
    run = run_ranks(run_cells, ranks, [resnet(backend, mode, precision, steps)], timeout_s=300)[0][0]
    expected, allowed = reference(mode, precision, steps)
    assert not beyond(difference(run, expected), allowed)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", ["alone", "groups", "ranks"])
def test_a_single_sample_gets_its_gradient(mode: str, training: bool):
    """Also where it comes transposed, as before attention, which torch's own backward takes for something else."""
    generator = torch.Generator().manual_seed(2)
    x, weights = (torch.randn(1, *shape, generator=generator) for shape in ((16, 4, 4), (16, 16)))
    expected, found = (nn.Sequential(nn.BatchNorm2d(16)).train(training) for _ in range(2))
    exchange(found, 1 if mode == "groups" else None, 2 if mode == "ranks" else 1, compiles=False)
    gradients = []
    for model, rows in ((expected, 2), (found, 1)):
        one = x.clone().requires_grad_()
        out = model(one.expand(rows, -1, -1, -1))  # twice the same sample has the statistics of the one
        (out.flatten(2).transpose(1, 2) * weights).sum().div(rows).backward()
        gradients.append([one.grad, *(p.grad for p in model.parameters())])
    for got, right in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)
