"""torch's DistributedDataParallel: every rank holds the whole model, gradients are reduced during backward."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dist_train.backends import buckets
from dist_train.backends.base import (
    Backend,
    OptimizerFactory,
    Reader,
    SavedTensors,
    compile_,
    load_optimizer,
    model_state,
    named_as,
    optimizer_state,
    to_cpu,
    update,
    updated_of,
    whole_norm,
)
from dist_train.backends.matrices import lay_out
from dist_train.backends.ordered import ordered
from dist_train.backends.shards import Shards


class DDP(Backend):
    """DistributedDataParallel. With backend.reduce ordered it is left out, as we sum the gradients ourselves."""

    def prepare(self, model: nn.Module, optimizer_fn: OptimizerFactory) -> tuple[nn.Module, torch.optim.Optimizer]:
        """See Backend."""
        self.take(model)
        compile_(model, self.config.compile)  # inside DDP, which then sees one graph and overlaps as before
        self.ordered = ordered(self.config, self.findings, model.named_parameters())
        self.model = model if self.ordered else self._wrapped(model)
        self.parameters = list(model.parameters())
        self.optimizer = optimizer_fn(model.named_parameters())
        lay_out(self.optimizer, self.world)
        return self.model, self.optimizer

    def _wrapped(self, model: nn.Module) -> DistributedDataParallel:
        device = self.world.device
        wrapped = DistributedDataParallel(
            model, device_ids=None if device.type == "cpu" else [device.index], **buckets.settings(self.findings)
        )
        buckets.own_buffers(wrapped)
        buckets.settle_buckets(wrapped, self.findings.sparse)
        buckets.explained(wrapped)
        return wrapped

    def accumulate(self, last: bool) -> AbstractContextManager:
        """See Backend."""
        return nullcontext() if last or self.ordered else self.model.no_sync()

    def differentiate(self, loss: torch.Tensor) -> None:
        """See Backend."""
        if self.ordered:
            loss.backward()
            return
        # DDP divides the sum over ranks by their number
        loss.backward(loss.new_full((), self.scale.factor if self.scale else self.world.size))

    def step(self, max_norm: float | None, measure: bool) -> torch.Tensor | None:
        """See Backend."""
        if self.ordered:
            self.ordered.settle()
        return update(self, whole_norm, max_norm, measure, self.world.size)

    def weights(self) -> dict[str, torch.Tensor]:
        """See Backend."""
        return to_cpu(self.bare.state_dict())

    def state(self) -> dict[str, Shards]:
        """See Backend."""
        return model_state(self.bare) | optimizer_state(self.bare, self.optimizer)

    def load(self, saved: SavedTensors, read: Reader) -> list[str]:
        """See Backend."""
        return load_optimizer(self, self.bare, self.optimizer, saved, read)

    def updated(self) -> list[torch.Tensor]:
        """See Backend."""
        return updated_of(self.bare)

    def named(self, tensors: Sequence[torch.Tensor]) -> dict[str, Shards]:
        """See Backend."""
        return named_as(self.bare, tensors)

    def refresh(self) -> None:
        """See Backend."""
