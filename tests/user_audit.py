"""A model whose steps are audited: norms over the batch, dropout, and a buffer that each rank changes."""

import torch
from torch import nn


class Normed(nn.Module):
    def __init__(self, input_shape, classes):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(input_shape[0], 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3)
        )
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(3 * 4, classes)
        self.register_buffer("brightness", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.brightness.copy_(x.detach().mean())
        return self.head(self.drop(self.body(x).flatten(1)))
