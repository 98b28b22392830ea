"""Made-up pictures of squares, discs and crosses, with a mask that has the class of each pixel: a segmentation."""

import torch

from dist_train.data.sets import Columns, Data
from dist_train.errors import ConfigError

CLASSES = ("background", "square", "disc", "cross")


def shapes(root: str, download: bool, n: int = 512, n_test: int = 128, size: int = 32, seed: int = 0) -> Data:
    """Each picture has two shapes, of a random class, place, size and brightness, and noise over all.

    Args:
        root: not used.
        download: not used.
        n: training samples.
        n_test: test samples.
        size: height and width, in pixels.
        seed: decides shapes and noise.

    Raises:
        ConfigError: an argument is out of its range.
    """
    for name, value, least in (("n", n, 1), ("n_test", n_test, 1), ("size", size, 8)):
        if not isinstance(value, int) or value < least:
            raise ConfigError(f"data.args.{name}: got {value!r}, expected an integer of {least} or more")
    draw = torch.Generator().manual_seed(seed)
    train, test = (_split(count, size, draw) for count in (n, n_test))
    return Data(train, test, (1, size, size), CLASSES, mean=(0.4,), std=(0.2,))


def _split(n: int, size: int, draw: torch.Generator) -> Columns:
    rows, columns = torch.arange(size).view(1, -1, 1), torch.arange(size).view(1, 1, -1)
    light = torch.full((n, size, size), 60.0)
    masks = torch.zeros(n, size, size, dtype=torch.int64)
    for _ in range(2):
        kind = torch.randint(1, len(CLASSES), (n, 1, 1), generator=draw)
        radius = torch.randint(size // 8, size // 4 + 1, (n, 1, 1), generator=draw)
        y, x = (torch.randint(size, (n, 1, 1), generator=draw) for _ in range(2))
        down, right = (rows - y).abs(), (columns - x).abs()
        inside = (down <= radius) & (right <= radius)
        disc, cross = down**2 + right**2 <= radius**2, (down <= radius // 3) | (right <= radius // 3)
        inside &= (kind == 1) | ((kind == 2) & disc) | ((kind == 3) & cross)
        light = torch.where(inside, torch.randint(110, 220, (n, 1, 1), generator=draw).float(), light)
        masks = torch.where(inside, kind, masks)
    noise = torch.randn(n, size, size, generator=draw) * 15
    return Columns(((light + noise).clamp(0, 255).to(torch.uint8).unsqueeze(1), masks))
