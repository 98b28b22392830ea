"""One process, no group."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from dist_train.backends.base import Backend, OptimizerFactory, clip, to_cpu


class Single(Backend):
    """Plain PyTorch."""

    def prepare(self, model: nn.Module, optimizer_fn: OptimizerFactory) -> tuple[nn.Module, torch.optim.Optimizer]:
        """See Backend."""
        self.model, self.optimizer = model, optimizer_fn(model.parameters())
        return self.model, self.optimizer

    def accumulate(self, last: bool) -> AbstractContextManager:
        """See Backend."""
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        """See Backend."""
        loss.backward()

    def step(self, max_norm: float | None, measure: bool) -> torch.Tensor | None:
        """See Backend."""
        norm = clip(self.model.parameters(), max_norm, measure)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def state(self) -> dict[str, torch.Tensor]:
        """See Backend."""
        return to_cpu(self.model.state_dict())
