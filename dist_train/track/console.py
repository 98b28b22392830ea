"""What people see while a run goes: plain lines. On a terminal it is the bar instead, see `bar`."""

import os
import sys
from collections.abc import Callable
from typing import Literal

from dist_train.loop.meter import Metrics
from dist_train.track.base import Summary


def shows_bar(progress: Literal["auto", "bar", "lines"]) -> bool:
    """Whether there is a bar: on a terminal that can move its cursor, if the config does not say."""
    if progress != "auto":
        return progress == "bar"
    # Open MPI gives each process a terminal of its own, also where its own output is a file.
    moves = os.environ.get("TERM", "dumb") != "dumb" and "OMPI_COMM_WORLD_RANK" not in os.environ
    return sys.stdout.isatty() and moves


class Lines:
    """A line for each that there is to say.

    Args:
        mark: puts the rank before the lines of a text.
    """

    name = "the console"

    def __init__(self, mark: Callable[[str], str]):
        self.mark = mark

    def say(self, text: str) -> None:
        """Lines for people."""
        print(self.mark(text), flush=True)

    def log(self, metrics: Metrics, line: str | None) -> None:
        """See Tracker."""
        if line is not None:
            self.say(line)

    def finish(self, summary: Summary) -> None:
        """See Tracker."""

    def close(self, code: int) -> None:
        """See Tracker."""
