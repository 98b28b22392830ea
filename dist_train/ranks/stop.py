"""Requests that one rank may make and all follow: to save, and to stop. A signal only sets a flag; the ranks agree on
it together, so that all do the same after the same step."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

from dist_train.ranks import ending
from dist_train.ranks.clock import Clock

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# A second SIGINT ends at once if it comes this soon. One that comes sooner than ECHO_S is the same key: the terminal
# sends it to all processes, and a launcher passes it on.
IMPATIENT_S, ECHO_S = 2.0, 0.5
OUT_OF_TIME, ORPHANED = -1.0, -2.0
REASONS = {OUT_OF_TIME: "train.max_time_s", ORPHANED: "the end of its launcher"}


class Requests:
    """What this rank asks of all, and what all have agreed on.

    Args:
        max_time_s: after which this rank asks all to stop; None for any time.
        clock: by which they pass.
        quits: a second SIGINT ends the process at once; else it raises KeyboardInterrupt.

    Attributes:
        saving: whether this rank asks to save.
        stopping: whether it asks to stop: the number of a signal, OUT_OF_TIME or ORPHANED; 0 is no.
        save_agreed: all save after this step.
        stop_agreed: all stop after this step: who asked, and why.
    """

    def __init__(self, max_time_s: float | None = None, clock: Clock | None = None, quits: bool = True) -> None:
        self.clock, self.quits = clock or Clock(), quits
        self.deadline = None if max_time_s is None else self.clock.now() + max_time_s
        self.saving = False
        self.stopping = 0.0
        self.save_agreed = False
        self.stop_agreed: str | None = None

    def asked(self) -> list[float]:
        """What `settle` takes of every rank."""
        if self.deadline is not None and self.clock.now() > self.deadline:
            self.stopping = self.stopping or OUT_OF_TIME
        return [float(self.saving), self.stopping]

    def settle(self, by_rank: list[list[float]]) -> None:
        """Takes every rank's requests; afterwards the same is agreed on all."""
        self.save_agreed = any(saving for saving, _ in by_rank)
        for rank, (_, stopping) in enumerate(by_rank):
            if stopping and self.stop_agreed is None:
                why = REASONS.get(stopping) or signal.Signals(int(stopping)).name
                self.stop_agreed = f"{why} on rank {rank}"

    def orphaned(self) -> None:
        """The launcher of this rank is gone."""
        self.stopping = self.stopping or ORPHANED

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Takes the signals, in the main thread of a process."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._received) for number in SIGNALS}
        self.interrupted_at = -IMPATIENT_S
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _received(self, number: int, _: FrameType | None) -> None:
        self.stopping = self.stopping or float(number)
        if number == signal.SIGINT:
            since = time.monotonic() - self.interrupted_at
            if ECHO_S < since < IMPATIENT_S and not self.quits:
                raise KeyboardInterrupt
            if ECHO_S < since < IMPATIENT_S:
                os.write(2, b"interrupted twice: ended without saving\n")
                os._exit(ending.INTERRUPTED)
            if since >= IMPATIENT_S:
                self.interrupted_at = time.monotonic()
