"""What `ddp` and `accelerate` share of DistributedDataParallel."""

import re
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
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


def settle_buckets(model: DistributedDataParallel, sparse: Iterable[str]) -> None:
    """Brings DDP's buckets into their final order before the first step. Collective.

    DDP sorts gradients into other buckets after its first backward. Where a gradient lies decides in which order the
    ranks' values are summed (from 4 ranks on), so a resumed run's first step would round otherwise than the same step
    of a run that was not cut off. Here a backward without a model takes that first place, in the reverse order of the
    parameters, which is about that of a real one.

    Args:
        model: wrapped just now.
        sparse: parameters whose gradient is sparse.
    """
    if model.find_unused_parameters:
        return  # which leaves the buckets as they are
    inner = model.module
    trained = {name: p for name, p in inner.named_parameters() if p.requires_grad}
    model.module = _SumOfAll(trained, set(sparse))  # not the model: it may have hooks
    model(None).backward()  # on a device, DDP takes no call without an argument
    model.module = inner
    model.zero_grad()


class _SumOfAll(nn.Module):
    """A number from all parameters, which gives each a gradient of the layout that the model gives it."""

    def __init__(self, parameters: dict[str, nn.Parameter], sparse: set[str]):
        super().__init__()
        self.of, self.sparse = parameters, sparse

    def forward(self, _: None) -> torch.Tensor:
        return torch.stack([self._number(name, p).float() for name, p in self.of.items()]).sum()

    def _number(self, name: str, p: torch.Tensor) -> torch.Tensor:
        if name in self.sparse:
            p = F.embedding(torch.zeros(1, dtype=torch.int64, device=p.device), p, sparse=True)
        return (torch.view_as_real(p) if p.is_complex() else p).sum()
