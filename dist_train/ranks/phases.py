"""Where the main thread is: for the watchdog, and for how a step's time is shared out."""

import time
from typing import TYPE_CHECKING

from dist_train.ranks.clock import Clock

if TYPE_CHECKING:
    from dist_train.ranks.journal import Journal

NAMES = ("start", "data", "forward", "backward", "audit", "optimizer", "reduce", "evaluate", "checkpoint")


class Phases:
    """The phase of a run, as the loop says it. A call takes a fraction of a microsecond and asks no device: on an
    accelerator, the times are those of launching."""

    def __init__(self) -> None:
        self.name = "start"
        self.step = 0
        self.clock = Clock()
        self.since = self.moved = time.perf_counter()
        self.journal: Journal | None = None  # of the layers, where a backend shares them out
        self.seconds = dict.fromkeys(NAMES, 0.0)

    def __call__(self, name: str) -> None:
        """The main thread goes over to a phase."""
        now = time.perf_counter()
        self.seconds[self.name] += now - self.since
        self.name, self.since = name, now

    def progressed(self, step: int | None = None) -> None:
        """A step has ended, or a part of an evaluation or of a save: what the watchdog's time-out counts from."""
        self.moved = self.clock.now()
        if step is not None:
            self.step = step
            if self.journal is not None:
                self.journal.turn(step)

    def take(self) -> dict[str, float]:
        """Seconds in each phase since the last call."""
        self(self.name)
        taken, self.seconds = self.seconds, dict.fromkeys(NAMES, 0.0)
        return taken
