"""What a rank holds of a tensor: boxes of it. The form in which backends and checkpoints speak of state.

A box is a view of the tensor that trains, so filling the boxes of all ranks restores the tensor, however it is sharded.
"""

import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Box = tuple[tuple[int, ...], torch.Tensor]  # where it begins in the whole tensor, and its values


@dataclass(frozen=True)
class Shards:
    """A rank's part of a tensor.

    Args:
        shape: of the whole tensor.
        boxes: disjoint, none of them empty. Several ranks may hold the same box.
    """

    shape: tuple[int, ...]
    boxes: tuple[Box, ...]


def shards_of(tensor: torch.Tensor) -> Shards:
    """This rank's part of a DTensor; a plain tensor is one box."""
    return shards_as(tensor, local_of(tensor))


def shards_as(tensor: torch.Tensor, local: torch.Tensor) -> Shards:
    """The same, with the values of another tensor that lies as this rank's part does."""
    shape = tuple(tensor.shape)
    if not local.numel():
        return Shards(shape, ())
    if _is_plain(tensor):
        return Shards(shape, (((0,) * tensor.dim(), local),))
    (chunk,) = tensor.__create_chunk_list__()
    return Shards(shape, ((tuple(chunk.offsets), local),))


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a DTensor, or the plain tensor itself, in the same memory."""
    return tensor.detach() if _is_plain(tensor) else tensor.detach().to_local()


def mesh_of(tensor: torch.Tensor) -> Any:
    """The mesh of a DTensor; None of a plain tensor. torch takes no list of tensors that differ in that."""
    return None if _is_plain(tensor) else tensor.device_mesh


def real_of(tensor: torch.Tensor) -> torch.Tensor:
    """A complex tensor as pairs of numbers; another as it is."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _is_plain(tensor: torch.Tensor) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # takes long to import; without it there is no DTensor
    return module is None or not isinstance(tensor, module.DTensor)


class HostCopy:
    """A copy of a state in host memory, which is allocated once: new pages cost more than the copy."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, int], torch.Tensor] = {}

    def of(self, state: Mapping[str, Shards]) -> dict[str, Shards]:
        """The state as it is now; valid until the next call. Waits for the device once, not for every tensor."""
        copy = {}
        for name, shards in state.items():
            boxes = tuple((at, self._fill((name, i), part)) for i, (at, part) in enumerate(shards.boxes))
            copy[name] = Shards(shards.shape, boxes)
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        return copy

    def _fill(self, key: tuple[str, int], part: torch.Tensor) -> torch.Tensor:
        buffer = self.buffers.get(key)
        if buffer is None or buffer.shape != part.shape or buffer.dtype != part.dtype:
            pinned = part.device.type == "cuda"
            buffer = self.buffers[key] = torch.empty(part.shape, dtype=part.dtype, pin_memory=pinned)
        return buffer.copy_(part, non_blocking=True)


def shards_of_range(shape: tuple[int, ...], start: int, flat: torch.Tensor) -> Shards:
    """The part of a tensor of `shape` whose elements from `start` on, in memory order, are `flat` [count]."""
    return Shards(shape, tuple(_boxes(shape, start, flat.detach())))


def _boxes(shape: tuple[int, ...], start: int, flat: torch.Tensor) -> Iterator[Box]:
    """A partial first row, whole rows, a partial last row; rows have one dimension less, and so on."""
    if not len(flat):
        return
    if not shape:
        yield (), flat.view(())
        return
    row = math.prod(shape[1:])
    first, within = divmod(start, row)
    if within or len(flat) < row:
        count = min(row - within, len(flat))
        yield from (((first, *at), part[None]) for at, part in _boxes(shape[1:], within, flat[:count]))
    else:
        count = len(flat) // row * row
        yield (first,) + (0,) * (len(shape) - 1), flat[:count].view(count // row, *shape[1:])
    yield from _boxes(shape, start + count, flat[count:])
