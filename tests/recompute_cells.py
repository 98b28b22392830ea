"""Models whose blocks are computed again, and what the workers do with them: apart from the tests, so that both can
import it."""

import dataclasses
from typing import Any

import draw_cells
import numpy as np
import token_cells
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from dist_train import backends
from dist_train.config.tree import CompileConfig, Config, DataConfig, ModelConfig, OptimConfig
from dist_train.loop import optim
from dist_train.loop.units import loss_sum
from dist_train.models.draws import Draws
from dist_train.run import assemble

import parity_cells

STEPS = 4
KINDS = ("none", "blocks", "selective")
run_cells = token_cells.run_cells


class Residual(nn.Module):
    """Norms over the batch, what writes in place, and draws; [batch, width, 6, 6] of the same."""

    def __init__(self, width: int):
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.norm, self.last = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.act, self.drop = nn.ReLU(inplace=True), nn.Dropout2d(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(x + self.last(self.second(self.drop(self.act(self.norm(self.first(x)))))))


class Normed(nn.Module):
    """Batch statistics, and weights that are divided by a norm which each forward estimates a little better."""

    def __init__(self, input_shape: tuple[int, ...], classes: int, width: int = 6):
        super().__init__()
        self.into, self.head = nn.Conv2d(input_shape[0], width, 1), nn.Linear(width, classes)
        self.blocks = nn.ModuleList(Residual(width) for _ in range(3))
        nn.utils.parametrizations.spectral_norm(self.blocks[1].first)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.into(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


class InPlace(nn.Module):
    """Writes into the products of three dimensions, which torch's own check does not see; and one of its branches is
    computed again by itself, within its block."""

    def __init__(self, input_shape: tuple[int, ...], classes: int):
        super().__init__()
        self.blocks, self.head = nn.ModuleList(Writes() for _ in range(3)), nn.Linear(6, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.squeeze(1)  # [batch, 6, 6]
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class Writes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 9, bias=False), nn.Linear(9, 6, bias=False)
        self.drop = nn.Dropout(0.3, inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.branch(x)
        return x + checkpoint(self.branch, x, use_reentrant=False)

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.down(self.drop(self.up(x).add_(0.1)).tanh_()))


def decoder(backend: str = "single", micro_batch_size: int | None = 3, **train: Any) -> Config:
    """Dropout of embeddings, of attention and of what layers add; documents that are packed."""
    cell = token_cells.config(backend, micro_batch_size, **train)
    return dataclasses.replace(cell, train=dataclasses.replace(cell.train, max_steps=STEPS))


def transformer(backend: str = "single", micro_batch_size: int | None = None, **train: Any) -> Config:
    """torchvision's ViT."""
    args = {
        **{"image_size": 6, "patch_size": 3, "num_layers": 2, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 24},
        **{"dropout": 0.2, "attention_dropout": 0.1, "num_classes": 10},
    }
    cell = draw_cells.cell(backend, micro_batch_size, max_steps=STEPS, **train)
    data = DataConfig(name="synthetic", args=cell.data.args | {"shape": (3, 6, 6)})
    model = ModelConfig(name="torchvision.models:VisionTransformer", args=args)
    return dataclasses.replace(cell, data=data, model=model, optim=OptimConfig(name="AdamW"))


def mlp(backend: str = "single", micro_batch_size: int | None = 7, **train: Any) -> Config:
    """All of its layers as one block."""
    cell = draw_cells.cell(backend, micro_batch_size, max_steps=STEPS, **train)
    model = ModelConfig(hidden=[50, 30], activation="Tanh", dropout=0.3, blocks=["layers"])
    return dataclasses.replace(cell, model=model)


def normed(backend: str = "single", group: int | None = None, **train: Any) -> Config:
    """Statistics of the whole step; or of groups, with micro-batches of as many."""
    cell = draw_cells.cell(backend, group, **{"max_steps": STEPS} | train)
    of = {"name": f"{__name__}:Normed", "batch_statistics": None if group is None else {"group": group}}
    return dataclasses.replace(cell, model=ModelConfig(**of))


def in_place(backend: str = "single", micro_batch_size: int | None = None, **train: Any) -> Config:
    """See InPlace."""
    cell = draw_cells.cell(backend, micro_batch_size, max_steps=STEPS, **train)
    return dataclasses.replace(cell, model=ModelConfig(name=f"{__name__}:InPlace"))


def drawing(backend: str = "single", micro_batch_size: int | None = 7, **train: Any) -> Config:
    """All that draws, of which some is computed again within a block; one block is used twice."""
    cell = draw_cells.cell(backend, micro_batch_size, args={"again": True}, max_steps=STEPS, **train)
    blocks = ["Block", "TransformerEncoderLayer", "looks"]
    return dataclasses.replace(cell, model=dataclasses.replace(cell.model, blocks=blocks))


def small(backend: str = "single", **train: Any) -> Config:
    """What a compiler is soon done with: two steps of the same size."""
    cell = draw_cells.cell(backend, name="Small", **{"max_steps": 2} | train)
    return dataclasses.replace(cell, optim=OptimConfig(name="AdamW"))


MODELS = {
    "decoder": decoder,
    "vit": transformer,
    "mlp": mlp,
    "normed": normed,
    "in place": in_place,
    "drawing": drawing,
}


def again(cell: Config, recompute: str | dict, mode: str = "off") -> Config:
    """The same run, with less kept."""
    backend = dataclasses.replace(cell.backend, recompute=recompute)
    return dataclasses.replace(cell, backend=backend, compile=CompileConfig(mode))


def kept_bytes(cell: Config) -> int:
    """What one process keeps of the first micro-batch between its forward and its backward, as its allocator counts."""
    world = parity_cells.ALONE
    parts = assemble.build(cell, world.device)
    backend = backends.create(cell, world, parts.findings)
    model, _ = backend.prepare(parts.model, optim.factory(cell.optim, parts.model))
    batch, draws = parts.feed.of(np.arange(8)), Draws(0, 0, parts.model)
    with draws.of(batch.ids, 0):
        loss_sum(parts.task, model, batch).backward()  # for what is made at a first use
    with draws.of(batch.ids, 1), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        loss = loss_sum(parts.task, model, batch)
    assert loss.requires_grad  # with all that it keeps
    return sum(event.self_cpu_memory_usage for event in found.events())
