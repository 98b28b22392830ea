"""Hugging Face Accelerate, driving DistributedDataParallel: every rank holds the whole model."""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DistributedType
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
from dist_train.backends.probe import NOTHING, Findings
from dist_train.backends.shards import Shards
from dist_train.config.tree import Config
from dist_train.ranks.dist import World

TYPES = {"cpu": DistributedType.MULTI_CPU, "cuda": DistributedType.MULTI_GPU}


class Accelerate(Backend):
    """An Accelerator for model, optimizer and backward. Its count of micro-batches stays 1, as it would divide by it,
    and it never sees the data, which it would share out a second time."""

    def __init__(self, config: Config, world: World, findings: Findings = NOTHING):
        super().__init__(config, world, findings)
        on_cpu = world.device.type == "cpu"
        # It reads the environment of torchrun alone, and without it believes every rank to be the only one.
        place = {"RANK": world.rank, "WORLD_SIZE": world.size, "LOCAL_RANK": world.local_rank}
        os.environ.update({name: str(value) for name, value in place.items()})
        os.environ.setdefault("LOCAL_WORLD_SIZE", str(world.local_size))
        os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))  # else it sets threads of its own
        self.accelerator = Accelerator(
            cpu=on_cpu,
            mixed_precision="no",
            gradient_accumulation_steps=1,
            kwargs_handlers=[DistributedDataParallelKwargs(**buckets.settings(findings))],
        )
        state = self.accelerator.state
        got = (state.distributed_type, state.process_index, state.num_processes, state.device.type)
        expected = (TYPES[world.device.type], world.rank, world.size, world.device.type)
        assert got == expected, f"accelerate: got {got}, expected {expected}"

    def prepare(self, model: nn.Module, optimizer_fn: OptimizerFactory) -> tuple[nn.Module, torch.optim.Optimizer]:
        """See Backend."""
        self.take(model)
        compile_(model, self.config.compile)
        self.model = self.accelerator.prepare(model)
        # Where it misreads the environment it returns the model as it was, and the ranks drift apart without a word.
        assert type(self.model) is DistributedDataParallel, f"accelerate: got {type(self.model)}, expected DDP"
        buckets.own_buffers(self.model)
        buckets.settle_buckets(self.model, self.findings.sparse)
        buckets.explained(self.model)
        self.parameters = list(model.parameters())
        optimizer = optimizer_fn(model.named_parameters())
        lay_out(optimizer, self.world)
        self.optimizer = self.accelerator.prepare(optimizer)
        return self.model, optimizer

    def accumulate(self, last: bool) -> AbstractContextManager:
        """See Backend."""
        return nullcontext() if last else self.accelerator.no_sync(self.model)

    def differentiate(self, loss: torch.Tensor) -> None:
        """See Backend."""
        # DDP divides the sum over ranks by their number. The scale is ours, as its own looks at one rank's gradients.
        factor = self.scale.factor if self.scale else self.world.size
        self.accelerator.backward(loss, gradient=loss.new_full((), factor))

    def step(self, max_norm: float | None, measure: bool) -> torch.Tensor | None:
        """See Backend."""
        return update(self, whole_norm, max_norm, measure, self.world.size)

    def weights(self) -> dict[str, torch.Tensor]:
        """See Backend."""
        return to_cpu(self.bare.state_dict())

    def state(self) -> dict[str, Shards]:
        """See Backend."""
        return model_state(self.bare) | optimizer_state(self.bare, self.optimizer.optimizer)

    def load(self, saved: SavedTensors, read: Reader) -> list[str]:
        """See Backend."""
        return load_optimizer(self, self.bare, self.optimizer.optimizer, saved, read)

    def updated(self) -> list[torch.Tensor]:
        """See Backend."""
        return updated_of(self.bare)

    def named(self, tensors: Sequence[torch.Tensor]) -> dict[str, Shards]:
        """See Backend."""
        return named_as(self.bare, tensors)

    def refresh(self) -> None:
        """See Backend."""
