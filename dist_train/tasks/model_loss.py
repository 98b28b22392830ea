"""The loss that a model returns itself."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dist_train.data.batch import Batch
from dist_train.errors import ConfigError
from dist_train.tasks.base import Task


class ModelLoss(Task):
    """The loss that the model returns, as `loss`, as transformers' models do that are given labels, or alone. It is
    called with all that a batch holds: a dict by name, a tuple by place.

    That loss must be a mean over the samples of the batch that the model was given: then the loss of a step is the mean
    over the global batch, at every world size. It is not where the loss is a mean over something that samples have
    different numbers of, such as the tokens of padded texts: each sample of a batch of short ones would weigh as much
    as one of long ones. Then write a task of your own, whose units are these.
    """

    units_per_sample = 1

    def sums(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """`loss`."""
        tree = batch.tree
        if isinstance(tree, Mapping):
            outputs = model(**tree)
        else:
            outputs = model(*tree) if isinstance(tree, (tuple, list)) else model(tree)
        return {"loss": _loss_in(outputs) * len(batch)}


def _loss_in(outputs: Any) -> torch.Tensor:
    """The loss in what a model gave. Raises ConfigError."""
    found = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", outputs)
    if isinstance(found, torch.Tensor) and found.dim() == 0:
        return found
    got = f"a tensor {list(found.shape)}" if isinstance(found, torch.Tensor) else type(found).__name__
    raise ConfigError(
        f"task.name: got {got} as the loss of a model's outputs of type {type(outputs).__name__}, expected a tensor "
        f"without dimensions; return it as loss, in evaluation too, or choose a task that has a loss"
    )
