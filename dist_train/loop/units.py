"""The micro-batches of each step, with the number of units that its loss is a mean over, before its first backward."""

from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from torch import nn

from dist_train.data.batch import Batch
from dist_train.ranks import dist
from dist_train.tasks.base import Task, units_of, units_per_sample

Units = torch.Tensor | int
Step = tuple[int, Iterable[Batch], Units]


def counted(
    task: Task, batches: Iterator[Batch], sizes: Iterable[tuple[int, int]], device: torch.device
) -> Iterator[Step]:
    """The number of a step's micro-batches, this rank's, and the step's units over all ranks; of each step.

    Where samples have different numbers of units, the feed is read a step ahead, and the ranks' counts are added while
    the step before computes: the loop does not wait for them. Collective then.

    Args:
        task: says what the units are.
        batches: this rank's, of all the steps.
        sizes: samples over all ranks, and micro-batches, of each step.
        device: of the batches.
    """
    each = units_per_sample(task)
    if each is not None:
        for count, micro_batches in sizes:
            yield micro_batches, islice(batches, micro_batches), count * each
        return
    steps = (list(islice(batches, micro_batches)) for _, micro_batches in sizes)
    ahead = next(steps, None)
    adding = None if ahead is None else _added(task, ahead, device)
    while ahead is not None and adding is not None:
        step, total = ahead, adding
        ahead = next(steps, None)
        units = total()
        adding = None if ahead is None else _added(task, ahead, device)
        yield len(step), step, units.clamp(min=1)  # a step in which nothing counts has the loss 0


def loss_sum(task: Task, model: nn.Module, batch: Batch) -> torch.Tensor:
    """The loss of a micro-batch, summed over its units; of a stand-in, as this rank has no sample, nothing."""
    loss = task.sums(model, batch)["loss"]
    return loss if batch.size else loss * 0.0


def widest(device: torch.device) -> torch.dtype:
    """The widest floats that a device has."""
    return torch.float32 if device.type == "mps" else torch.float64


def _added(task: Task, step: list[Batch], device: torch.device) -> dist.Pending:
    """The units of a step over all ranks, soon."""
    counts = [units_of(task, batch) for batch in step]
    mine = torch.stack([torch.as_tensor(count, dtype=widest(device), device=device) for count in counts]).sum()
    return dist.sum_later(mine)
