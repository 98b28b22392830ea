"""Losses by name, each the sum over the samples of a batch: only the loop divides, by the true global count."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def loss_fn(name: str, label_smoothing: float = 0.0) -> Loss:
    """The loss of outputs [batch, classes] and targets [batch] or [batch, classes], summed over the batch: a scalar.

    mse is the mean over classes of a sample's squared error, as torch's own mean over a batch has it.
    """
    if name == "cross_entropy":
        return lambda out, target: F.cross_entropy(out, target, reduction="sum", label_smoothing=label_smoothing)
    if name == "nll":
        return lambda out, target: F.nll_loss(out, target, reduction="sum")
    assert name == "mse"
    return lambda out, target: F.mse_loss(out, target, reduction="sum") / out.shape[1]
