"""Whole tensors from the parts that ranks hold."""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as torch_dist

from dist_train.backends.shards import shards_of
from dist_train.ranks import dist
from dist_train.ranks.dist import World

Place = tuple[tuple[int, ...], tuple[int, ...]]  # of a box: where it begins, and its sizes


def whole_on_main(tensors: Mapping[str, torch.Tensor], world: World) -> dict[str, torch.Tensor]:
    """Copies of tensors on the CPU of rank 0, whole, however ranks share them out; on the other ranks none. Collective.

    A part of which several ranks have copies is sent by the first of them. Beside its copies rank 0 holds the parts of
    one tensor at a time.

    Args:
        tensors: the same names on every rank, in the same order.
        world: this rank's place.
    """
    boxes = {name: shards_of(tensor).boxes for name, tensor in tensors.items()}
    every = dist.gather({name: [(at, tuple(part.shape)) for at, part in own] for name, own in boxes.items()})
    found = {}
    for name, tensor in tensors.items():
        senders: dict[Place, int] = {}
        for rank, of_rank in enumerate(every):
            for place in of_rank[name]:
                senders.setdefault(place, rank)
        parts = [part for at, part in boxes[name] if senders[at, tuple(part.shape)] == world.rank]
        if any(senders.values()):
            parts = _sent(tensor, senders, parts, world)
        if world.is_main:
            found[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
            for (at, sizes), part in zip(senders, parts, strict=True):
                within = tuple(slice(begin, begin + size) for begin, size in zip(at, sizes, strict=True))
                found[name][within] = part.cpu().view(sizes)
    return found


def _sent(
    tensor: torch.Tensor, senders: Mapping[Place, int], parts: Sequence[torch.Tensor], world: World
) -> list[torch.Tensor]:
    """The parts of all senders, in their order, on rank 0. Collective."""
    assert not tensor.is_complex(), "which stays whole"
    sizes = [math.prod(size) for _, size in senders]
    counts = [sum(n for n, by in zip(sizes, senders.values(), strict=True) if by == rank) for rank in range(world.size)]
    none = torch.empty(0, dtype=tensor.dtype, device=world.device)
    mine = torch.cat([none, *(part.reshape(-1).to(world.device) for part in parts)])
    coming = counts if world.is_main else [0] * world.size
    received = mine.new_empty(sum(coming))
    torch_dist.all_to_all_single(received, mine, coming, [len(mine), *[0] * (world.size - 1)])
    return list(received.split(sizes)) if world.is_main else []
