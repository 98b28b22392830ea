"""Imported by the process that workers are forked from, first of all and there alone."""

import os
import signal
import threading

from dist_train.data.workers import REQUESTS, RUN

LOOKS_EVERY_S = 0.25
imported = threading.Event()


def watch() -> None:
    """Ends this process with the run while it imports, which takes seconds in which it listens to nobody."""
    while not imported.wait(LOOKS_EVERY_S):
        if os.getppid() != int(os.environ[RUN]):
            os._exit(1)


# Until a worker ignores them: torch has it end by SIGTERM before it can say so.
signal.pthread_sigmask(signal.SIG_BLOCK, REQUESTS)
thread = threading.Thread(target=watch, daemon=True)
thread.start()
