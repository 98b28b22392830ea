"""A class for each pixel, of which some are not known: a network that looks once more at half the size."""

import torch
import torch.nn.functional as F
from torch import nn

from dist_train import Columns, Data

UNKNOWN = 255


class TwoScales(nn.Module):
    def __init__(self, input_shape: tuple[int, int, int], classes: int, width: int = 6):
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(input_shape[0], width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.norm, self.head = nn.GroupNorm(2, width), nn.Conv2d(2 * width, classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fine = F.gelu(self.norm(self.fine(x)))
        coarse = F.gelu(self.coarse(F.avg_pool2d(fine, 2)))
        return self.head(torch.cat([fine, F.interpolate(coarse, scale_factor=2)], 1))


def halves(n: int = 30, n_test: int = 13) -> Data:
    """Pictures [2, 8, 8] of sky, sea and land. What is near the horizon is not known, in some pictures more of it."""
    generator = torch.Generator().manual_seed(4)
    horizon = torch.randint(2, 7, (n + n_test, 1, 1), generator=generator)
    y, x = torch.arange(8).view(8, 1), torch.arange(8)
    masks = torch.where(y < horizon, 0, torch.where(x < horizon, 1, 2))
    pictures = F.one_hot(masks, 3)[..., :2].movedim(3, 1) + 0.7 * torch.randn(n + n_test, 2, 8, 8, generator=generator)
    near = (y - horizon).abs() < torch.randint(3, horizon.shape, generator=generator)
    masks = masks.masked_fill(near, UNKNOWN)
    train, test = (Columns((pictures[part], masks[part])) for part in (slice(n), slice(n, None)))
    return Data(train, test, input_shape=(2, 8, 8), classes=("sky", "sea", "land"))
