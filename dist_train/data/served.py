"""Imported by the process that workers are forked from, last of all and there alone."""

import atexit
import os

from dist_train.data import server
from dist_train.data.workers import remove_sockets


def end() -> None:
    """Ends this process when the run and its workers are gone: at once, where all that was imported would take its time
    to end, which is seconds on a busy machine."""
    remove_sockets()
    os._exit(0)


atexit.register(end)  # after all others, and so called first
server.imported.set()
server.thread.join()  # it would not be safe to fork beside
