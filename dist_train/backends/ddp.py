"""torch's DistributedDataParallel: every rank holds the whole model, gradients are reduced during backward."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dist_train.backends.base import Backend, OptimizerFactory, clip, to_cpu


class DDP(Backend):
    """DistributedDataParallel."""

    def prepare(self, model: nn.Module, optimizer_fn: OptimizerFactory) -> tuple[nn.Module, torch.optim.Optimizer]:
        """See Backend."""
        device = self.world.device
        self.bare = model
        self.model = DistributedDataParallel(
            model, device_ids=None if device.type == "cpu" else [device.index], gradient_as_bucket_view=True
        )
        self.optimizer = optimizer_fn(model.parameters())
        return self.model, self.optimizer

    def accumulate(self, last: bool) -> AbstractContextManager:
        """See Backend."""
        return nullcontext() if last else self.model.no_sync()

    def backward(self, loss: torch.Tensor) -> None:
        """See Backend."""
        (loss * self.world.size).backward()  # DDP divides the sum over ranks by their number

    def step(self, max_norm: float | None, measure: bool) -> torch.Tensor | None:
        """See Backend."""
        norm = clip(self.bare.parameters(), max_norm, measure)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def state(self) -> dict[str, torch.Tensor]:
        """See Backend."""
        return to_cpu(self.bare.state_dict())
