"""Models whose gradients are added up in order: convolutions, and one with scalars and more ranks than rows."""

import torch
from torch import nn


class Convolutions(nn.Module):
    def __init__(self, input_shape, classes):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(input_shape[0], 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU())
        self.head = nn.Linear(5 * 4 * 4, classes)

    def forward(self, x):
        return self.head(self.body(x).flatten(1))


class Uneven(nn.Module):
    """A scalar, a vector of three, tied weights, a frozen layer, and one that is not used."""

    def __init__(self, input_shape, classes):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(3))
        self.layers = nn.Sequential(
            nn.Linear(36, 3), nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3, bias=False)
        )
        self.layers[3].weight = self.layers[1].weight
        self.frozen, self.unused = nn.Linear(3, 7).requires_grad_(False), nn.Linear(2, 2)
        self.head = nn.Linear(7, classes)

    def forward(self, x):
        return self.head(self.frozen(self.layers(x.flatten(1)) * self.scale + self.shift))
