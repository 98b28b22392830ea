"""The store through which ranks find each other, under torchrun's restarts.

torchrun keeps one store for all starts of its ranks, and torch 2.14 gives a new start the addresses that an old one
left there: gloo then connects to processes that are gone. Nothing in the environment counts the starts in which nodes
came or went, so rank 0 counts them, and tells those ranks that ask in this start.
"""

import contextlib
import os
import secrets
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as torch_dist

ASK_EVERY_S = 0.05


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
