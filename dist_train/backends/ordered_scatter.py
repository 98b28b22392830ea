"""backend.reduce ordered under fully_shard: a layer's gradients, of which each rank adds up its part of all."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as torch_dist
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter

from dist_train.backends.ordered import Tree


class OrderedScatter(ReduceScatter):
    """fully_shard's reduce-scatter of a layer: each rank gets its part of every rank's gradient, and adds them up.

    Attributes:
        last: the micro-batch is the last of its step. Before, what it hands on are zeros.
    """

    def __init__(self) -> None:
        self.tree, self.last = Tree(), True

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """See Comm."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any, op: Any, async_op: bool = False
    ) -> None:
        """See ReduceScatter."""
        parts = torch.empty_like(input_tensor)
        torch_dist.all_to_all_single(parts, input_tensor, group=group)
        for leaf in parts.view(-1, len(output_tensor)).unbind():
            self.tree.add(leaf.clone())
        if self.last:
            output_tensor.copy_(self.tree.total())
        else:
            output_tensor.zero_()
