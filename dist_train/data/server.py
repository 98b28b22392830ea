"""Imported by the process that workers are forked from, and there alone: how it lives and ends."""

import atexit
import signal

from dist_train.data.workers import REQUESTS, remove_sockets

# Until a worker ignores them: torch has it end by SIGTERM before it can say so.
signal.pthread_sigmask(signal.SIG_BLOCK, REQUESTS)
atexit.register(remove_sockets)
