"""How lines are written: which rank each is of, where there are several (the others than rank 0 are silent unless they
fail), and what a terminal cannot show."""

import contextlib
import io
import logging
import sys
import warnings

from dist_train.ranks.launcher import Launcher


def prefix(rank: int, world_size: int) -> str:
    """What the lines of a rank start with; nothing in a process alone."""
    return f"[rank {rank}] " if world_size > 1 else ""


def marked(text: str, rank: int, world_size: int) -> str:
    """Lines with the rank before each."""
    return "\n".join(prefix(rank, world_size) + line for line in text.split("\n"))


def escape_unprintable() -> None:
    """What the terminal's encoding does not have, such as a name in another script, is written as an escape, where it
    would be an error in the middle of a run."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError):  # a descriptor that was made another kind of file meanwhile
                stream.reconfigure(errors="backslashreplace")


def mark_warnings(launcher: Launcher) -> None:
    """What Python's `warnings` and `logging` say of themselves carries the rank as well, in a process among several."""
    if launcher.world_size == 1:
        return
    place = launcher.rank, launcher.world_size

    def show(message, category, filename, lineno, file=None, line=None) -> None:
        if launcher.rank == 0:
            text = warnings.formatwarning(message, category, filename, lineno, line)
            (file or sys.stderr).write(marked(text.rstrip("\n"), *place) + "\n")

    warnings.showwarning = show
    assert logging.lastResort is not None
    logging.lastResort.setFormatter(logging.Formatter(prefix(*place) + "%(message)s"))
    logging.lastResort.setLevel(logging.ERROR if launcher.rank else logging.WARNING)
