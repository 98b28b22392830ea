"""Runs on meshes of ranks, in the workers: apart from the tests, so that both can import it."""

import dataclasses
from pathlib import Path
from unittest import mock

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

from dist_train.backends.fsdp2 import FSDP2
from dist_train.config.tree import BackendConfig, Config, DataConfig, ModelConfig, OptimConfig, TrackConfig, TrainConfig

import optim_cells
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
        self.layers = nn.ModuleList([nn.Linear(7, 7), nn.Sequential(nn.BatchNorm1d(7), nn.Tanh(), nn.Dropout(0.2))])
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
        self.up, self.down, self.out = nn.Linear(36, 7), nn.Linear(7, 6), nn.Linear(6, classes)
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
    Inside: {"up": ColwiseParallel(use_local_output=True), "down": RowwiseParallel()},
}


def split(self: FSDP2, model: nn.Module, tensor: DeviceMesh) -> None:
    """In the place of FSDP2.split: by a table of torch's own styles."""
    parallelize_module(model, tensor, PLANS[type(model)])


def config(
    mesh: dict[str, int] | None = None, optim: OptimConfig = ADAMW, model: str = "Split", backend: str = "", **train
) -> Config:
    """Three epochs of 12, 12 and 4 samples; without mesh and backend, of one process."""
    name, _, stage = (backend or ("fsdp2" if mesh else "single")).partition(":")
    of_all = {"grad_clip": 0.3, "micro_batch_size": 4} | train
    return Config(
        data=DataConfig(name="synthetic", args={"n": 28, "n_test": 7, "shape": (1, 6, 6), "classes": 3}),
        model=ModelConfig(name=f"mesh_cells:{model}"),
        optim=optim,
        train=TrainConfig(epochs=3, global_batch_size=12, device="cpu", eval_every_steps=4, **of_all),
        backend=BackendConfig(name=name, zero_stage=int(stage) if stage else None, mesh=mesh or {}),
        track=TrackConfig(every_steps=1),
    )


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run left.

    Args:
        state: weights, buffers, averages and optimizer state of its newest checkpoint, by name.
        left: weights.pt; empty if it was cut off.
        metrics: of each step, by name.
        lines: what was said of state that was not loaded.
    """

    state: dict
    left: dict
    metrics: list[dict]
    lines: list[str]


def run(cell: Config, folder: Path, cut_after: int | None = None, **checkpoint) -> Outcome:
    """In a worker: a run, from its checkpoint if it has one. It saves where it is cut off, or at its end."""
    with mock.patch.object(FSDP2, "split", split):
        done = run_once(saving(cell, folder, every_steps=cut_after or 99, **checkpoint), cut_after)
    return Outcome(optim_cells.saved(folder), done.weights, done.metrics, done.state_lines)


def run_all(runs: list[tuple]) -> list[Outcome]:
    """In a worker: one after another."""
    return [run(*of) for of in runs]
