"""What stands in an estimate for libraries that take no tensors without values: DistributedDataParallel and DeepSpeed.
Both train the model as one process does, which can be traced; what they do beside it is here."""

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
import torch.distributed as torch_dist
from torch import nn

from dist_train.backends.rules import bucket_of
from dist_train.config.tree import Config
from dist_train.doctor.estimate import Estimate
from dist_train.doctor.ledger import Moment
from dist_train.doctor.traffic import Route, passed_on

BUCKETED = ("ddp", "accelerate")
TRACED_AS_SINGLE = (*BUCKETED, "deepspeed")
BYTES = 4  # of a weight


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


def zero(found: Estimate, config: Config, ranks: int, of_node: int) -> Estimate:
    """The estimate of a rank of DeepSpeed: what one process holds, and what ZeRO shares out of it, by formula.

    Args:
        found: of a process that holds all.
        config: of the run.
        ranks: all of them.
        of_node: ranks of a node.
    """
    stage, held = config.backend.zero_stage or 0, found.held
    shared = {"weights": stage == 3, "gradients": stage >= 2, "optimizer": stage >= 1}
    parts = {kind: -(-count // ranks) if shared.get(kind) else count for kind, count in found.peak.parts.items()}
    mine = {kind: -(-count // ranks) if shared[kind] else count for kind, count in held.items()}
    part = bucket_of(held["weights"] // BYTES, ranks) * BYTES
    parts["gradients"] = mine["gradients"]  # which have a place that stays
    parts["temporary"] += part if stage else held["gradients"]  # stage 0 sums them all in one copy
    parts["gathered"] = 2 * part if stage == 3 else 0
    # Weights and gradients once for each micro-batch, where they are stored in parts; else once a step.
    gathers = {0: 0, 1: 1, 2: 1, 3: 2 * found.micro_batches}[stage]
    sums = found.micro_batches if stage >= 2 else 1
    each = passed_on("all_gather", held["weights"], ranks), passed_on("reduce_scatter", held["gradients"], ranks)
    sent = gathers * each[0] + sums * each[1] * (1 if stage else 2)
    over = {Route("all ranks", ranks > of_node): sent} if ranks > 1 else {}
    return replace(found, peak=Moment(found.peak.phase, parts), held=mine, sent=over, formula=True)
