"""Models that draw, and what the workers do with them: apart from the tests, so that both can import it."""

import dataclasses
import random

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.functional import dropout
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth

from dist_train.config.tree import Config, ModelConfig

from parity_cells import config

STEPS = 6


class Block(nn.Module):
    """Attention with dropout in its weights, and a residual branch that some samples go without."""

    def __init__(self, width: int, again: bool):
        super().__init__()
        self.qkv, self.out, self.mlp = nn.Linear(width, 3 * width), nn.Linear(width, width), nn.Linear(width, width)
        self.drop, self.depth, self.again = nn.Dropout(0.2), StochasticDepth(0.3, "row"), again

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for branch in self.attend, self.think:
            x = x + self.depth(checkpoint(branch, x, use_reentrant=False) if self.again else branch(x))
        return x

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        found = F.scaled_dot_product_attention(q, k, v, dropout_p=0.1 * self.training, is_causal=True)
        return self.drop(self.out(self.drop(found.transpose(1, 2).flatten(2))))

    def think(self, x: torch.Tensor) -> torch.Tensor:
        return dropout(self.mlp(F.gelu(x)), 0.1, self.training)


class Drawing(nn.Module):
    """All that draws: [batch, 1, 6, 6] is taken for six words. One block is used twice."""

    def __init__(self, input_shape: tuple[int, ...], classes: int, again: bool = False):
        super().__init__()
        self.conv, self.channels = nn.Conv2d(1, 8, 3, padding=1), nn.Dropout2d(0.2)
        self.into, self.alpha = nn.Linear(48, 16), nn.AlphaDropout(0.1)
        self.blocks = nn.ModuleList(Block(16, again) for _ in range(2))
        self.layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.2, activation="gelu", batch_first=True)
        self.first = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.2, activation="gelu")  # sequence first
        self.looks, self.head = nn.MultiheadAttention(16, 2, dropout=0.2, batch_first=True), nn.Linear(16, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.channels(self.conv(x)).transpose(1, 2).flatten(2)
        x = self.alpha(self.into(x))
        for block in [*self.blocks, self.blocks[0]]:
            x = block(x)
        x = self.first(self.layer(x).transpose(0, 1)).transpose(0, 1)
        x = x + self.looks(x, x, x)[0]
        return self.head(F.dropout(x, 0.3, self.training).mean(1))


class Small(nn.Module):
    """What a compiler is soon done with."""

    def __init__(self, input_shape: tuple[int, ...], classes: int):
        super().__init__()
        self.into, self.head = nn.Linear(6, 8), nn.Linear(8, classes)
        self.blocks = nn.ModuleList(Residual() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.into(x.squeeze(1))
        for block in [*self.blocks, self.blocks[0]]:
            x = block(x)
        return self.head(dropout(x, 0.3, self.training).mean(1))


class Residual(nn.Module):
    """[batch, tokens, 8]"""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.drop = nn.Linear(8, 8), nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop(self.inner(self.drop(x)).tanh())


class Noisy(nn.Module):
    """Draws from torch's generator itself."""

    def __init__(self, input_shape: tuple[int, ...], classes: int, p: float = 0.0):
        super().__init__()
        self.first, self.drop, self.second = nn.Linear(36, 16), nn.Dropout(p), nn.Linear(16, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x.flatten(1)).tanh()
        if self.training:
            x = x + 0.1 * torch.randn_like(x)
        return self.second(self.drop(x))


class Tossing(nn.Module):
    """Draws on the host."""

    def __init__(self, input_shape: tuple[int, ...], classes: int):
        super().__init__()
        self.first, self.second = nn.Linear(36, 16), nn.Linear(16, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x.flatten(1)).tanh()
        return self.second(x * (1.0 + (self.training and random.random())))


def cell(backend: str = "single", micro_batch_size: int | None = None, name: str = "Drawing", **given) -> Config:
    """Some steps of parity_cells.config with a model of here.

    Args:
        backend: see parity_cells.config.
        micro_batch_size: see TrainConfig.
        name: of the model.
        **given: `args` of the model, `precision`, and more of TrainConfig.
    """
    args, precision = given.pop("args", {}), given.pop("precision", "float32")
    made = config(backend, "SGD", micro_batch_size, precision=precision)
    train = dataclasses.replace(made.train, **{"max_steps": STEPS, "global_batch_size": 44} | given)
    return dataclasses.replace(made, model=ModelConfig(name=f"draw_cells:{name}", args=args), train=train)
