"""Random numbers that are a function of the run's seed, the epoch and the sample: the same on every rank, in every
micro-batch, and on every device, as they are made on the host."""

import hashlib

import numpy as np

from dist_train.data.order import mix

STREAM = 0x9E3779B97F4A7C15  # odd: multiples of it go through all numbers
PROPOSALS = 8  # all of them are refused in fewer than 1 of 10**10 cases


class Draws:
    """What may be drawn for some samples by one transform.

    An epoch passes over a sample once, so (seed, epoch, sample) says as much as (seed, step, sample).

    Args:
        seed: of the run.
        epoch: counts from 0.
        place: of the transform among all of them.
        samples: their numbers in the split, int64 [n].
    """

    def __init__(self, seed: int, epoch: int, place: int, samples: np.ndarray):
        digest = hashlib.blake2b(f"{seed} {epoch} {place}".encode(), digest_size=8).digest()
        with np.errstate(over="ignore"):
            self.keys = mix(samples.astype(np.uint64) * np.uint64(STREAM) + np.uint64(int.from_bytes(digest, "little")))
        self.drawn = 0

    def __len__(self) -> int:
        return len(self.keys)

    def uniform(self, count: int = 1) -> np.ndarray:
        """So many numbers above 0 and below 1 for each sample, other ones at every call: float64 [n, count]."""
        numbers = np.arange(self.drawn + 1, self.drawn + count + 1, dtype=np.uint64)
        self.drawn += count
        with np.errstate(over="ignore"):
            bits = mix(self.keys[:, None] + mix(numbers * np.uint64(STREAM)))
        return ((bits >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52

    def normal(self, count: int = 1) -> np.ndarray:
        """Numbers of the standard normal distribution, likewise. Source: Box and Muller, 1958."""
        radius = np.sqrt(-2 * np.log(self.uniform(count)))
        return radius * np.cos(2 * np.pi * self.uniform(count))

    def beta(self, alpha: float) -> np.ndarray:
        """A number of the Beta(alpha, alpha) distribution for each sample, float64 [n]."""
        a, b = self._log_gamma(alpha), self._log_gamma(alpha)
        return 1 / (1 + np.exp(np.clip(b - a, -700, 700)))

    def _log_gamma(self, alpha: float) -> np.ndarray:
        """The logarithm of a number of the Gamma(alpha) distribution, as the number itself may be too small.

        Of the proposals for Gamma(alpha + 1) the first that is accepted; fewer than 1 in 20 are not. Source: Marsaglia
        and Tsang, "A Simple Method for Generating Gamma Variables", 2000.
        """
        d = alpha + 1 - 1 / 3
        x, u = self.normal(PROPOSALS), self.uniform(PROPOSALS)
        v = (1 + x / np.sqrt(9 * d)) ** 3
        with np.errstate(invalid="ignore", divide="ignore"):
            accepted = (v > 0) & (np.log(u) < 0.5 * x * x + d - d * v + d * np.log(v))
        accepted[:, -1] |= ~accepted.any(1)
        first = v[np.arange(len(v)), accepted.argmax(1)]
        return np.log(d * np.abs(first)) + np.log(self.uniform()[:, 0]) / alpha
