"""A small U-Net, for segmentation.

Source: O. Ronneberger, P. Fischer, T. Brox, "U-Net: Convolutional Networks for Biomedical Image Segmentation", 2015;
with group norms, which are of each sample alone, in the place of batch statistics.
"""

import torch
from torch import nn

from dist_train.errors import ConfigError

GROUPS = 4


class UNet(nn.Module):
    """Convolutions at several sizes, halved on the way down, and joined with what was seen there on the way up.

    Args:
        input_shape: of a picture: (channels, height, width).
        classes: numbers for each pixel.
        width: channels at full size, twice as many at each half; a multiple of 4.
        depth: how often the size is halved.
    """

    def __init__(self, input_shape: tuple[int, ...], classes: int, width: int = 16, depth: int = 2):
        super().__init__()
        if len(input_shape) != 3 or any(size % 2**depth for size in input_shape[1:]):
            raise ConfigError(
                f"model.name: got unet for samples {list(input_shape)}, expected pictures [channels, height, width] "
                f"whose sizes are multiples of {2**depth}; write a smaller --model.args.depth, or resize them"
            )
        if width < GROUPS or width % GROUPS:
            raise ConfigError(f"model.args.width: got {width}, expected a multiple of {GROUPS}; for example 16")
        widths = [width * 2**i for i in range(depth + 1)]
        self.down = nn.ModuleList(_block(of, to) for of, to in zip([input_shape[0], *widths], widths, strict=False))
        self.wider = nn.ModuleList(nn.ConvTranspose2d(to * 2, to, 2, stride=2) for to in reversed(widths[:-1]))
        self.up = nn.ModuleList(_block(to * 2, to) for to in reversed(widths[:-1]))
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [batch, classes, height, width] of pictures [batch, channels, height, width]."""
        seen = []
        for i, block in enumerate(self.down):
            x = block(x if i == 0 else nn.functional.avg_pool2d(x, 2))
            seen.append(x)
        for wider, block, before in zip(self.wider, self.up, reversed(seen[:-1]), strict=True):
            x = block(torch.cat([wider(x), before], 1))
        return self.head(x)


def _block(of: int, to: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (of, to):
        layers += [nn.Conv2d(channels, to, 3, padding=1), nn.GroupNorm(GROUPS, to), nn.SiLU()]
    return nn.Sequential(*layers)
