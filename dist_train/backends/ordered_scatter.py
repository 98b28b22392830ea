"""backend.reduce ordered under fully_shard: a layer's gradients, of which each rank adds up its part of all."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as torch_dist
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter

from dist_train.backends.ordered import Tree


class OrderedScatter(ReduceScatter):
    """fully_shard's reduce-scatter of a layer: each rank gets its part of every rank's gradient, and adds them up.

    Args:
        replicas: the ranks with the same part of other copies of the model; None where there is one copy. fully_shard
            sums over these what this hands on: the first of them has all, the others have zeros.

    Attributes:
        last: the micro-batch is the last of its step. Before, what it hands on are zeros.
    """

    def __init__(self, replicas: torch_dist.ProcessGroup | None = None) -> None:
        self.tree, self.last, self.replicas = Tree(), True, replicas

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """See Comm."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any, op: Any, async_op: bool = False
    ) -> None:
        """See ReduceScatter."""
        parts = torch.empty_like(input_tensor)
        torch_dist.all_to_all_single(parts, input_tensor, group=group)
        of_replicas, first = [parts], True
        if self.replicas is not None:
            of_replicas = [torch.empty_like(parts) for _ in range(self.replicas.size())]
            torch_dist.all_gather(of_replicas, parts, group=self.replicas)
            first = self.replicas.rank() == 0
        for leaf in torch.cat(of_replicas).view(-1, len(output_tensor)).unbind():  # in the order of data ranks
            self.tree.add(leaf.clone())
        total = self.tree.total() if self.last else None
        if first and total is not None:
            output_tensor.copy_(total)
        else:
            output_tensor.zero_()
