"""torch's fully_shard (FSDP2): each rank holds a part of every weight; a layer is gathered while it computes."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard

from dist_train import dist
from dist_train.backends.base import (
    Backend,
    OptimizerFactory,
    Reader,
    SavedTensors,
    blocks,
    compile_,
    load_optimizer,
    model_state,
    optimizer_state,
    update,
)
from dist_train.journal import Journal
from dist_train.shards import Shards


class FSDP2(Backend):
    """fully_shard on each layer and on the model, over all ranks.

    With backend.offload the shards of weights and gradients live on the CPU with the optimizer's state, and a layer's
    weights go to the device while it computes. Where the device is the CPU itself, nothing moves.
    """

    def prepare(self, model: nn.Module, optimizer_fn: OptimizerFactory) -> tuple[nn.Module, torch.optim.Optimizer]:
        """See Backend."""
        self.buffers = self.buffers_of(model)
        mesh = init_device_mesh(self.world.device.type, (self.world.size,))
        offload = OffloadPolicy()
        if self.config.backend.offload:
            offload = CPUOffloadPolicy(pin_memory=self.world.device.type != "cpu")  # pinned for copies to the device
        layers = list(blocks(model))
        for part in layers or [model]:
            compile_(part, self.config.compile)  # before it is sharded, so that gathering stays outside of its graph
        for layer in layers:
            fully_shard(layer, mesh=mesh, offload_policy=offload)
        self.model = fully_shard(model, mesh=mesh, offload_policy=offload)
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                # Else the factor is a multiplication before the sum, which gloo does not have.
                module.set_force_sum_reduction_for_comms(True)
        self.journal = Journal(model, layers, "fsdp2")
        self.syncs = True
        self.parameters = list(self.model.parameters())
        self.optimizer = optimizer_fn(self.parameters)
        return self.model, self.optimizer

    def accumulate(self, last: bool) -> AbstractContextManager:
        """See Backend."""
        if last != self.syncs:  # it goes through all modules
            self.model.set_requires_gradient_sync(last)
            self.syncs = last
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        """See Backend."""
        loss.backward(loss.new_full((), self.scale.factor) if self.scale else None)

    def step(self, max_norm: float | None, measure: bool) -> torch.Tensor | None:
        """See Backend."""
        return update(self, self._norm, max_norm, measure)

    def weights(self) -> dict[str, torch.Tensor]:
        """See Backend."""
        # Here, as its many modules would be imported before the first step.
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        return get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))

    def state(self) -> dict[str, Shards]:
        """See Backend."""
        return model_state(self.model) | optimizer_state(self.model, self.optimizer)

    def load(self, saved: SavedTensors, read: Reader) -> None:
        """See Backend."""
        load_optimizer(self.model, self.optimizer, saved, read)

    def _norm(self, parameters: Iterable[nn.Parameter]) -> torch.Tensor:
        """The norm of gradients of which each rank holds a part, on the device. Collective."""
        shards = [p.grad.to_local() for p in parameters if p.grad is not None]
        # The ranks' shards are disjoint, so their squares add up; in float64 a square cannot overflow.
        squares = nn.utils.get_total_norm(shards).double().square()
        # Offloaded shards are on the CPU, where an accelerator's group does not sum.
        return dist.sum_(squares.to(self.world.device)).sqrt().to(shards[0].dtype)
