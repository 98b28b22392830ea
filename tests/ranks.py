"""Real processes for distributed tests, kept alive between them: starting four costs seconds, a test then none.

`run_ranks(fn, world_size, *args)` calls `fn(*args)` in that many processes, each with a gloo group of the right size,
and returns what each gave. `fn` is a function of a test module, found again by name in the workers.
"""

import faulthandler
import importlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Client, Connection, Listener, wait
from pathlib import Path
from typing import Any

MOST_RANKS = 4


class RankError(AssertionError):
    """A rank raised, died or did not answer in time; the message has its traceback or its stack."""


class Workers:
    """Processes that wait for work. After a failure they are killed, and the next test gets new ones."""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen] = []
        self.links: list[Connection] = []
        self.folder = ""
        self.count = itertools.count()

    def run(self, fn: Callable, world_size: int, args: tuple, timeout_s: float) -> list[Any]:
        """What `fn(*args)` returns in each of `world_size` processes, by rank. Raises RankError."""
        if not self.processes:
            self._start()
        # A store of its own for each group: nothing of an earlier test is left in it, and no port is taken.
        store = Path(self.folder) / f"store{next(self.count)}"
        for rank, link in enumerate(self.links[:world_size]):
            link.send((fn.__module__, fn.__qualname__, args, rank, world_size, str(store)))
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + timeout_s
        while len(answers) < world_size:
            pending = {self.links[r]: r for r in range(world_size) if r not in answers}
            ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                self._give_up(f"no answer within {timeout_s} s", sorted(pending.values()))
            for link in ready:
                rank = pending[link]
                try:
                    ok, answer = link.recv()
                except EOFError:
                    self._give_up(f"rank {rank} died with code {self.processes[rank].wait()}", [])
                if not ok:
                    self._give_up(f"rank {rank} of {world_size} raised\n{answer}", [])
                answers[rank] = answer
        return [answers[rank] for rank in range(world_size)]

    def _start(self) -> None:
        self.folder = tempfile.mkdtemp(prefix="ranks")
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        with Listener(family="AF_UNIX") as listener:
            self.processes = [
                subprocess.Popen([sys.executable, __file__, listener.address, self.folder], env=environment)
                for _ in range(MOST_RANKS)
            ]
            by_pid = {}
            for _ in self.processes:  # they come in any order
                link = listener.accept()
                by_pid[link.recv()] = link
            self.links = [by_pid[process.pid] for process in self.processes]

    def _give_up(self, reason: str, silent: list[int]) -> None:
        for rank in silent:
            self.processes[rank].send_signal(signal.SIGUSR1)  # its stack, written by faulthandler
        stacks = ""
        if silent:
            time.sleep(0.5)
            for rank in silent:
                path = Path(self.folder) / f"stack{self.processes[rank].pid}"
                stacks += f"\nrank {rank} stands at\n{path.read_text()}"
        self.close()
        raise RankError(reason + stacks)

    def close(self) -> None:
        """Kills the processes and waits for their end."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()
        for link in self.links:
            link.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.processes, self.links = [], []


WORKERS = Workers()


def run_ranks(fn: Callable, world_size: int, *args: Any, timeout_s: float = 60) -> list[Any]:
    """What `fn(*args)` returns in each of `world_size` real processes with a gloo group, by rank."""
    return WORKERS.run(fn, world_size, args, timeout_s)


def _work(address: str, folder: str) -> None:
    import torch.distributed as torch_dist

    stack = (Path(folder) / f"stack{os.getpid()}").open("w")
    faulthandler.register(signal.SIGUSR1, stack, all_threads=False)
    link = Client(address, family="AF_UNIX")
    link.send(os.getpid())
    while True:
        try:
            module, name, args, rank, world_size, store = link.recv()
        except EOFError:  # the tests' process is gone
            return
        try:
            torch_dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
            answer = getattr(importlib.import_module(module), name)(*args)
            torch_dist.barrier()
            torch_dist.destroy_process_group()
        except BaseException:
            link.send((False, traceback.format_exc()))
        else:
            link.send((True, answer))


if __name__ == "__main__":
    _work(*sys.argv[1:])
