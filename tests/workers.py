"""Real processes for distributed tests, kept alive between them, and forked from one that has imported the libraries.

`run_ranks(fn, world_size, *args)` calls `fn(*args)` in that many processes of one gloo group, and returns what each
gave. `fn` is a function of a test module, found again by name in the workers.
"""

import faulthandler
import importlib
import os
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Client, Connection, Listener, wait
from pathlib import Path
from typing import Any

from zygote import LIBRARIES, Zygote

# The process that they are forked from.
PARENT = Zygote(*LIBRARIES)


class RankError(AssertionError):
    """A rank raised, died or did not answer in time; the message has its traceback or its stack."""


class Workers:
    """The processes of one group, which wait for work. The group stays as long as they do: DeepSpeed keeps what it
    has made of it. After a failure they are killed, and the next test gets new ones."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.processes: list[int] = []
        self.links: list[Connection] = []
        self.folder = ""

    def run(self, fn: Callable, args: tuple, timeout_s: float) -> list[Any]:
        """What `fn(*args)` returns, by rank. Raises RankError."""
        if not self.processes:
            self._start()
        for link in self.links:
            link.send((fn.__module__, fn.__qualname__, args))
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + timeout_s
        while len(answers) < self.world_size:
            pending = {link: rank for rank, link in enumerate(self.links) if rank not in answers}
            ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                self._give_up(f"no answer within {timeout_s} s", sorted(pending.values()))
            for link in ready:
                rank = pending[link]
                try:
                    ok, answer = link.recv()
                except EOFError:
                    raise RankError(f"rank {rank} died with code {self.close()[rank]}") from None
                if not ok:
                    self._give_up(f"rank {rank} of {self.world_size} raised\n{answer}", [])
                answers[rank] = answer
        return [answers[rank] for rank in range(self.world_size)]

    def _start(self) -> None:
        self.folder = tempfile.mkdtemp(prefix="ranks")
        with Listener(family="AF_UNIX") as listener:
            each = [(listener.address, self.folder, self.world_size, rank) for rank in range(self.world_size)]
            self.processes = PARENT.fork("workers", "_work", *each)
            by_rank = dict(sorted(_greet(listener) for _ in self.processes))  # they come in any order
            self.links = list(by_rank.values())

    def _give_up(self, reason: str, silent: list[int]) -> None:
        for rank in silent:
            os.kill(self.processes[rank], signal.SIGUSR1)  # its stack, written by faulthandler
        stacks = ""
        if silent:
            time.sleep(0.5)
            stacks = "".join(
                f"\nrank {rank} stands at\n{(Path(self.folder) / f'stack{rank}').read_text()}" for rank in silent
            )
        self.close()
        raise RankError(reason + stacks)

    def close(self) -> list[int]:
        """Kills the processes, and returns their exit codes."""
        for pid in self.processes:
            os.kill(pid, signal.SIGKILL)  # its id is its own until it is waited for
        codes = [PARENT.wait(pid) for pid in self.processes]
        for link in self.links:
            link.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.processes, self.links = [], []
        return codes


def _greet(listener: Listener) -> tuple[int, Connection]:
    link = listener.accept()
    return link.recv(), link


WORKERS = {world_size: Workers(world_size) for world_size in (1, 2, 3, 4, 8)}


def run_ranks(fn: Callable, world_size: int, *args: Any, timeout_s: float = 120) -> list[Any]:
    """What `fn(*args)` returns in each of `world_size` real processes with a gloo group, by rank."""
    return WORKERS[world_size].run(fn, args, timeout_s)


def _work(address: str, folder: str, world_size: int, rank: int) -> None:
    import torch.distributed as torch_dist

    from dist_train.ranks import dist

    stack = (Path(folder) / f"stack{rank}").open("w")
    faulthandler.register(signal.SIGUSR1, stack, all_threads=False)
    link = Client(address, family="AF_UNIX")
    link.send(rank)
    # A file as the store: no port is taken that another program may want.
    torch_dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    while True:
        try:
            module, name, args = link.recv()
        except EOFError:  # the tests' process is gone
            return
        try:
            answer = getattr(importlib.import_module(module), name)(*args)
            torch_dist.barrier()
            dist._data = None  # the next test may have other meshes
        except BaseException:
            dist._data = None
            link.send((False, traceback.format_exc()))
        else:
            link.send((True, answer))
