"""Random bits that are a function of keys and positions: the same on every device, in any order, compiled or not.

All of it is integer arithmetic of torch that wraps around. Shifts to the right keep the sign there, which costs a bit
of the hash's state at each, and saves an operation.
"""

import struct
from collections.abc import Iterator
from contextlib import contextmanager

import torch

ODD = 0x9E3779B1  # 2**32 by the golden ratio: what is multiplied by it lies far apart
WIDE = -0x61C8864680B583EB  # the same of 2**64, as a signed number
MIX_WIDE = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)  # of splitmix64
MIX = (0x7FEB352D, 0x846CA68B - (1 << 32))  # of lowbias32
SHIFTS_WIDE, SHIFT, SHIFT_LAST = (30, 31), 15, 16
NOT_ZERO, ALSO_NOT_ZERO = 0x2545F491, 0x1F123BB5  # as what is multiplied stays 0
LOW, HIGH = -(1 << 31), 1 << 32
TABLES: dict[tuple[tuple[int, ...], tuple[int, ...], torch.device], torch.Tensor] = {}
TABLES_KEPT, LARGEST_TABLE = 64, 1 << 20


@contextmanager
def tables_apart() -> Iterator[None]:
    """Forgets the tables that are made meanwhile, as where tensors have no values."""
    kept = dict(TABLES)
    TABLES.clear()
    try:
        yield
    finally:
        TABLES.clear()
        TABLES.update(kept)


def mixed(keys: torch.Tensor) -> torch.Tensor:
    """Other keys, int64, of which each bit depends on all bits of those given. Source: Steele and others, "Fast
    splittable pseudorandom number generators", 2014."""
    for factor, shift in zip(MIX_WIDE, SHIFTS_WIDE, strict=True):
        keys = keys * factor
        keys = keys ^ (keys >> shift)
    return keys


def mixed_number(number: int) -> int:
    """What `mixed` gives for a number."""
    for factor, shift in zip(MIX_WIDE, SHIFTS_WIDE, strict=True):
        number = wrapped(number * factor)
        number ^= number >> shift
    return number


def wrapped(number: int) -> int:
    """A number as int64 has it."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


def sample_keys(step_key: int | torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
    """A key for each sample, and one more, that all samples of a step share: int64 [n + 1].

    Args:
        step_key: a number, or a tensor [1].
        samples: their numbers in the data set, int64 [n].
    """
    numbers = torch.nn.functional.pad(samples, (0, 1), value=-1)
    return mixed(numbers * WIDE + step_key)


def hashes(keys: torch.Tensor, shape: tuple[int, ...], first: tuple[int, ...] = ()) -> torch.Tensor:
    """A random number for each position under each key, evenly spread over all that int32 holds: [n, *shape].

    A position counts as its coordinates. So it keeps its number where a tensor is padded to another length, or is a
    part of another.

    Args:
        keys: int64 [n].
        shape: of what belongs to a key.
        first: the coordinates of its first position; none are zeros.
    """
    found, first = (keys >> 32).to(torch.int32), first or (0,) * len(shape)
    rows, inner = shape[:-2], shape[-2:]
    for length, begin in zip(rows, first, strict=False):
        found = _stirred(found.unsqueeze(-1) ^ _numbers((length,), (begin,), keys.device))
    if not inner:
        return found
    found = found.view(*found.shape, *[1] * len(inner)) ^ _numbers(inner, first[-2:], keys.device)
    return _stirred(found, last=True)


def kept(
    keys: torch.Tensor, shape: tuple[int, ...], p: float, dtype: torch.dtype, scale: float = 1.0,
    first: tuple[int, ...] = (),
) -> torch.Tensor:  # fmt: skip
    """`scale` for each position that is kept, and 0 where it is dropped, with probability p: [n, *shape]. See `hashes`
    for `first`."""
    found, threshold = hashes(keys, shape, first), min(round(p * HIGH), HIGH - 1) + LOW
    if dtype == torch.float32 and not torch.compiler.is_compiling():
        # In the memory of the hashes, as 1 or 0 times the bits of the number.
        return found.ge_(threshold).mul_(struct.unpack("i", struct.pack("f", scale))[0]).view(dtype)
    return found.ge(threshold).to(dtype).mul_(scale)


def _stirred(numbers: torch.Tensor, last: bool = False) -> torch.Tensor:
    """Mixes int32 numbers, in place. Of the last ones the upper bits decide, which are mixed by the multiplications."""
    numbers.mul_(MIX[0])
    numbers.bitwise_xor_(numbers >> SHIFT)
    numbers.mul_(MIX[1])
    return numbers if last else numbers.bitwise_xor_(numbers >> SHIFT_LAST)


def _numbers(shape: tuple[int, ...], first: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """A random number for each position in one or two dimensions, int32; see `hashes`."""
    if torch.compiler.is_compiling():  # there it is fused with what it is for
        return _numbered(shape, first, device)
    table = TABLES.get((shape, first, device))
    if table is None:
        table = _numbered(shape, first, device)
        # Never taken out again: a captured graph knows a table by its memory.
        if len(TABLES) < TABLES_KEPT and table.numel() <= LARGEST_TABLE:
            TABLES[shape, first, device] = table
    return table


def _numbered(shape: tuple[int, ...], first: tuple[int, ...], device: torch.device) -> torch.Tensor:
    # Not a multiplication first: the compiler would take that into its arithmetic of indices, which does not wrap.
    places = [torch.arange(at, at + n, dtype=torch.int32, device=device) for n, at in zip(shape, first, strict=True)]
    last = _stirred(places[-1] ^ NOT_ZERO)
    if len(shape) == 1:
        return last
    return _stirred(_stirred(places[0] ^ ALSO_NOT_ZERO).unsqueeze(-1) ^ last)
