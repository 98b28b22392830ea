"""A second process on this machine, so that a process alone measures the link that two ranks here would have."""

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dist_train.doctor.peers import Peers

JOIN_S = 15.0
Work = Callable[["Peers"], None]


@contextlib.contextmanager
def second_process(work: Work) -> Iterator[Connection]:
    """Forks a process that waits for a port, and then does `work` as rank 1 of 2. To be called before torch has
    started threads. The process is gone at the end of the context."""
    here, there = multiprocessing.Pipe()
    pid = os.fork()
    if not pid:
        try:
            here.close()
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            _second(there, work)
        finally:
            os._exit(0)
    there.close()
    try:
        yield here
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        here.close()


def _second(link: Connection, work: Work) -> None:
    import torch.distributed as torch_dist

    from dist_train.doctor import link as _  # noqa: F401  (torch is imported while the other process checks the rest)

    port = link.recv()
    store = torch_dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=JOIN_S))
    with joined(store, 1) as peers:
        work(peers)


@contextlib.contextmanager
def as_first(link: Connection) -> Iterator["Peers"]:
    """Joins with the second process, as rank 0."""
    import torch.distributed as torch_dist

    store = torch_dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=JOIN_S)
    )
    link.send(store.port)
    with joined(store, 0) as peers:
        yield peers


@contextlib.contextmanager
def joined(store, rank: int) -> Iterator["Peers"]:
    """A gloo group of two."""
    import torch
    import torch.distributed as torch_dist

    from dist_train.doctor.peers import Peers

    limit = timedelta(seconds=JOIN_S)
    torch_dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=limit)
    yield Peers(rank, 2, 1, torch.device("cpu"), torch_dist.group.WORLD)
    torch_dist.destroy_process_group()
