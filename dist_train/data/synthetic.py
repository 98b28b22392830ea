"""Made-up images of any number, shape and class count, which a model can learn: for tests, sizing and benchmarks."""

import torch

from dist_train.data.sets import Data, InMemory
from dist_train.errors import ConfigError


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
    """
    for name, value, least in (("n", n, 1), ("n_test", n_test, 1), ("classes", classes, 2)):
        if not isinstance(value, int) or value < least:
            raise ConfigError(f"data.args.{name}: got {value!r}, expected an integer of {least} or more")
    if not 0 <= noise <= 1:
        raise ConfigError(f"data.args.noise: got {noise!r}, expected 0 to 1; for example --data.args.noise 0.5")
    if not shape or any(not isinstance(s, int) or s < 1 for s in shape):
        raise ConfigError(f"data.args.shape: got {shape!r}, expected sizes; for example --data.args.shape [1,28,28]")
    draw = torch.Generator().manual_seed(seed)
    pictures = torch.randint(256, (classes, *shape), generator=draw)

    def split(count: int) -> InMemory:
        labels = torch.randint(classes, (count,), generator=draw)
        images = torch.empty(count, *shape, dtype=torch.uint8)
        for some in torch.arange(count).split(10_000):  # bounds the memory of the arithmetic
            grain = torch.randint(256, (len(some), *shape), generator=draw)
            images[some] = (pictures[labels[some]] * (1 - noise) + grain * noise).to(torch.uint8)
        return InMemory(images, labels)

    names = tuple(f"class {i}" for i in range(classes))
    return Data(split(n), split(n_test), tuple(shape), names, mean=(0.5,), std=(0.25,))
