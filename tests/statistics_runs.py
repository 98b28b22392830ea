"""A model and a hook of runs whose batch statistics are looked at: apart from the tests, for the ranks to import."""

from pathlib import Path

import torch
from torch import nn

import dist_train


class Net(nn.Sequential):
    """Two norms over a batch, and a buffer that each rank changes by its own samples."""

    def __init__(self, input_shape, classes):
        super().__init__(nn.Flatten(), nn.Linear(64, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, classes))
        self.register_buffer("brightness", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.brightness.copy_(x.detach().mean())
        return super().forward(x)


class Spectral(nn.Sequential):
    """Buffers that change in each forward, and are the same on all ranks whatever their samples."""

    def __init__(self, input_shape, classes):
        middle = nn.utils.parametrizations.spectral_norm(nn.Linear(64, 6))
        super().__init__(nn.Flatten(), middle, nn.Linear(6, classes))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class Keeps(dist_train.Hook):
    """Writes the buffers of each rank at the start and after each step."""

    def __init__(self, folder: str):
        self.folder = Path(folder)

    def start(self, run: dist_train.Run) -> None:
        self.after_step(run)

    def after_step(self, run: dist_train.Run) -> None:
        found = {name.removeprefix("module."): value.clone() for name, value in run.model.named_buffers()}
        self.folder.mkdir(exist_ok=True)
        torch.save(found, self.folder / f"{run.step}-{run.world.rank}.pt")
