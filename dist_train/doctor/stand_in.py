"""What stands in an estimate for libraries that take no tensors without values: DistributedDataParallel and DeepSpeed.
Both train the model as one process does, which can be traced; what they do beside it is here."""

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
import torch.distributed as torch_dist
from torch import nn

from dist_train.backends.base import Backend
from dist_train.config.tree import Config
from dist_train.doctor.ledger import KINDS, Moment
from dist_train.doctor.traffic import Route, passed_on

BUCKETED = ("ddp", "accelerate")
TRACED_AS_SINGLE = (*BUCKETED, "deepspeed")


class Buckets:
    """Does with gradients what DistributedDataParallel does: holds buckets for them that stay, and in the last
    micro-batch of a step copies each there as soon as it has come, to be summed.

    Args:
        parameters: of the model.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]):
        self.last = True
        self.kept = {p: torch.zeros_like(p) for p in parameters if p.requires_grad}
        for parameter, bucket in self.kept.items():
            parameter.register_post_accumulate_grad_hook(self._into(bucket))

    def _into(self, bucket: torch.Tensor) -> Callable[[torch.Tensor], None]:
        @torch.no_grad()
        def come(parameter: torch.Tensor) -> None:
            if self.last:
                parameter.grad = bucket.copy_(parameter.grad)
                torch_dist.all_reduce(bucket)

        return come


def zero(found: "Estimate", config: Config, ranks: int, of_node: int) -> "Estimate":
    return found
