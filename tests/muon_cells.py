"""Runs with Muon, in the workers: apart from the tests, so that both can import it."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_train.backends import matrices
from dist_train.backends.matrices import Exchange, Matrix, Part
from dist_train.config.tree import Config, ModelConfig, OptimConfig
from dist_train.loop import muon

import optim_cells
from parity_cells import this_world

GROUPS = [
    {"match": "thin.weight", "lr": 0.003},
    {"match": "encoder.linear1.weight", "optimizer": "Muon", "ns_steps": 4, "adjust_lr_fn": "match_rms_adamw"},
    {"match": "encoder.linear2.weight", "optimizer": "AdamW", "betas": [0.8, 0.95], "eps": 1e-3},
    {"match": "places.weight", "optimizer": "Muon"},
]
# Gradients that are 0 but for rounding are 0 to this eps.
MUON = OptimConfig(
    name="Muon", lr=0.01, momentum=0.9, weight_decay=0.1, no_decay=True, groups=GROUPS, ema=0.7, ema_start=2,
    args={"adamw": {"lr": 1e-3, "eps": 1e-3}}, schedule="linear", warmup_steps=2, lr_final=1e-3,
)  # fmt: skip


class Small(nn.Module):
    """A transformer of one layer behind a convolution. Most of its matrices have rows that 2 or 3 ranks do not divide,
    one has fewer rows than ranks; one is under two names, one frozen, one unused."""

    def __init__(self, input_shape, classes):
        super().__init__()
        self.patches = nn.Conv2d(2, 5, 3, padding=1).to(memory_format=torch.channels_last)
        self.wide, self.places = nn.Linear(5, 6), nn.Embedding(16, 6)
        self.encoder = nn.TransformerEncoderLayer(6, 2, dim_feedforward=11, dropout=0.0, batch_first=True)
        self.thin, self.thick = nn.Linear(6, 2), nn.Linear(2, 7)
        self.first, self.again = nn.Linear(7, 7, bias=False), nn.Linear(7, 7)
        self.again.weight = self.first.weight
        self.frozen, self.unused = nn.Linear(7, 7), nn.Linear(7, 3)
        self.frozen.requires_grad_(False)
        self.head = nn.Linear(7, classes)

    def forward(self, x):
        x = self.wide(self.patches(x).flatten(2).mT) + self.places.weight
        x = self.thick(self.thin(self.encoder(x).mean(1)).tanh())
        return self.head(self.frozen(self.again(self.first(x).tanh())))


def config(backend: str = "single", optim: OptimConfig = MUON, precision: str = "float32", **train) -> Config:
    cell = optim_cells.config(backend, optim, precision, **train)
    return dataclasses.replace(cell, model=ModelConfig(name="muon_cells:Small"))


def scaled(matrix: torch.Tensor) -> torch.Tensor:
    """A function of a whole matrix: none of its parts tells it."""
    return matrix * matrix.double().norm().to(matrix.dtype)


def exchanged(shapes: list[tuple[int, int]], parts: list[list[tuple[int, ...]]], dtype: str) -> list[list[float]]:
    """In a worker: of matrices of which it has these parts, by rank, its parts of a function of the whole ones."""
    world, work = this_world(), []
    for i, shape in enumerate(shapes):
        matrix = torch.linspace(-1, 1 + i, shape[0] * shape[1]).to(getattr(torch, dtype))
        of = Matrix(shape, 0, tuple(Part(*held) for held in parts[i]))
        mine = of.parts[world.rank].of(matrix.view(shape)).reshape(-1)
        work.append((of, mine, scaled))
    return [part.tolist() for part in Exchange(world).mapped(work)]


def in_small_exchanges(cell: Config, folder: Path) -> optim_cells.Outcome:
    """In a worker: a run in which a few matrices at a time are exchanged."""
    before, muon.AT_ONCE = muon.AT_ONCE, 20
    try:
        return optim_cells.run(cell, folder)
    finally:
        muon.AT_ONCE = before


# -- planted faults ----------------------------------------------------------------------------------------------------


class OfShards(Exchange):
    """Computes with what this rank holds."""

    def mapped(self, work):
        found = []
        for matrix, part, function in work:
            columns = matrix.shape[1]
            shape = (-1, columns) if len(part) % columns == 0 else (1, len(part))
            found.append(function(part.view(shape)).reshape(-1) if len(part) else part)
        return found


class OthersShare(Exchange):
    """Gives each rank the share of the next one, where both are of a size."""

    def _returned(self, found: Mapping[int, torch.Tensor], matrices: Any, *rest: Any) -> list[torch.Tensor]:
        def moved(of: Matrix) -> Matrix:
            alike = len({part.count for part in of.parts}) == 1
            return Matrix(of.shape, of.offset, of.parts[1:] + of.parts[:1]) if alike else of

        return super()._returned(found, [moved(of) for of in matrices], *rest)


class NotShown(Exchange):
    """Keeps the results of other ranks from being exchanged."""

    def _shown(self, found: Mapping[int, torch.Tensor], matrices: Any, *rest: Any) -> list[torch.Tensor]:
        results = super()._shown(found, matrices, *rest)
        return [found[i].reshape(-1) if i in found else torch.zeros_like(of) for i, of in enumerate(results)]


def with_fault(name: str, cell: Config, folder: Path) -> optim_cells.Outcome:
    """In a worker: a run with a broken exchange in the place of ours."""
    before, matrices.Exchange = matrices.Exchange, globals()[name]
    try:
        return optim_cells.run(cell, folder)
    finally:
        matrices.Exchange = before
