"""Where in a forward a draw is made, as a number that is the same in every backend, compiled or not, and when a part of
the forward is computed again for its backward.

A place is counted in a frame: the model's, or that of a layer that is compiled by itself somewhere. Each draw, and each
frame within it, takes the next number of its frame, and gets keys made of the frame's and that number. So a layer needs
to know nothing of what came before it but the keys that it is handed, and a graph compiled of it fits at every call.

Activations that are computed again (torch.utils.checkpoint) must be dropped as before. What does that with torch's own
generator keeps its state and puts it back, and our count goes along: it is the upper half of the generator's seed.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

from dist_train.models.draw_bits import ODD, mixed

MARK = 0x5EED << 15  # in the upper half of a seed of ours, above the count


class Kind(NamedTuple):
    """Of a draw.

    Args:
        samples: where they are in what is drawn for.
        shape: of what belongs to a sample, in the whole model at the first samples.
        split: the dimension of it of which each tensor rank has a part; None where all have the same.
    """

    samples: int
    shape: tuple[int, ...]
    split: int | None = None


class Frame:
    """A part of a forward.

    Args:
        keys: of the samples, and the one that they share, int64 [n + 1]; None until somebody asks for them.
        outer: the frame that was left for it.
        module: whose forward it is.
        kinds: of its draws, by their number.
    """

    def __init__(
        self, keys: torch.Tensor | None, outer: "Frame | None" = None, module: nn.Module | None = None,
        kinds: dict[int, Kind] | None = None,
    ):  # fmt: skip
        self.keys, self.outer, self.module, self.kinds = keys, outer, module, {} if kinds is None else kinds
        self.count = 0


class Mark(NamedTuple):
    """A place that a forward has come to: the frame, its count, and whether heads are folded there."""

    frame: Frame | None
    count: int
    folds: bool


class Now:
    """The forward under way."""

    frame: Frame | None = None  # outside of a forward that is trained on
    again = False  # from a mark
    looks = False  # at the first samples, to see where they are in what is drawn for
    folds = False  # within attention, whose heads lie with the samples in one dimension
    past: list[tuple[Frame, int]]  # the frame and its count at each event so far
    make: Callable[[], torch.Tensor]
    own = 0  # the lower half of the seeds, for a model that draws from torch's generator itself
    part = (0, 1)  # this rank's of the layers, and of how many ranks that split them

    def begin(self, make: Callable[[], torch.Tensor], own: int, part: tuple[int, int]) -> None:
        """A forward of other samples, whose keys `make` gives."""
        self.frame, self.make = Frame(None), make
        self.past, self.own, self.part = [(self.frame, 0)], own, part
        self._tell(0)

    def end(self) -> None:
        """Of forward and backward."""
        self.frame = None

    def next(self) -> tuple[torch.Tensor, dict[int, Kind], int]:
        """The keys of the place that comes next; the kinds of its frame, and its number there."""
        frame = self.frame
        assert frame is not None
        count = frame.count
        if torch.compiler.is_compiling():
            frame.count = count + 1
        else:
            at = self._heard()
            if at == len(self.past) - 1:
                frame.count = count + 1
                self.past.append((frame, frame.count))
            elif self.again:
                frame.count = count + 1
            else:
                frame, count = self.past[at]
            self._tell(at + 1)
        keys = self.ask() if frame.keys is None else frame.keys
        return mixed(keys + ODD * (count + 1)), frame.kinds, count

    def ask(self) -> torch.Tensor:
        """Makes the keys of the model's frame."""
        self.past[0][0].keys = keys = self.make()
        return keys

    def enter(self, module: nn.Module, kinds: dict[int, Kind]) -> None:
        """A frame begins."""
        keys, _, _ = self.next()
        self.frame = Frame(keys, self.frame, module, kinds)
        if not torch.compiler.is_compiling():
            self._happened()

    def leave(self) -> None:
        """The frame ends."""
        assert self.frame is not None
        self.frame = self.frame.outer
        if not torch.compiler.is_compiling():
            self._happened()

    def mark(self) -> Mark:
        """The place that the forward has come to."""
        return Mark(self.frame, 0 if self.frame is None else self.frame.count, self.folds)

    @contextmanager
    def from_(self, mark: Mark) -> Iterator[None]:
        """Around what is computed again from a place on: it counts as it did, also where it is compiled, and also where
        it breaks off in the middle of a layer, as nothing after that is needed. What goes on after it counts on."""
        before, again = self.mark(), self.again
        left = 0 if mark.frame is None else mark.frame.count
        self._stand(mark)
        self.again = True
        try:
            yield
        finally:
            if mark.frame is not None:
                mark.frame.count = left
            self._stand(before)
            self.again = again

    def _stand(self, mark: Mark) -> None:
        self.frame, self.folds = mark.frame, mark.folds
        if mark.frame is not None:
            mark.frame.count = mark.count

    def drawn(self) -> set[nn.Module]:
        """The modules of the frames in which the last forward drew."""
        frames = {frame for frame, _ in self.past}
        within = Counter(frame.outer for frame in frames)
        found = set()
        for frame in frames:
            if frame.count > within[frame]:
                while frame is not None and frame.module is not None:
                    found.add(frame.module)
                    frame = frame.outer
        return found

    def _happened(self) -> None:
        at = self._heard()
        if at == len(self.past) - 1:
            self.past.append((self.frame, self.frame.count))
        self._tell(at + 1)

    def _heard(self) -> int:
        """The number of events before, which is not that of all where they are gone through again."""
        at = (torch.default_generator.initial_seed() >> 32) - MARK
        newest = len(self.past) - 1
        return at if 0 <= at < newest else newest  # a model may have seeded it anew

    def _tell(self, at: int) -> None:
        torch.default_generator.manual_seed((MARK + at) << 32 | (self.own + at * ODD) & 0xFFFFFFFF)


now = Now()
