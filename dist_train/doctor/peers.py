"""The ranks that have joined: who they are, and whether they are alike."""

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as torch_dist

from dist_train.doctor.report import Line, ranks
from dist_train.ranks import dist
from dist_train.ranks.launcher import Launcher


@dataclass(frozen=True)
class Peers:
    """This rank among those that have joined.

    Args:
        rank: of this process.
        size: number of ranks.
        nodes: on how many nodes.
        device: whose tensors are sent.
        hosts: a group of all ranks for tensors on the CPU.
    """

    rank: int
    size: int
    nodes: int
    device: torch.device
    hosts: torch_dist.ProcessGroup

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value. Collective."""
        return dist.gather(value, self.hosts)


def table(peers: Peers, launcher: Launcher) -> Iterator[Line]:
    """A line for each rank: its host, process and device. Collective."""
    device = f"{peers.device} ({dist.device_name(peers.device)})"
    rows = peers.gather((platform.node(), launcher.local_rank, os.getpid(), device))
    seen: dict[tuple[str, int], int] = {}
    for rank, (host, local_rank, process, device) in enumerate(rows):
        facts = {"rank": rank, "host": host, "local_rank": local_rank, "process": process, "device": device}
        what = f"{host}, local rank {local_rank}, process {process}, {device}"
        other = seen.setdefault((host, local_rank), rank)
        if other != rank:
            mend = "start all ranks of a node with one launcher, or export LOCAL_RANK and LOCAL_WORLD_SIZE"
            yield Line("warn", f"rank {rank}", f"{what}: the same place as rank {other}", mend, facts)
        else:
            yield Line("pass", f"rank {rank}", what, facts=facts)


def agreement(peers: Peers, facts: dict[str, str]) -> Iterator[Line]:
    """That every rank has the same of each of these, such as the version of torch. Collective."""
    rows = peers.gather(facts)
    same = True
    for name in dict.fromkeys(name for row in rows for name in row):
        first = rows[0].get(name)
        others = {rank: row.get(name) for rank, row in enumerate(rows) if row.get(name) != first}
        if others:
            same = False
            got = ", ".join(f"{value} on rank {rank}" for rank, value in list(others.items())[:4])
            what = f"{name} is {first} on rank 0, but {got}"
            yield Line("fail", "same on all", what, f"give all ranks the same {name}", {"ranks": [*others]})
    if same:
        yield Line("pass", "same on all", f"{', '.join(rows[0])}: the same on {ranks(peers.size)}")
