"""The store through which ranks find each other, also under torchrun's restarts. Who waits says for whom.

torchrun keeps one store for all starts of its ranks, and torch 2.14 gives a new start the addresses that an old one
left there: gloo then connects to processes that are gone. Nothing in the environment counts the starts in which nodes
came or went, so rank 0 counts them, and tells those ranks that ask in this start.
"""

import contextlib
import functools
import itertools
import os
import secrets
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as torch_dist

from dist_train.errors import ConfigError, LaunchError
from dist_train.ranks.launcher import Launcher
from dist_train.ranks.speech import prefix

ASK_EVERY_S = 0.05
LOOK_EVERY_S = 0.5
SPEAKS_AFTER_S = (10.0, 30.0, 60.0, 120.0, 240.0, 480.0)
LISTED = 8  # ranks that a line names


class Waiting:
    """Says on stderr, at growing intervals, whom this rank waits for. Within its context.

    Attributes:
        whom: it waits for at present, for people.
        speaks: false where another rank says the same.
    """

    def __init__(self, launcher: Launcher) -> None:
        self.launcher, self.whom, self.speaks, self.begin = launcher, "rank 0", True, time.monotonic()
        self.where = f"{launcher.master_addr}:{launcher.master_port}"
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._speak, name="waiting", daemon=True)

    def __enter__(self) -> "Waiting":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()

    def failed(self) -> LaunchError:
        """That the waiting took too long, or broke off."""
        waited_s = time.monotonic() - self.begin
        return LaunchError(
            f"rank {self.launcher.rank} waited {waited_s:.0f} s in vain for {self.whom} at {self.where}; expected "
            f"{self.launcher.world_size} ranks to meet there; look for their own errors and whether they were started "
            f"(python -m dist_train doctor, started the same way, says more), or unset RANK and WORLD_SIZE to run one "
            f"process"
        )

    def _speak(self) -> None:
        for after_s in SPEAKS_AFTER_S:
            if self.over.wait(max(0.0, self.begin + after_s - time.monotonic())):
                return
            if self.speaks:
                rank = prefix(self.launcher.rank, self.launcher.world_size)
                text = f"{rank}has waited {after_s:.0f} s for {self.whom} at {self.where}"
                print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def store(launcher: Launcher, timeout_s: float) -> Iterator[torch_dist.Store]:
    """The store in which all ranks have met, to join within the context.

    Raises:
        ConfigError: the port is taken.
        LaunchError: some have not come within `timeout_s`.
    """
    place = launcher.rank, launcher.world_size, timeout_s
    with Waiting(launcher) as waiting:
        try:
            with store_of_this_start(*place) if kept_by_torchrun() else own_store(launcher, timeout_s) as met:
                _meet(met, launcher, timeout_s, waiting)
                waiting.whom, waiting.speaks = "connections to the other ranks, who have all met", True
                yield met
        except (torch_dist.DistNetworkError, torch_dist.DistStoreError):
            raise waiting.failed() from None


@contextlib.contextmanager
def own_store(launcher: Launcher, timeout_s: float) -> Iterator[torch_dist.Store]:
    """A store that rank 0 holds, or a part of it where this process joins again: it has what an earlier group left."""
    place = launcher.master_addr, launcher.master_port, launcher.world_size, launcher.rank == 0
    try:
        found = _kept_store(*place, timeout_s)
    except torch_dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise ConfigError(
            f"environment: got MASTER_PORT={launcher.master_port}, at which another program listens on this machine, "
            f"expected a free port; set another on all ranks, for example MASTER_PORT={launcher.master_port + 1} "
            f"(torchrun: --master_port, or --standalone, which finds a free one)"
        ) from None
    yield torch_dist.PrefixStore(f"dist_train/join/{next(_JOINS)}", found)


# How many times this process has joined others: all have done it as often.
_JOINS = itertools.count()


@functools.cache
def _kept_store(address: str, port: int, world_size: int, first: bool, timeout_s: float) -> torch_dist.TCPStore:
    """The store, as long as this process lives: who joins again may come before the others have left."""
    timeout = timedelta(seconds=timeout_s)
    return torch_dist.TCPStore(address, port, world_size, first, timeout, wait_for_workers=False, multi_tenant=True)


def _meet(met: torch_dist.Store, launcher: Launcher, timeout_s: float, waiting: Waiting) -> None:
    """Waits until every rank has come."""
    size, key = launcher.world_size, "dist_train/here"
    waiting.whom, waiting.speaks = "other ranks", launcher.rank == 0
    met.set(f"{key}/{launcher.rank}", "")
    if met.add(key, 1) == size:
        met.set(f"{key}/all", "")
    deadline, pause_s, looked = time.monotonic() + timeout_s, 0.002, time.monotonic()
    while not met.check([f"{key}/all"]):
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, LOOK_EVERY_S)
        if time.monotonic() - looked > SPEAKS_AFTER_S[0] / 2 or time.monotonic() > deadline:
            looked = time.monotonic()
            missing = [rank for rank in range(size) if not met.check([f"{key}/{rank}"])]
            if missing:
                shown = ", ".join(map(str, missing[:LISTED])) + (" and more" if len(missing) > LISTED else "")
                waiting.whom = f"rank{'s' if len(missing) > 1 else ''} {shown}"
        if time.monotonic() > deadline:
            raise waiting.failed()


def kept_by_torchrun() -> bool:
    """Whether an agent of torchrun holds the store, from the first start to the last."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


@contextlib.contextmanager
def store_of_this_start(rank: int, world_size: int, timeout_s: float) -> Iterator[torch_dist.Store]:
    """A part of the agent's store that no other start has used. Until the end of the context rank 0 answers the others,
    so they join within it."""
    agent, answering = _connected(timeout_s), threading.Event()
    if rank:
        token = secrets.token_hex(8)
        agent.set(f"dist_train/asks/{rank}", token)
        start = agent.get(f"dist_train/answers/{token}").decode()
        agent.add(f"dist_train/arrived/{start}", 1)
        yield torch_dist.PrefixStore(f"dist_train/start/{start}", agent)
        return
    start = str(agent.add("dist_train/starts", 1))
    thread = threading.Thread(
        target=_answer, args=(_connected(timeout_s), start, world_size, answering), daemon=True, name="rendezvous"
    )
    thread.start()
    try:
        yield torch_dist.PrefixStore(f"dist_train/start/{start}", agent)
        deadline = time.monotonic() + timeout_s
        while agent.add(f"dist_train/arrived/{start}", 0) < world_size - 1 and time.monotonic() < deadline:
            time.sleep(ASK_EVERY_S)  # nccl's group may be there before every rank has asked
    finally:
        answering.set()
        thread.join()


def _connected(timeout_s: float) -> torch_dist.TCPStore:
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return torch_dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=timeout_s))


def _answer(agent: torch_dist.Store, start: str, world_size: int, done: threading.Event) -> None:
    """Tells every rank that asks which start this is. What a rank of an earlier start has asked is answered as well,
    and nobody hears it."""
    answered: set[bytes] = set()
    while not done.wait(ASK_EVERY_S):
        for rank in range(1, world_size):
            key = f"dist_train/asks/{rank}"
            if not agent.check([key]):
                continue
            token = agent.get(key)
            if token not in answered:
                agent.set(f"dist_train/answers/{token.decode()}", start)
                answered.add(token)
