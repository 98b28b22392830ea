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
        found = np.empty(places.shape, np.int64)
        if len(self.shards) == 1:
            found[...] = self.shards[0][places]
        else:
            shard_of = np.searchsorted(self._ends, places, side="right")
            for number in np.unique(shard_of):
                here = shard_of == number
                first = self._ends[number] - len(self.shards[number])
                found[here] = self.shards[number][places[here] - first]
        if self.check is not None:
            self.check(found, places)
        return found
