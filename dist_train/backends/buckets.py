"""What `ddp` and `accelerate` share of DistributedDataParallel."""

import re
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dist_train.backends.fit import some
from dist_train.backends.probe import Findings
from dist_train.errors import ConfigError


def settings(findings: Findings) -> dict[str, bool]:
    """Arguments of DistributedDataParallel for a model of which this was found."""
    return {
        "gradient_as_bucket_view": True,
        # Goes through the graph at every step, and exchanges which parameters were used.
        "find_unused_parameters": bool(findings.unused) or findings.varies,
    }


def own_buffers(model: DistributedDataParallel) -> None:
    """Keeps it from handing out rank 0's buffers before each forward: ours are settled after each step. The argument
    for it has another name in each version of torch."""
    model.broadcast_buffers = False


def explained(model: DistributedDataParallel) -> None:
    """Has the model say in a line what its own error says of its arguments, which a config does not have."""
    inner = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        try:
            return inner(*args, **kwargs)
        except RuntimeError as error:
            if "Expected to have finished reduction" not in str(error):
                raise
            asked = [name for name, p in model.module.named_parameters() if p.requires_grad]
            told = re.search(r"did not receive grad for rank \d+: ([\d ]+)", str(error))
            missing = tuple(asked[int(i)] for i in told[1].split()) if told else ("which, it does not say",)
            raise ConfigError(
                f"model: got no gradient for some weights in a step ({some(missing)}), though all had one when the "
                f"model was first looked at; expected a forward that draws which way it takes from the generators of "
                f"torch, NumPy or Python, which is noticed; or train in one process, without torchrun"
            ) from None

    model.forward = forward


def settle_buckets(model: DistributedDataParallel) -> None:
    """Brings DDP's buckets into their final order before the first step. Collective.

    DDP sorts gradients into other buckets after its first backward. Where a gradient lies decides in which order the
    ranks' values are summed (from 4 ranks on), so a resumed run's first step would round otherwise than the same step
    of a run that was not cut off. Here a backward without a model takes that first place, in the reverse order of the
    parameters, which is about that of a real one.
    """
    if model.find_unused_parameters:
        return  # which leaves the buckets as they are
    if any(isinstance(m, (nn.Embedding, nn.EmbeddingBag)) and m.sparse for m in model.modules()):
        return  # its gradient would be dense here, and DDP expects what it was told
    inner = model.module
    model.module = _SumOfAll([p for p in inner.parameters() if p.requires_grad])  # not the model: it may have hooks
    model(None).backward()  # on a device, DDP takes no call without an argument
    model.module = inner
    model.zero_grad()


class _SumOfAll(nn.Module):
    def __init__(self, parameters: list[nn.Parameter]):
        super().__init__()
        self.of = parameters

    def forward(self, _: None) -> torch.Tensor:
        real = [torch.view_as_real(p) if p.is_complex() else p for p in self.of]
        return torch.stack([p.sum().float() for p in real]).sum()
