"""The seam: what the loop asks of a backend, and nothing more."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import torch
from torch import nn

from dist_train.config import Config
from dist_train.dist import World

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


class Backend(ABC):
    """Moves gradients and shards state. Every method is collective: all ranks call it, in the same order."""

    def __init__(self, config: Config, world: World):
        self.config, self.world = config, world

    @abstractmethod
    def prepare(self, model: nn.Module, optimizer_fn: OptimizerFactory) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Shards or wraps `model`, then builds the optimizer.

        Returns:
            The model to call, and the optimizer whose `param_groups` hold the learning rate.
        """

    @abstractmethod
    def accumulate(self, last: bool) -> AbstractContextManager:
        """The context of a micro-batch, forward and backward: gradients are exchanged only in the last of a step."""

    @abstractmethod
    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradient of `loss`, this rank's part of the step's loss. The gradient of a step is the sum over
        ranks and micro-batches, so a library that takes the mean over ranks is undone here."""

    @abstractmethod
    def step(self, max_norm: float | None, measure: bool) -> torch.Tensor | None:
        """Clips, updates, clears the gradients.

        Args:
            max_norm: the largest global gradient norm; None does not clip.
            measure: return the norm even where nothing is clipped.

        Returns:
            The global gradient norm before clipping, a scalar on the device; None where it was not needed.
        """

    @abstractmethod
    def state(self) -> dict[str, torch.Tensor]:
        """The weights by the model's own names, on the CPU, on rank 0; the other ranks may get none."""


def clip(parameters: Iterable[nn.Parameter], max_norm: float | None, measure: bool) -> torch.Tensor | None:
    """The norm of whole gradients, and clipping by it: for backends whose ranks each hold all of the gradient."""
    if max_norm is None and not measure:
        return None
    parameters = [p for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if max_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def to_cpu(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A copy that later steps do not change."""
    return {name: value.detach().cpu().clone() for name, value in state.items()}
