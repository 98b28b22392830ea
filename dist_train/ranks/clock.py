"""Time in which this process ran: what it was suspended for (SIGSTOP, a job put aside, a closed lid) does not count."""

import time

TICK_S = 0.25
SUSPENDED_S = 2.0  # a thread that is busy or starved comes back sooner


class Clock:
    """Seconds, from any start. A thread ticks every TICK_S; a gap between two ticks is time in which none ran. Before
    the first tick and after `rest` all time counts."""

    def __init__(self) -> None:
        self._seen: tuple[float | None, float] = None, 0.0  # the last tick, and seconds suspended until then

    def now(self) -> float:
        """The time, without that of suspensions."""
        now = time.perf_counter()
        return now - self._suspended(now)

    def tick(self) -> None:
        """By the thread that ticks."""
        now = time.perf_counter()
        self._seen = now, self._suspended(now)

    def rest(self) -> None:
        """Nobody ticks from here on."""
        now = time.perf_counter()
        self._seen = None, self._suspended(now)

    def _suspended(self, now: float) -> float:
        ticked, suspended = self._seen
        gap = 0.0 if ticked is None else now - ticked
        return suspended + (gap - TICK_S if gap > SUSPENDED_S else 0.0)
