"""MNIST's idx files, mapped into memory: the node's page cache holds them once for all of its ranks."""

import math
import os
from pathlib import Path

import torch

UINT8 = 0x08  # the format's number for the type


def mapped(path: Path, dimensions: int) -> torch.Tensor:
    """The array in an unpacked idx file of bytes, uint8. Nothing is read until it is looked at.

    The mapping is private: the file is opened for reading alone, and writing to the tensor would not change it. The
    file must not be cut while the tensor lives; another may take its place by a rename.

    Source of the format: http://yann.lecun.com/exdb/mnist, "file formats".

    Args:
        path: of the file.
        dimensions: that it must have.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is of another type, cut off, or too long.
    """
    offset = 4 + 4 * dimensions
    with path.open("rb") as file:
        head = file.read(offset)
        size = os.fstat(file.fileno()).st_size
    if len(head) < offset or head[:4] != bytes([0, 0, UINT8, dimensions]):
        raise ValueError(f"{path}: got the first bytes {head[:4].hex(' ')}, expected 00 00 08 {dimensions:02x}")
    shape = [int.from_bytes(head[i : i + 4], "big") for i in range(4, offset, 4)]
    if size != offset + math.prod(shape):
        raise ValueError(f"{path}: got {size} bytes, expected {offset + math.prod(shape)} for {shape}")
    return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)[offset:].view(shape)
