"""One process, no group."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

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
from dist_train.backends.ordered import ordered
from dist_train.backends.shards import Shards


class Single(Backend):
    """Plain PyTorch."""

    def prepare(self, model: nn.Module, optimizer_fn: OptimizerFactory) -> tuple[nn.Module, torch.optim.Optimizer]:
        """See Backend."""
        self.take(model)
        compile_(model, self.config.compile)
        self.model, self.parameters = model, list(model.parameters())
        self.ordered = ordered(self.config, self.findings, model.named_parameters())
        self.optimizer = optimizer_fn(model.named_parameters())
        return self.model, self.optimizer

    def accumulate(self, last: bool) -> AbstractContextManager:
        """See Backend."""
        return nullcontext()

    def differentiate(self, loss: torch.Tensor) -> None:
        """See Backend."""
        loss.backward(loss.new_full((), self.scale.factor) if self.scale else None)

    def step(self, max_norm: float | None, measure: bool) -> torch.Tensor | None:
        """See Backend."""
        if self.ordered:
            self.ordered.settle()
        return update(self, whole_norm, max_norm, measure)

    def weights(self) -> dict[str, torch.Tensor]:
        """See Backend."""
        return to_cpu(self.model.state_dict())

    def state(self) -> dict[str, Shards]:
        """See Backend."""
        return model_state(self.model) | optimizer_state(self.model, self.optimizer)

    def load(self, saved: SavedTensors, read: Reader) -> list[str]:
        """See Backend."""
        return load_optimizer(self, self.model, self.optimizer, saved, read)

    def updated(self) -> list[torch.Tensor]:
        """See Backend."""
        return updated_of(self.model)

    def named(self, tensors: Sequence[torch.Tensor]) -> dict[str, Shards]:
        """See Backend."""
        return named_as(self.model, tensors)

    def refresh(self) -> None:
        """See Backend."""
