"""What a rank sends in collectives, and over which ranks."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as torch_dist
from torch.utils._pytree import tree_leaves

from dist_train.backends.mesh import DIMENSIONS, Mesh

# Beginnings of the names of torch's operators, and of what a rank sends its share of what of its tensors: of n ranks
# in a ring each passes on (n - 1) / n of it, and of an all-reduce that twice.
COLLECTIVES = {
    "all_reduce": "all_reduce",
    "allreduce": "all_reduce",
    "all_gather": "all_gather",
    "allgather": "all_gather",
    "_allgather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "_reduce_scatter": "reduce_scatter",
    "all_to_all": "all_to_all",
    "alltoall": "all_to_all",
    "broadcast": "broadcast",
    "gather": "gather",
    "scatter": "scatter",
}


@dataclass(frozen=True)
class Sent:
    """Of a collective.

    Args:
        kind: of COLLECTIVES.
        bytes: that a rank sends, on average, in a ring.
        ranks: that take part.
    """

    kind: str
    bytes: int
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Route:
    """Where bytes go.

    Args:
        over: the dimensions of the mesh that the ranks differ in, such as `shard` or `replicate x shard`; or all ranks.
        between: nodes, and not inside one: some of the ranks are on another.
    """

    over: str
    between: bool


def sent_by(func: Any, args: tuple, out: Any) -> tuple[Sent, list[torch.Tensor]] | None:
    """What an operator of torch sends, and the tensors that it fills; None of one that only waits."""
    name = func.overloadpacket.__name__
    kind = next((kind for start, kind in COLLECTIVES.items() if name.startswith(start)), None)
    group = next((found for found in map(_group, args) if found is not None), None)
    if kind is None or group is None:
        return None
    given = [t for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
    if func.namespace == "c10d":  # takes first what it fills, then what it reads; what is reduced in place is both
        filled = [t for t in tree_leaves(args[0]) if isinstance(t, torch.Tensor)]
        read = given[len(filled) :] or filled
    else:
        filled, read = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)], given
    payload = sum(t.nbytes for t in (filled if kind in ("all_gather", "gather") else read))
    ranks = tuple(torch_dist.get_process_group_ranks(group))
    return Sent(kind, passed_on(kind, payload, len(ranks)), ranks), filled


def passed_on(kind: str, payload: int, ranks: int) -> int:
    """Bytes that each of so many ranks sends."""
    return payload * (ranks - 1) // ranks * (2 if kind == "all_reduce" else 1)


def route(ranks: Iterable[int], mesh: Mesh | None, of_node: int) -> Route:
    """Where the bytes of a collective among these ranks go.

    Args:
        ranks: that take part.
        mesh: of all ranks; None where they are in none.
        of_node: ranks of a node, which follow each other.
    """
    ranks = tuple(ranks)
    over = "all ranks"
    if mesh is not None:
        places = [mesh.place(rank) for rank in ranks]
        over = " x ".join(name for name, *at in zip(DIMENSIONS, *places, strict=True) if len(set(at)) > 1)
    return Route(over, len({rank // of_node for rank in ranks}) > 1)


def _group(value: Any) -> torch_dist.ProcessGroup | None:
    if isinstance(value, torch_dist.ProcessGroup):
        return value
    if isinstance(value, str):
        try:
            return torch_dist.distributed_c10d._resolve_process_group(value)
        except (RuntimeError, ValueError, LookupError):
            return None  # another argument, such as the name of a sum
    if isinstance(value, torch.ScriptObject) and "ProcessGroup" in value._type().name():
        return torch_dist.distributed_c10d._resolve_process_group(torch_dist.ProcessGroup.unbox(value).group_name)
    return None
