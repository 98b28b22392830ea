"""What a run is measured beside: the ceiling, the tutorial's loop, and the bare script of a library.

A reference is a generator, each next() of which is a step. Nothing of it exists before its first.
"""

import functools
import itertools
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

from dist_train import backends
from dist_train.backends.base import compile_
from dist_train.bench import bare
from dist_train.bench.slices import BARE, CEILING, TUTORIAL
from dist_train.bench.turns import Steps
from dist_train.config.tree import Config
from dist_train.data.batch import Batch
from dist_train.data.order import Plan
from dist_train.data.sets import Columns
from dist_train.loop import optim
from dist_train.models.blocks import blocks
from dist_train.ranks.dist import World
from dist_train.run import assemble
from dist_train.run.assemble import Parts
from dist_train.tasks.base import nbytes, units_of
from dist_train.tasks.rules import LOSSES

LAID_BYTES, LAID_S = 256 << 20, 10.0
CHANNELS = (1, 3)  # of pictures
SHORT = ("bfloat16", "float16")


def references(config: Config, world: World, parts: Parts, steps: int | None = None) -> dict[str, Steps]:
    """Those that the config has, by name.

    The ceiling: forward, loss, backward and the same optimizer on batches that lie on the device; on several ranks
    each by itself, on its share of the global batch. Bare: the script of the backend's library on the same batches; in
    one process, PyTorch's plain loop.
    Tutorial: PyTorch's quickstart, in one process.

    Args:
        config: the run.
        world: this rank's place.
        parts: what the run is made of.
        steps: whose batches are laid out; None for as many as are worth it.
    """
    laid = functools.cache(lambda: lay_out(config, world, parts, steps))  # one for all
    found = {CEILING: _ceiling(config, world, parts, laid)}
    backend = backends.chosen(config.backend.name, world.launcher)
    if backend in bare.LIBRARIES and parts.precision.name not in SHORT and config.task.name in LOSSES:
        found[BARE] = _bare(bare.LIBRARIES[backend], config, world, parts, laid)
    of_torch = ":" not in config.optim.name and config.optim.name not in optim.OURS
    if backend == "single" and of_torch and has_pictures(config, parts):
        found[TUTORIAL] = _tutorial(config, world, parts)
    return found


def lay_out(config: Config, world: World, parts: Parts, most: int | None = None) -> list[list[Batch]]:
    """The micro-batches of this rank's first steps, on the device. As many as are worth their memory and time, as few
    would stay in the CPU's cache; or at most so many."""
    plan = Plan.of(len(parts.feed.split), config, world)
    batches, steps, size, begin = parts.feed.steps(plan), [], 0, time.perf_counter()
    for step in range(min(plan.steps_per_epoch, most or plan.steps_per_epoch)):
        steps.append([next(batches) for _ in range(plan.micro_batches(step))])
        size += sum(nbytes(batch.tree) for batch in steps[-1])
        if size > LAID_BYTES or time.perf_counter() - begin > LAID_S:
            break
    return steps


def _ceiling(config: Config, world: World, parts: Parts, laid: Callable[[], list[list[Batch]]]) -> Steps:
    model, clip = _model(config, parts), config.train.grad_clip
    loss_of, forward = _mean(config, parts), _forward(model, parts)
    parameters = list(model.parameters())
    optimizer = optim.factory(config.optim, model)(model.named_parameters())
    for step in itertools.cycle(laid()):
        for batch in step:
            loss = loss_of(forward, batch)
            (loss if len(step) == 1 else loss / len(step)).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        for parameter in parameters:
            parameter.grad = None
        yield


