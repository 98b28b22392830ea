"""Samples as pictures."""

import colorsys

import numpy as np
from PIL import Image

LARGEST_PX = 224
# Of classes, the palette of curves; of more, colours round the circle.
COLOURS = ("#0072b2", "#e8702a", "#00a878", "#b4528f", "#d6a300", "#7cc4ee", "#5b6470")
NO_CLASS = (128, 128, 128)
GOLDEN = 0.618  # of the circle lies between a colour and the next: no few of them are close


def picture(pixels: np.ndarray) -> Image.Image:
    """A sample as an image, at most LARGEST_PX on a side.

    Args:
        pixels: uint8 [height, width], or [channels, height, width] in grey, or in colour with three channels; other
            numbers of channels are averaged. A vector is one row of pixels.
    """
    if pixels.ndim == 3:
        pixels = np.moveaxis(pixels, 0, 2) if len(pixels) == 3 else pixels.mean(0).round()
    else:
        pixels = pixels.reshape(-1, pixels.shape[-1] if pixels.ndim else 1)
    image = Image.fromarray(np.ascontiguousarray(pixels, np.uint8))
    image.thumbnail((LARGEST_PX, LARGEST_PX))
    return image


def colour_of(number: int) -> tuple[int, int, int]:
    """Red, green and blue of a class, to 255; grey of what is none."""
    if number < 0:
        return NO_CLASS
    if number < len(COLOURS):
        red, green, blue = (int(COLOURS[number][at : at + 2], 16) for at in (1, 3, 5))
        return red, green, blue
    light = colorsys.hsv_to_rgb(number * GOLDEN % 1, 0.55 + 0.4 * (number % 2), 0.9)
    return tuple(round(255 * channel) for channel in light)  # type: ignore[return-value]


def mask(numbers: np.ndarray) -> Image.Image:
    """A mask of class numbers [height, width] in the colours of the classes, at most LARGEST_PX on a side."""
    known, places = np.unique(numbers, return_inverse=True)
    colours = np.array([colour_of(int(number)) for number in known], np.uint8)
    image = Image.fromarray(colours[places].reshape(*numbers.shape, 3))
    image.thumbnail((LARGEST_PX, LARGEST_PX), Image.Resampling.NEAREST)
    return image
