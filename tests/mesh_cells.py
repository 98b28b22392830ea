"""Runs on meshes of ranks, in the workers: apart from the tests, so that both can import it."""

import dataclasses
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as torch_dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

from dist_train.backends import fsdp2, matrices
from dist_train.backends.fsdp2 import FSDP2
from dist_train.checkpoint import storage
from dist_train.config.tree import BackendConfig, Config, DataConfig, ModelConfig, OptimConfig, TrackConfig, TrainConfig
from dist_train.data.order import Plan
from dist_train.errors import ConfigError
from dist_train.loop import optim
from dist_train.ranks import dist
from dist_train.ranks.dist import World

import optim_cells
from parity_cells import world_of
from resume_cells import run_once, saving

GROUPS = [{"match": "out.*", "lr": 9e-3}, {"match": "*.bias", "lr": 1e-3}, {"match": "up.*", "weight_decay": 0.3}]
# Gradients that are 0 but for rounding are 0 to this eps.
ADAMW = OptimConfig(
    name="AdamW", lr=3e-3, weight_decay=0.2, args={"eps": 1e-3}, groups=GROUPS, no_decay=True, ema=0.7, ema_start=2,
)  # fmt: skip
MUON = OptimConfig(
    name="Muon", lr=0.01, momentum=0.9, weight_decay=0.1, no_decay=True, ema=0.7, ema_start=2,
    args={"adamw": {"lr": 1e-3, "eps": 1e-3}},
)  # fmt: skip


class Split(nn.Module):
    """Layers that a mesh may split, by rows, by columns and by tokens, in sizes that no number of ranks divides; then
    some that it leaves: a norm over the batch, dropout, tied, frozen and unused weights, a scalar, a buffer."""

    def __init__(self, input_shape, classes):
        super().__init__()
        self.embed, self.norm = nn.Linear(9, 7), nn.LayerNorm(7)
        self.up, self.down, self.last = nn.Linear(7, 10), nn.Linear(10, 7), nn.RMSNorm(7)
        self.layers = nn.ModuleList(
            [nn.Linear(7, 7, bias=False), nn.Sequential(nn.BatchNorm1d(7), nn.Tanh(), nn.Dropout(0.2))]
        )
        self.first, self.again = nn.Linear(7, 7, bias=False), nn.Linear(7, 7)
        self.again.weight = self.first.weight
        self.frozen, self.unused, self.out = nn.Linear(7, 5), nn.Linear(5, 3), nn.Linear(5, classes)
        self.frozen.requires_grad_(False)
        self.temperature = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("shift", torch.linspace(-1, 1, 7))

    def forward(self, x):
        x = self.embed(x.view(-1, 4, 9))
        x = x + self.down(torch.tanh(self.up(self.norm(x))))
        x = self.layers[0](self.last(x)).mean(1)
        x = self.layers[1](x) * self.temperature + self.shift
        return self.out(self.frozen(self.again(self.first(x).tanh())))


class Inside(nn.Module):
    """A scalar that no style names, amid what the ranks have split."""

    def __init__(self, input_shape, classes):
        super().__init__()
        self.up, self.down, self.out = nn.Linear(36, 8), nn.Linear(8, 6), nn.Linear(6, classes)
        self.temperature = nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return self.out(self.down(torch.tanh(self.up(x.flatten(1))) * self.temperature))


PLANS = {
    Split: {
        "embed": ColwiseParallel(output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1), use_local_output=False),
        "down": RowwiseParallel(output_layouts=Shard(1)),
        "last": SequenceParallel(),
        "layers.0": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    },
    Inside: {"up": ColwiseParallel(), "down": RowwiseParallel()},
}


def split(self: FSDP2, model: nn.Module, tensor: DeviceMesh) -> None:
    """In the place of FSDP2.split: by a table of torch's own styles."""
    parallelize_module(model, tensor, PLANS[type(model)])


def config(
    mesh: dict[str, int] | None = None, kind: OptimConfig = ADAMW, model: str = "Split", backend: str = "", **train
) -> Config:
    """Three epochs of 12, 12 and 4 samples; without mesh and backend, of one process."""
    name, _, stage = (backend or ("fsdp2" if mesh else "single")).partition(":")
    of_all = {"grad_clip": 0.3} | train
    return Config(
        data=DataConfig(name="synthetic", args={"n": 28, "n_test": 7, "shape": (1, 6, 6), "classes": 3}),
        model=ModelConfig(name=f"mesh_cells:{model}"),
        optim=kind,
        train=TrainConfig(epochs=3, global_batch_size=12, device="cpu", eval_every_steps=4, **of_all),
        backend=BackendConfig(name=name, zero_stage=int(stage) if stage else None, mesh=mesh or {}),
        track=TrackConfig(every_steps=1),
    )


