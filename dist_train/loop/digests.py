"""Digests of tensors: one pass over their memory, on their device, and the same for the same bits."""

import zlib
from collections.abc import Mapping

import torch

from dist_train.backends.shards import local_of, real_of

WORD = 8  # bytes
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def digest(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor's bits, taken as words of 64 bits, modulo 2**64: int64, a scalar on its device. Of a DTensor,
    that of this rank's part.

    Another bit anywhere makes another sum. It tells nothing of the order of the words, and a sum of floats would lose
    what is small beside the rest. torch adds words as fast as it reads them; narrower integers, which it widens first,
    ten times slower.
    """
    tensor = local_of(tensor)
    if tensor.layout == torch.sparse_coo:
        tensor = tensor.coalesce()
        return digest(tensor.indices()) * 3 + digest(tensor.values())
    flat = real_of(tensor).contiguous().reshape(-1)
    flat = flat.view(torch.uint8) if flat.dtype == torch.bool else flat
    size = flat.element_size()
    if flat.storage_offset() * size % WORD:
        flat = flat.clone()  # a word begins at a multiple of its size
    whole = flat.numel() * size // WORD * WORD // size
    found = flat[:whole].view(torch.int64).sum()
    if whole < flat.numel():
        found = found + flat[whole:].view(INTEGERS[size]).sum(dtype=torch.int64)
    return found


class Sheet:
    """Digests by name. What comes under one name several times is added.

    Args:
        tensors: the first of them.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor] | None = None):
        self.found: dict[str, torch.Tensor] = {}
        for name, tensor in (tensors or {}).items():
            self.add(name, tensor)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Takes in a tensor as it is now."""
        new, before = digest(tensor), self.found.get(name)
        self.found[name] = new if before is None else before + new

    def see(self, name: str, _: torch.Tensor, gradient: torch.Tensor) -> None:
        """Takes in the gradient of a parameter."""
        self.add(name, gradient)

    def total(self, device: torch.device) -> torch.Tensor:
        """One number of all, int64, a scalar on a device. It does not depend on their order."""
        if not self.found:
            return torch.zeros((), dtype=torch.int64, device=device)
        odd = torch.tensor([2 * zlib.crc32(name.encode()) + 1 for name in self.found])
        return (self._stacked(device) * odd.to(device)).sum()

    def rows(self) -> dict[str, int]:
        """The digests. Waits for the device."""
        return dict(zip(self.found, self._stacked(torch.device("cpu")).tolist(), strict=True)) if self.found else {}

    def _stacked(self, device: torch.device) -> torch.Tensor:
        return torch.stack([value.to(device) for value in self.found.values()])
