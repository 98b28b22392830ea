"""Random transforms that depend on the sample alone, and the process's own generators left as they were."""

import hashlib
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from dist_train.data.generators import Seeder


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


def seed_for(seed: int, epoch: int, index: int, own: Sequence[Seeder] = ()) -> None:
    """Seeds the three generators for one sample, and those of the data set's own: a function of these three numbers,
    not of rank, world or worker; another number for each of its own, so that no two draw alike."""
    key = _key(f"{seed} {epoch} {index}")
    random.seed(key)
    np.random.seed(key % 2**32)
    torch.default_generator.manual_seed(key)  # not torch.manual_seed: that resets the device's as well
    for number, seeder in enumerate(own):
        seeder(_key(f"{seed} {epoch} {index} {number}"))


def _key(text: str) -> int:
    # A digest, because NumPy's SeedSequence costs as much as decoding a small image.
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
