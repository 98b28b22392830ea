"""Which pieces of documents share a window: one plan, a pure function of the documents' lengths and the block."""

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np

from dist_train.data.tokens import expanded

REST = -1  # which run of a document a piece is, of the piece behind its runs


@dataclass(frozen=True)
class Packing:
    """Best fit, decreasing: the longest piece first, each into the fullest window that has room for it.

    A document of L tokens has L - 1 targets. Its runs of `block` targets fill windows of their own, which come first;
    what remains of it is one piece, which shares a window with others. Source: Johnson, "Near-optimal bin packing
    algorithms", 1973.

    Pieces of one length are put down together, so a plan takes O(documents) for a sort and O(block log block) for the
    rest. Windows with pieces of the same lengths are a class; three numbers of a class say where they are. So a plan
    holds 4 bytes a document (8 from 2**32 documents on), and 16 more of each that is longer than the block.

    Args:
        targets: of all documents.
        windows: of all.
        runs: of `block` targets, in all documents.
        long: numbers of the documents with runs, int64 [long].
        first_run: of each of these, int64 [long].
        rests: which documents the other pieces are of, in the order of their windows: [rests].
        first_window: of each class, int64 [classes]; the first class is the windows with a run.
        first_piece: of each class, runs first, int64 [classes].
        each: pieces of a window of each class, int64 [classes].
    """

    targets: int
    windows: int
    runs: int
    long: np.ndarray
    first_run: np.ndarray
    rests: np.ndarray
    first_window: np.ndarray
    first_piece: np.ndarray
    each: np.ndarray

    @classmethod
    def of(cls, lengths: np.ndarray, block: int) -> "Packing":
        """The plan for documents of these lengths in tokens, int64 [documents]."""
        targets = np.maximum(lengths - 1, 0)
        total = int(targets.sum())
        runs = targets // block
        short = (targets - runs * block).astype(np.uint16 if block <= 1 << 16 else np.int64)
        del targets
        long = np.flatnonzero(runs)
        of_long = runs[long]
        del runs
        counts = np.bincount(short, minlength=block)
        # The shortest first, those of one length by number, none of length 0. 16 bits are sorted by radix.
        order = np.argsort(short, kind="stable")[counts[0] :].astype(np.uint32 if len(short) < 1 << 32 else np.int64)
        del short
        classes = _best_fit(counts)
        rests, at = np.empty_like(order), 0
        for bins in classes:
            rows = rests[at : at + bins.count * bins.each].reshape(bins.count, bins.each)
            column = 0
            for first, width in bins.held:
                rows[:, column : column + width] = order[first : first + bins.count * width].reshape(-1, width)
                column += width
            at += rows.size
        assert at == len(rests)
        sizes = np.array([int(of_long.sum()), *(bins.count for bins in classes)])
        each = np.array([1, *(bins.each for bins in classes)])
        return cls(
            targets=total,
            windows=int(sizes.sum()),
            runs=int(sizes[0]),
            long=long,
            first_run=np.cumsum(of_long) - of_long,
            rests=rests,
            first_window=np.cumsum(sizes) - sizes,
            first_piece=np.cumsum(sizes * each) - sizes * each,
            each=each,
        )

    def pieces(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What some windows hold.

        Args:
            numbers: of the windows, int64 [batch].

        Returns:
            Of each piece, window by window, the number of its document, int64 [pieces], and which run of the document
            it is, or REST, int64 [pieces]; and how many pieces each window has, int64 [batch].
        """
        kind = np.searchsorted(self.first_window, numbers, side="right") - 1
        counts = self.each[kind]
        places = expanded(self.first_piece[kind] + (numbers - self.first_window[kind]) * counts, counts)
        documents, runs = np.empty_like(places), np.full_like(places, REST)
        rest = places >= self.runs
        documents[rest] = self.rests[places[rest] - self.runs]
        if not rest.all():
            run = places[~rest]
            of_long = np.searchsorted(self.first_run, run, side="right") - 1
            documents[~rest] = self.long[of_long]
            runs[~rest] = run - self.first_run[of_long]
        return documents, runs, counts


@dataclass(frozen=True)
class _Bins:
    """Windows that hold pieces of the same lengths.

    Args:
        count: of the windows.
        free: targets that each has room for.
        held: (first, each): window i holds the pieces first + i * each up to first + (i + 1) * each, in the order by
            length.
    """

    count: int
    free: int
    held: tuple[tuple[int, int], ...] = ()

    @property
    def each(self) -> int:
        return sum(each for _, each in self.held)

    def split(self, count: int) -> tuple["_Bins", "_Bins"]:
        """The first so many windows, and the others."""
        behind = tuple((first + count * each, each) for first, each in self.held)
        return _Bins(count, self.free, self.held), _Bins(self.count - count, self.free, behind)

    def holding(self, first: int, each: int, length: int) -> "_Bins":
        """With so many more pieces of a length in each window."""
        return _Bins(self.count, self.free - each * length, (*self.held, (first, each)))


def _best_fit(counts: np.ndarray) -> list[_Bins]:
    """Windows for pieces that are numbered from the shortest to the longest.

    Pieces of a length s that go into a window with room for f go on going into it until there is no room for another:
    it stays the fullest with room. So f // s of them do, in all windows with that room alike, and f % s < f / 2 is
    left, which can happen to a class log(block) times. What splits a class is the last of the pieces of a length.

    Args:
        counts: how many pieces there are of each length below the block, int64 [block].
    """
    block = len(counts)
    ends = np.cumsum(counts) - counts[0]  # pieces up to each length
    open_bins: dict[int, list[_Bins]] = {}
    rooms: list[int] = []  # its keys, rising
    full: list[_Bins] = []

    def put(bins: _Bins) -> None:
        if bins.count == 0:
            return
        if bins.free == 0:
            full.append(bins)
            return
        if bins.free not in open_bins:
            open_bins[bins.free] = []
            insort(rooms, bins.free)
        open_bins[bins.free].append(bins)

    for length in range(block - 1, 0, -1):
        left = int(counts[length])
        first = int(ends[length]) - left
        while left:
            at = bisect_left(rooms, length)
            if at == len(rooms):
                bins = _Bins(-(-left // (block // length)), block)
            else:
                bins = open_bins[rooms[at]].pop()
                if not open_bins[bins.free]:
                    del open_bins[rooms.pop(at)]
            each = bins.free // length
            filled, bins = bins.split(min(bins.count, left // each))
            put(filled.holding(first, each, length))
            first, left = first + filled.count * each, left - filled.count * each
            if bins.count and left:  # fewer than another window has room for
                last, bins = bins.split(1)
                put(last.holding(first, left, length))
                left = 0
            put(bins)
    return [*full, *(bins for room in rooms for bins in open_bins[room])]
