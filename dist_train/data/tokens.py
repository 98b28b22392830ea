"""Encoded text: token numbers in mapped files, and where its documents begin."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Tokens:
    """A corpus as one row of token numbers. It lies in mapped files: it takes memory as it is read.

    Args:
        shards: token numbers, uint16 or uint32 [tokens] each, one after another.
        starts: where each document begins in the whole row, int64 [documents], rising from 0. A document ends where the
            next one begins. One document where the source has none.
        identity: text that changes when the tokens do.
        check: is given token numbers and their places as they are read, and raises ConfigError for wrong ones.
    """

    shards: Sequence[np.ndarray]
    starts: np.ndarray
    identity: str
    check: Callable[[np.ndarray, np.ndarray], None] | None = None

    def __len__(self) -> int:
        return int(self._ends[-1])

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum([len(shard) for shard in self.shards], dtype=np.int64)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int64 [documents]."""
        return np.diff(self.starts, append=len(self))

    def part(self, first: int, last: int) -> "Tokens":
        """Those from a place of the row to before another one. A document that is cut begins there anew."""
        begins = self._ends - [len(shard) for shard in self.shards]
        shards = [
            shard[max(0, first - begin) : last - begin]
            for shard, begin, end in zip(self.shards, begins, self._ends, strict=True)
            if begin < last and end > first
        ]
        inside = self.starts[slice(*np.searchsorted(self.starts, (first, last)))]
        inside = inside - first if first else inside  # of many millions no copy
        if not len(inside) or inside[0] > 0:
            inside = np.concatenate([[0], inside])
        check = self.check
        moved = None if check is None else lambda found, places: check(found, places + first)
        return Tokens(shards, inside, f"{self.identity}[{first}:{last}]", moved)

    def at(self, places: np.ndarray) -> np.ndarray:
        """The token numbers at some places of the whole row, int64 of the same shape."""
        return self.runs(places.reshape(-1), np.ones(places.size, np.int64)).reshape(places.shape)

    def runs(self, first: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """The token numbers of some runs of the whole row, one run after another.

        Args:
            first: place of the first token of each, int64 [runs].
            lengths: tokens of each, int64 [runs].

        Returns:
            int64 [lengths.sum()].
        """
        found = self._looked_up(first, lengths)
        if self.check is not None:
            self.check(found, expanded(first, lengths))
        return found

    def _looked_up(self, first: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        if len(self.shards) == 1:
            return self.shards[0][expanded(first, lengths)].astype(np.int64)
        shard_of = np.searchsorted(self._ends, first, side="right")
        here = self._ends[shard_of] - first
        if (lengths > here).any():  # a run goes on in the next shard: it is cut in two
            cut = np.stack([np.minimum(lengths, here), np.maximum(lengths - here, 0)], 1)
            return self._looked_up(np.stack([first, first + here], 1)[cut > 0], cut[cut > 0])
        order = np.argsort(shard_of, kind="stable")  # what is in one shard is looked up at once
        shard_of, first, sizes = shard_of[order], first[order], lengths[order]
        slots = expanded((np.cumsum(lengths) - lengths)[order], sizes)
        places = expanded(first, sizes)
        cuts = np.flatnonzero(np.diff(shard_of, prepend=-1))  # the first run of each shard
        ends = [*(np.cumsum(sizes)[cuts[1:] - 1]).tolist(), len(places)]
        found, start = np.empty(len(places), np.int64), 0
        for number, end in zip(shard_of[cuts].tolist(), ends, strict=True):
            begins = self._ends[number] - len(self.shards[number])
            found[slots[start:end]] = self.shards[number][places[start:end] - begins]
            start = end
        return found


def expanded(first: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Ranges one after another: `counts[i]` numbers from `first[i]` on, int64 [counts.sum()]."""
    ends = np.cumsum(counts)
    return np.repeat(first - ends + counts, counts) + np.arange(ends[-1] if len(ends) else 0)
