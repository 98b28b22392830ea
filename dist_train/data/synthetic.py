"""Made-up images of any number, shape and class count, which a model can learn: for tests, sizing and benchmarks."""

import math

import torch

from dist_train.data.sets import Columns, Data, InMemory
from dist_train.errors import ConfigError

PIECE_PIXELS = 1 << 23  # made at a time: the arithmetic needs some 10 bytes a pixel beside the result


def synthetic(
    root: str,
    download: bool,
    n: int = 10_000,
    n_test: int = 1_000,
    shape: tuple[int, ...] = (1, 28, 28),
    classes: int = 10,
    noise: float = 0.5,
    seed: int = 0,
) -> Data:
    """Each class is one random picture; a sample is its class's picture mixed with noise.

    Args:
        root: not used.
        download: not used.
        n: training samples.
        n_test: test samples.
        shape: of a sample.
        classes: number of classes.
        noise: share of noise in a sample, 0 to 1.
        seed: decides pictures, classes and noise.

    Raises:
        ConfigError: an argument is out of its range.
    """
    for name, value, least in (("n", n, 1), ("n_test", n_test, 1), ("classes", classes, 2)):
        if not isinstance(value, int) or value < least:
            raise ConfigError(f"data.args.{name}: got {value!r}, expected an integer of {least} or more")
    if not 0 <= noise <= 1:
        raise ConfigError(f"data.args.noise: got {noise!r}, expected 0 to 1; for example --data.args.noise 0.5")
    if not shape or any(not isinstance(s, int) or s < 1 for s in shape):
        raise ConfigError(f"data.args.shape: got {shape!r}, expected sizes; for example --data.args.shape [1,28,28]")
    draw = torch.Generator().manual_seed(seed)
    pictures = torch.randint(256, (classes, *shape), generator=draw, dtype=torch.uint8)
    piece = max(1, PIECE_PIXELS // math.prod(shape))

    def split(count: int) -> Columns:
        labels = torch.randint(classes, (count,), generator=draw)
        images = torch.empty(count, *shape, dtype=torch.uint8)
        for some, numbers in zip(images.split(piece), labels.split(piece), strict=True):
            grain = torch.randint(256, some.shape, generator=draw, dtype=torch.uint8)
            some.copy_(pictures[numbers] * (1 - noise) + grain * noise)
        return InMemory(images, labels)

    names = tuple(f"class {i}" for i in range(classes))
    # Round numbers for every noise, so that only the samples differ with it: a deviation from 0.20 to 0.29 is there.
    return Data(split(n), split(n_test), tuple(shape), names, mean=(0.5,), std=(0.25,))
