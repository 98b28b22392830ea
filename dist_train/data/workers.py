"""Processes that read a data set from files: how they start, how they end, and what can keep them from working."""

import contextlib
import errno
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from multiprocessing import connection, forkserver, resource_tracker
from multiprocessing.context import BaseContext

from dist_train.data.sets import kinds_of
from dist_train.errors import ConfigError

SHM = "/dev/shm"
RUN = "DIST_TRAIN_WORKERS_OF"  # the process that the server works for
PREFIX = "pymp-"  # of the folders that multiprocessing makes for its sockets
# They ask a run to stop, or to save.
REQUESTS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
# Bytes of a TMPDIR in which multiprocessing's sockets still have a path that the system takes: 104 on some, less
# "/pymp-XXXXXXXX/listener-XXXXXXXX" and a NUL.
LONGEST_TMPDIR = 70
SHORT_FOLDERS = ("/tmp", "/var/tmp", SHM)
NO_SHM = ("shared memory(shm) for file </torch_", "out of shared memory", "write to file </torch_")  # torch's words


def context(dataset: object, count: int) -> BaseContext:
    """How workers start: forked from a small server process that has torch imported and nothing running.

    Forking from this process could hang them: gloo's and a device's threads hold locks that no one in the fork gives
    back. Spawning imports torch again for every worker of every epoch, which takes seconds. The server takes those
    seconds once, then an epoch's workers start as fast as by fork (0.1 s for 2), so none are kept between epochs: they
    end with their epoch, however it ends, and know no state but their own epoch's.

    Args:
        dataset: what they read.
        count: of the workers.

    Raises:
        ConfigError: they cannot be started here.
    """
    _sockets()
    found = multiprocessing.get_context("forkserver")
    imported = {
        "torchvision.transforms.v2",
        "torchvision.datasets",
    } & sys.modules.keys()  # slow, and most transforms need it
    # What every worker imports anyway, the script that was started among it.
    reads = ["__main__", "dist_train.data.reader", *(kind.__module__ for kind in kinds_of(dataset))]
    found.set_forkserver_preload(["dist_train.data.server", *reads, *imported, "dist_train.data.served"])
    try:
        with _environment():
            resource_tracker.ensure_running()
            [found.Queue() for _ in range(count + 4)]  # as many semaphores as a loader makes, which fails less cleanly
            forkserver.ensure_running()
    except OSError as error:
        raise not_started(error, count) from error
    return found


@contextlib.contextmanager
def ended() -> Iterator[None]:
    """Ends the processes that were started inside and are there still. Those are at a sample that takes long: they
    ignore what a loader ends them with."""
    before = set(multiprocessing.active_children())
    try:
        yield
    finally:
        for process in set(multiprocessing.active_children()) - before:
            process.kill()


def begin(_: int) -> None:
    """The first that a worker does. It ends when the process that wants its samples is gone, however that ended, and by
    no signal before: those that ask a run to stop go to all of its processes, and it still wants samples then."""
    ignore_requests()
    folder = _sockets_folder()
    if folder:  # else it makes one of its own for its sockets, and leaves it when it is killed
        multiprocessing.current_process()._config["tempdir"] = folder  # type: ignore[attr-defined]
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    connection.wait([sentinel])  # a pipe, whose other end is that process's alone: no thread of it matters
    remove_sockets()
    os.kill(os.getpid(), signal.SIGKILL)


def remove_sockets() -> None:
    """Removes the folder of the server's socket, which a run that ends by os._exit, or is killed, would leave. In the
    server, or in a process that was forked from it."""
    folder = _sockets_folder()
    if folder:
        shutil.rmtree(folder, ignore_errors=True)


def _sockets_folder() -> str | None:
    server = forkserver._forkserver  # type: ignore[attr-defined]
    folder = os.path.dirname(os.fsdecode(server._forkserver_address or ""))
    return folder if os.path.basename(folder).startswith(PREFIX) else None


def ignore_requests() -> None:
    """Signals that a terminal, a launcher or a batch system sends to all processes of a run are for its ranks."""
    for request in REQUESTS:
        signal.signal(request, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, REQUESTS)


def not_started(error: OSError, count: int) -> ConfigError:
    """What keeps workers from starting, in one line."""
    if error.errno == errno.ENOSPC:  # of a semaphore
        return _too_little_memory(count)
    return ConfigError(f"data.workers: got {count}, but they cannot be started: {error}; write --data.workers 0")


def not_handed_over(error: RuntimeError, count: int) -> ConfigError | None:
    """What keeps workers from handing over samples, in one line; None where the error is another's."""
    return _too_little_memory(count) if no_room(error) else None


def no_room(error: Exception) -> bool:
    """Whether torch says that it has no shared memory."""
    return any(sign in str(error) for sign in NO_SHM)


def _too_little_memory(count: int) -> ConfigError:
    try:
        free = f"{shutil.disk_usage(SHM).free / 1e6:,.0f} MB free"
    except OSError as error:
        free = str(error.strerror)
    return ConfigError(
        f"data.workers: got {count}, which hand over samples in {SHM} ({free}), expected enough room there; give a "
        f"container more (docker run --shm-size 2g), or write --data.workers 0"
    )


def _sockets() -> None:
    """Where the path of TMPDIR is too long for sockets in it, multiprocessing makes them in a folder with a short one.

    Raises:
        ConfigError: there is none.
    """
    config = multiprocessing.current_process()._config  # type: ignore[attr-defined]  (its workers inherit it)
    if not os.path.isdir(config.get("tempdir") or ""):
        config["tempdir"] = None  # there is none yet, or it is gone with a server that ended
    if config["tempdir"] is not None or len(os.fsencode(tempfile.gettempdir())) <= LONGEST_TMPDIR:
        return
    for folder in SHORT_FOLDERS:
        with contextlib.suppress(OSError):
            config["tempdir"] = tempfile.mkdtemp(prefix=PREFIX, dir=folder)
            return
    raise ConfigError(
        f"data.workers: TMPDIR is {tempfile.gettempdir()}, expected a path of at most {LONGEST_TMPDIR} bytes, for "
        f"sockets in it; export TMPDIR to a shorter one, or write --data.workers 0"
    )


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """Of the two processes that the standard library keeps for workers. The one that removes what a killed run leaves
    does not tell of it: a run always ends without such cleaning, and its last line is to be its own."""
    quiet = ",".join(filter(None, (os.environ.get("PYTHONWARNINGS"), "ignore:resource_tracker")))
    changed = {"PYTHONWARNINGS": quiet, RUN: str(os.getpid())}
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
