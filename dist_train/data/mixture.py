"""Several sources by weight, as one split: which source a sample is of is a pure function of its number."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from dist_train.data.batch import flatten
from dist_train.data.order import half_of, keys_of, permuted
from dist_train.data.sets import Gathered
from dist_train.errors import ConfigError

SLOTS = 4096  # of the pattern: shares are multiples of its inverse


def mixture(splits: Sequence[Gathered], weights: Sequence[float]) -> Gathered:
    """One split in which sources take turns.

    The sources are dealt over a pattern of SLOTS numbers, which is repeated: each has its share of them, rounded (by
    the largest remainder), and is spread evenly. So of any run of numbers each source has its share, to a sample or
    two. A source is passed over again and again, in another order at each pass. The split ends where each source has
    been passed over once; those that were done earlier have begun again.

    Memory and seek are O(1) beside those of the sources.

    Args:
        splits: the sources, with trees of tensors of the same names and shapes.
        weights: share of each in the samples, above 0; their sum is taken for the whole.

    Raises:
        ConfigError: a weight is no share.
    """
    quotas = _quotas(weights, len(splits))
    pattern, rank = _pattern(quotas)
    sizes = np.array([split.n for split in splits], np.int64)
    halves = half_of(sizes)
    n = max(_length(source, split.n, pattern, int(quotas[source])) for source, split in enumerate(splits))

    def places(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source of each sample, and its number there."""
        turns, slots = np.divmod(numbers, SLOTS)
        source = pattern[slots]
        passes, place = np.divmod(turns * quotas[source] + rank[slots], sizes[source])
        return source, permuted(place, sizes[source], halves[source], keys_of(source, passes))

    def gather(numbers: np.ndarray) -> object:
        source, found = places(numbers)
        parts, rebuild = [], None
        for one in np.unique(source).tolist():
            leaves, rebuild = flatten(splits[one].gather(found[source == one]))
            parts.append(leaves)
        assert rebuild is not None
        if len(parts) == 1:
            return rebuild(parts[0])
        back = torch.from_numpy(np.argsort(np.argsort(source, kind="stable")))
        return rebuild([torch.cat(leaves)[back] for leaves in zip(*parts, strict=True)])

    def describe(number: int) -> str:
        (source,), (found,) = places(np.array([number]))
        told = splits[source].describe
        return f"source {source}, sample {found}" + (f", {told(int(found))}" if told is not None else "")

    whole = repr((quotas.tolist(), [(split.n, split.identity) for split in splits]))
    shares = ", ".join(f"{quota / SLOTS:.1%} of {split.n:,}" for quota, split in zip(quotas, splits, strict=True))
    sources = "; ".join(f"source {i}: {split.about}" for i, split in enumerate(splits) if split.about)
    about = f"a mixture: {shares}" + (f"; {sources}" if sources else "")
    return Gathered(n, gather, hashlib.sha256(whole.encode()).hexdigest(), describe, about)


def _quotas(weights: Sequence[float], sources: int) -> np.ndarray:
    """Slots of each source in the pattern, int64 [sources]. Raises ConfigError."""
    given = np.array(weights, np.float64)
    assert len(given) == sources > 0
    if not (np.isfinite(given).all() and (given > 0).all()):
        raise ConfigError(f"data.args.sources: got weights {list(weights)}, expected finite numbers above 0")
    exact = given / given.sum() * SLOTS
    quotas = np.floor(exact).astype(np.int64)
    largest = np.argsort(quotas - exact, kind="stable")  # the largest remainder first, then by number
    quotas[largest[: SLOTS - int(quotas.sum())]] += 1
    if not quotas.all():
        raise ConfigError(
            f"data.args.sources: got weights {list(weights)}, expected shares of 1/{SLOTS} at least; leave out the "
            f"source with the smallest, or give it more"
        )
    return quotas


def _pattern(quotas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The source of each slot, and how many slots before it are of the same source: int64 [SLOTS] each."""
    source = np.repeat(np.arange(len(quotas)), quotas)
    rank = np.concatenate([np.arange(quota) for quota in quotas])
    order = np.lexsort((source, (rank + 0.5) / quotas[source]))  # each in the middle of its even part
    return source[order], rank[order]


def _length(source: int, n: int, pattern: np.ndarray, quota: int) -> int:
    """Samples of the mixture until a source with n of its own has been passed over."""
    turns, more = divmod(n - 1, quota)
    return turns * SLOTS + int(np.flatnonzero(pattern == source)[more]) + 1
