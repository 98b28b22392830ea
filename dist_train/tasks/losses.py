"""Losses by name: sums over samples, divided by a count that the loop gives, the true one of the whole step."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

Loss = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]


def loss_fn(name: str, label_smoothing: float = 0.0) -> Loss:
    """A function of outputs [batch, classes], targets [batch] or [batch, classes] and a count: the loss summed over the
    batch and divided by the count, a scalar.

    mse is the mean over classes of a sample's squared error, as torch's own mean over a batch has it.
    """
    of = _of_torch(name, label_smoothing)

    def loss(outputs: torch.Tensor, targets: torch.Tensor, count: int) -> torch.Tensor:
        if len(targets) == count:  # all of the step: torch's mean divides by the same number, without two more kernels
            return of(outputs, targets, reduction="mean")
        return of(outputs, targets, reduction="sum") / (count * outputs.shape[1] if name == "mse" else count)

    return loss


def loss_of_each(name: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A function of the same outputs and targets: the loss of each sample, [batch]."""
    of = _of_torch(name)

    def losses(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        found = of(outputs, targets, reduction="none")
        return found.mean(1) if name == "mse" else found

    return losses


def _of_torch(name: str, label_smoothing: float = 0.0) -> Callable[..., torch.Tensor]:
    kinds = {
        "cross_entropy": lambda *of, reduction: F.cross_entropy(
            *of, reduction=reduction, label_smoothing=label_smoothing
        ),
        "nll": lambda *of, reduction: F.nll_loss(*of, reduction=reduction),
        "mse": lambda *of, reduction: F.mse_loss(*of, reduction=reduction),
    }
    return kinds[name]
