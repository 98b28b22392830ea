"""Sums of floating-point numbers without any rounding, which may be added over batches and ranks.

Each number is an integer times a power of two. The integers are cut into digits of 20 bits, and the digits of each
place are added as int64: a sum of 2^33 numbers fits, also as float64. What is lost when a large sum of squares is
subtracted from another (the variance of data with a large mean) is not lost here.
"""

from fractions import Fraction

import torch
from torch import Tensor

DIGIT = 20  # bits
LOWEST = -1074  # the power of two of the smallest float64
# Of each format: integers of its size, the bits of its mantissa and of its exponent, the power of its smallest number.
FORMATS = {torch.float64: (torch.int64, 52, 11, -1074), torch.float32: (torch.int32, 23, 8, -149)}


def exact_sum(values: Tensor) -> Tensor:
    """The sum of float64 or float32 values [n, k] over n, int64 [places, k]. What is not finite counts as 0."""
    mantissa, power, sign = _parts(values)
    return _digits([(mantissa, power)], sign, 106)


def exact_sum_of_squares(values: Tensor) -> Tensor:
    """The sum of the squares of float64 or float32 values [n, k], int64 [places, k]. What is not finite counts as 0."""
    mantissa, power, _ = _parts(values)
    high, low = mantissa >> 27, mantissa & (1 << 27) - 1  # below 2^26 and 2^27
    parts = [(high * high, 2 * power + 54), (2 * high * low, 2 * power + 27), (low * low, 2 * power)]
    return _digits(parts, torch.ones_like(mantissa), 211)


def total(digits: Tensor) -> list[Fraction]:
    """Of each column of `exact_sum`'s digits [places, k]: the sum."""
    return [_number(column, LOWEST) for column in digits.T.tolist()]


def total_of_squares(digits: Tensor) -> list[Fraction]:
    """Of each column of `exact_sum_of_squares`' digits [places, k]: the sum."""
    return [_number(column, 2 * LOWEST) for column in digits.T.tolist()]


def _number(column: list[float], lowest: int) -> Fraction:
    return Fraction(sum(int(digit) << DIGIT * place for place, digit in enumerate(column)), 1 << -lowest)


def _parts(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of values mantissa * sign * 2^(power + LOWEST), the three parts, int64."""
    integers, bits, exponent_bits, lowest = FORMATS[values.dtype]
    raw = values.contiguous().view(integers).long()
    largest = (1 << exponent_bits) - 1  # of what is not finite
    exponent = (raw >> bits) & largest
    leading = (exponent > 0).long() << bits  # is not written down, and numbers with the exponent 0 have none
    mantissa = ((raw & (1 << bits) - 1) | leading) * (exponent < largest)
    return mantissa, exponent.clamp(min=1) - 1 + lowest - LOWEST, 1 - 2 * (raw < 0).long()


def _digits(parts: list[tuple[Tensor, Tensor]], sign: Tensor, places: int) -> Tensor:
    """The sum over n of integers [n, k] below 2^60, each times a power of two [n, k] and a sign, int64 [places, k]."""
    columns = sign.shape[1]
    out = torch.zeros(places * columns, dtype=torch.int64, device=sign.device)
    for integer, power in parts:
        place, shift = power // DIGIT, power % DIGIT
        pieces = [integer << shift, *(integer >> (DIGIT * i - shift) for i in (1, 2, 3))]
        for i, piece in enumerate(pieces):
            index = (place + i) * columns + torch.arange(columns, device=sign.device)
            out.scatter_add_(0, index.flatten(), ((piece & (1 << DIGIT) - 1) * sign).flatten())
    return out.view(places, columns)