def _bare(
    library: Callable[[bare.Work], bare.Step], config: Config, world: World, parts: Parts,
    laid: Callable[[], list[list[Batch]]],
) -> Steps:  # fmt: skip
    model, batch_size = _model(config, parts), config.train.global_batch_size // world.size
    layers, stage = tuple(blocks(model, config.model.blocks)), config.backend.zero_stage or 0
    of = optim.factory(config.optim, model), _loss(config), world.device, stage, batch_size
    step_of = library(bare.Work(model, layers, *of))
    for step in itertools.cycle(laid()):
        for inputs, targets in step:
            step_of(inputs, targets)
        yield


def has_pictures(config: Config, parts: Parts) -> bool:
    """Whether the quickstart's loop can read the data, and is about such a loss."""
    split, shape = parts.data.train, parts.data.input_shape or ()
    drawn = isinstance(split, Columns) and len(shape) == 3 and shape[0] in CHANNELS
    cross_entropy = config.task.name == "classification" and config.task.loss in (None, "cross_entropy")
    return drawn and cross_entropy and not config.data.one_hot


class Pictures(Dataset[tuple[torch.Tensor, int]]):
    """Samples as torchvision's FashionMNIST gives them: a PIL image is made of each, and ToTensor of that."""

    def __init__(self, split: Columns):
        # Here, as they would be imported before the first step of ours.
        from PIL import Image
        from torchvision.transforms import ToTensor

        self.picture, self.transform = Image.fromarray, ToTensor()
        images, self.labels = split.tree
        self.images = images.squeeze(1) if images.shape[1] == 1 else images.permute(0, 2, 3, 1)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image, label = self.images[index], int(self.labels[index])
        return self.transform(self.picture(np.ascontiguousarray(image.numpy()))), label


def _tutorial(config: Config, world: World, parts: Parts) -> Steps:
    """https://docs.pytorch.org/tutorials/beginner/basics/quickstart_tutorial.html"""
    split = parts.data.train
    assert isinstance(split, Columns)
    loader = DataLoader(Pictures(split), batch_size=config.train.global_batch_size, shuffle=True, drop_last=True)
    device, size = world.device, len(split)
    model = assemble.build_model(config, parts.data, parts.precision.dtype)[0].to(device)
    loss_fn = nn.CrossEntropyLoss(label_smoothing=config.task.args.get("label_smoothing", 0.0))
    settings = {"weight_decay": config.optim.weight_decay, "momentum": config.optim.momentum}
    settings = {name: value for name, value in settings.items() if value is not None} | config.optim.args
    optimizer = getattr(torch.optim, config.optim.name)(model.parameters(), lr=config.optim.lr, **settings)
    while True:
        model.train()
        for batch, (inputs, targets) in enumerate(loader):
            inputs, targets = inputs.to(device), targets.to(device)
            loss = loss_fn(model(inputs), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if batch % 100 == 0:
                print(f"loss: {loss.item():>7f}  [{(batch + 1) * len(inputs):>5d}/{size:>5d}]")
            yield


def _model(config: Config, parts: Parts) -> nn.Module:
    """Another one with the same initial weights."""
    model = assemble.build_model(config, parts.data, parts.precision.dtype)[0].to(parts.feed.device)
    compile_(model, config.compile)
    return model


def _forward(model: nn.Module, parts: Parts) -> nn.Module:
    return parts.precision.called(model)


def _mean(config: Config, parts: Parts) -> Callable[[nn.Module, Batch], torch.Tensor]:
    """Calls a model, and gives the mean of the loss: of a classifier as torch has it, of other tasks as they do."""
    if config.task.name in LOSSES:
        loss_of = _loss(config)
        return lambda model, batch: loss_of(model(batch.tree[0]), batch.tree[1])
    return lambda model, batch: parts.task.sums(model, batch)["loss"] / units_of(parts.task, batch)


def _loss(config: Config) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The mean over a batch."""
    smoothed = functools.partial(F.cross_entropy, label_smoothing=config.task.args.get("label_smoothing", 0.0))
    return {"cross_entropy": smoothed, "nll": F.nll_loss, "mse": F.mse_loss}[config.task.loss or "cross_entropy"]
