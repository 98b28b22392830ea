"""Two numbers from ten measurements: a plain network, and a loss that single outliers move little."""

import torch
from torch import nn

from dist_train import Columns, Data


class Network(nn.Module):
    """Two layers with a way around them."""

    def __init__(self, features: int, outputs: int, width: int = 12):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, outputs))
        self.around = nn.Linear(features, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x) + self.around(x)


def measurements(n: int = 30, n_test: int = 13) -> Data:
    """Of some of the targets the noise is ten times as large."""
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(n + n_test, 10, generator=generator)
    targets = (inputs @ torch.randn(10, 2, generator=generator)).tanh() * 3
    noise = torch.randn(n + n_test, 2, generator=generator) * 0.2
    targets += noise * torch.where(torch.arange(n + n_test) % 7 == 0, 10.0, 1.0).unsqueeze(1)
    train, test = (Columns((inputs[part], targets[part])) for part in (slice(n), slice(n, None)))
    return Data(train, test, facts={"features": 10})