def grouped(cell: Config) -> Config:
    """With micro-batches, and batch statistics of groups."""
    model, train = dataclasses.replace(cell.model, batch_statistics={"group": 4}), cell.train
    return dataclasses.replace(cell, model=model, train=dataclasses.replace(train, micro_batch_size=4))


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run left.

    Args:
        state: weights, buffers, averages and optimizer state of its newest checkpoint, by name.
        left: weights.pt; empty if it was cut off.
        metrics: of each step, by name.
        lines: what was said of state that was not loaded, and of audits.
    """

    state: dict
    left: dict
    metrics: list[dict]
    lines: list[str]


WATCHED = ("train/loss", "train/grad_norm", "eval/loss")


def far(found: Outcome, expected: Outcome) -> tuple[float, str]:
    """The largest relative difference of a tensor that is saved or left, of a loss or norm, and its name; infinite
    where one has what the other has not."""
    pairs = {}
    for kind in ("state", "left"):
        mine, other = (
            {name: value for name, value in getattr(one, kind).items() if not name.startswith("random.")}
            for one in (found, expected)
        )
        if mine.keys() != other.keys():
            return float("inf"), f"{kind}: {sorted(mine.keys() ^ other.keys())}"
        pairs |= {f"{kind} {name}": (mine[name], other[name]) for name in other}
    for mine, other in zip(found.metrics, expected.metrics, strict=True):
        for name in [name for name in WATCHED if name in mine or name in other]:
            pairs[f"{name} of step {other['step']}"] = mine.get(name, np.inf), other.get(name, np.nan)
    distances = {name: np.linalg.norm(a - b) / (np.linalg.norm(b) + 1e-12) for name, (a, b) in pairs.items()}
    worst = max(distances, key=lambda name: np.nan_to_num(distances[name], nan=np.inf))
    return float(distances[worst]), worst


def run(cell: Config, folder: Path, cut_after: int | None = None, checkpoint: dict | None = None) -> Outcome:
    """In a worker: a run, from its checkpoint if it has one. It saves where it is cut off, or at its end."""
    with mock.patch.object(FSDP2, "split", split):
        done = run_once(saving(cell, folder, every_steps=cut_after or 99, **(checkpoint or {})), cut_after)
    return Outcome(optim_cells.saved(folder), done.weights, done.metrics, done.state_lines)


def run_all(runs: list[tuple]) -> list[Outcome]:
    """In a worker: one after another."""
    return [run(*of) for of in runs]


def refused(cell: Config, folder: Path) -> str:
    """In a worker: the lines with which a run is refused."""
    with pytest.raises(ConfigError) as caught:
        run(cell, folder)
    return "\n".join(caught.value.lines)


def with_fault(fault: str, cell: Config, folder: Path) -> Outcome:
    """In a worker: a run with one of the faults below."""
    with globals()[fault]():
        return run(cell, folder)


def written(mesh: dict[str, int], folder: Path) -> list[int]:
    """In a worker: the numbers of the weights that this rank holds, and the bytes that it writes of them."""
    cell = config(mesh, OptimConfig(name="SGD", lr=0.1))
    backend = FSDP2(cell, world_of(cell))
    backend.prepare(nn.Sequential(*(nn.Linear(64, 64) for _ in range(8))), optim.factory(cell.optim))
    state = backend.state()
    group = dist.group_of_hosts()
    files = storage.write(folder, state, group)
    held = sum(part.numel() for shards in state.values() for _, part in shards.boxes)
    return [held, sum(file.size for name, file in files.items() if name.endswith(".distcp"))]


def timeouts(mesh: dict[str, int]) -> list[set[float]]:
    """In a worker: the seconds that collectives of a mesh's groups may take: made before a watchdog judges them, made
    while it does, and after it."""
    cell, found = config(mesh), []
    world = world_of(cell)

    def now(made: DeviceMesh) -> set[float]:
        groups = [*made.get_all_groups(), dist._data or torch_dist.group.WORLD]
        return {group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups}

    before = dist.mesh("cpu", (world.size // world.tensor, world.tensor), ("shard", "tensor"))
    with dist.patient():
        meanwhile = dist.mesh("cpu", (world.tensor, world.size // world.tensor), ("replicate", "shard"))
        found += [now(before), now(meanwhile)]
    return [*found, now(before) | now(meanwhile)]


# -- planted faults ----------------------------------------------------------------------------------------------------


def counts_copies() -> AbstractContextManager:
    """The norm counts each copy of a weight."""
    return mock.patch.object(FSDP2, "_counts", lambda self, parameter: True)


def sums_over_peers() -> AbstractContextManager:
    """Gradients of whole weights are summed over all ranks, those that have the same samples too."""
    return mock.patch.object(fsdp2.dist, "sum_", dist.sum_over_all)


@contextmanager
def shares_by_rank() -> Iterator[None]:
    """Samples are shared out among all ranks, and the first step is not looked at, which would tell."""
    of = Plan.of

    def wrong(n: int, cell: Config, world: World) -> Plan:
        return of(n, cell, dataclasses.replace(world, tensor=1))

    with mock.patch.object(Plan, "of", wrong), mock.patch.object(fsdp2, "check_peers"):
        yield


def computes_parts() -> AbstractContextManager:
    """An optimizer that sees matrices is told that a part of columns is a part of rows."""
    made = matrices._of_parameter

    def wrong(parameter: nn.Parameter) -> matrices.Held:
        of = made(parameter)
        return matrices.Held(of.shape, matrices.Part(of.part.start, of.part.count)) if of.part.rows > 1 else of

    return mock.patch.object(matrices, "_of_parameter", wrong)
