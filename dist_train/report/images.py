"""Samples as pictures."""

import numpy as np
from PIL import Image

LARGEST_PX = 224


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
