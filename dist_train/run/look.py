"""A first look at a run's model, before any rank is joined: what only training shows is told now, in a line."""

import dataclasses
from typing import Any

import torch
from torch import nn

from dist_train.backends.precision import Precision
from dist_train.backends.probe import Findings, probe
from dist_train.config.tree import Config, TrainConfig
from dist_train.data.feed import Feed
from dist_train.data.order import global_indices, sizes
from dist_train.errors import ConfigError
from dist_train.tasks.losses import loss_fn

LOOKED_AT = 2  # samples: a norm over a batch takes no single one


def look(config: Config, model: nn.Module, feed: Feed, precision: Precision, trains: bool) -> Findings:
    """Trains on the first samples once, and forgets it: what a model shows only then is told before any rank is joined.

    Args:
        config: the run.
        model: on its device.
        feed: of the training split.
        precision: the formats of the run.
        trains: false where the model is only evaluated, so that its gradients take no memory.

    Raises:
        ConfigError: its outputs are not what the loss takes.
        Exception: whatever the model raises.
    """
    if trains and not any(p.requires_grad for p in model.parameters()):
        raise ConfigError("model: got no weight that asks for a gradient, expected one at least that is trained")
    count = min(LOOKED_AT, len(feed.split))
    inputs, targets = feed.of(global_indices(len(feed.split), config.train.seed, 0, 0, count).copy())
    loss_of = loss_fn(config.train.loss, config.train.label_smoothing)
    sample_bytes = []

    def loss() -> torch.Tensor:
        with precision.autocast():
            outputs = model(inputs)
        _check_outputs(outputs, targets, feed.classes)
        sample_bytes.append((inputs.nbytes + outputs.nbytes) // count)
        return loss_of(outputs.to(precision.dtype), targets, count)

    found = probe(model, loss, trains)
    return dataclasses.replace(
        found, needs_two=bool(found.buffers) and _needs_two(model, inputs), sample_bytes=sample_bytes[0]
    )


def _needs_two(model: nn.Module, inputs: torch.Tensor) -> bool:
    """Whether a forward of one sample fails, where that of several did not."""

    def alone() -> torch.Tensor:
        with torch.no_grad():
            model(inputs[:1])
        return torch.zeros(())

    try:
        probe(model, alone, trains=False)
    except ValueError:  # torch's: expected more than 1 value per channel when training
        return True
    return False


def check_shares(cfg: TrainConfig, findings: Findings, n: int, world_size: int) -> None:
    """Raises ConfigError where a step would give a rank a single one of `n` samples, and the model takes none alone."""
    if not findings.needs_two:
        return
    ragged = 0 if cfg.drop_last else n % cfg.global_batch_size
    ranks = f" on {world_size} ranks" if world_size > 1 else ""
    for count, mend in (
        (min(cfg.global_batch_size, n), "write a larger --train.global_batch_size or --train.micro_batch_size"),
        (ragged, "write --train.drop_last true, or another --train.global_batch_size"),
    ):
        if 1 in sizes(count, world_size, cfg.micro_batch_size):
            raise ConfigError(
                f"train.global_batch_size: got a batch of {count} samples{ranks} with a single one at once, which the "
                f"model does not take, as a norm over a batch has no statistics of it; {mend}"
            )


def _check_outputs(outputs: Any, targets: torch.Tensor, classes: int) -> None:
    """Raises ConfigError where a loss would broadcast, or raise from deep inside."""
    batch, vectors = len(targets), targets.dim() == 2
    expected = f"a float tensor [{batch}, {classes}] for {batch} samples: a number for each of {classes} classes"
    if not isinstance(outputs, torch.Tensor):
        raise ConfigError(
            f"model: got outputs of type {type(outputs).__name__}, expected {expected}; return the logits alone"
        )
    shape = tuple(outputs.shape)
    fits = len(shape) == 2 and shape[0] == batch and (shape[1] == classes or (shape[1] > classes and not vectors))
    if not fits or not outputs.is_floating_point():
        raise ConfigError(f"model: got outputs {outputs.dtype} {list(shape)}, expected {expected}")
