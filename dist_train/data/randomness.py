"""Random transforms that depend on the sample alone, and the process's own generators left as they were."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def kept_apart() -> Iterator[None]:
    """Puts the generators of `random`, NumPy and torch (CPU) back: without workers they are the training's own."""
    kept = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])
        torch.set_rng_state(kept[2])


def seed_for(seed: int, epoch: int, index: int) -> None:
    """Seeds the three generators for one sample: a function of these three numbers, not of rank, world or worker."""
    # A digest, because NumPy's SeedSequence costs as much as decoding a small image.
    digest = hashlib.blake2b(f"{seed} {epoch} {index}".encode(), digest_size=8).digest()
    key = int.from_bytes(digest, "little")
    random.seed(key)
    np.random.seed(key % 2**32)
    torch.default_generator.manual_seed(key)  # not torch.manual_seed: that resets the device's as well
