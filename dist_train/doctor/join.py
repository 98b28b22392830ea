"""Joining the ranks as a run does, after asking what may keep them from it."""

import contextlib
import time
from typing import TYPE_CHECKING

from dist_train.doctor import meeting
from dist_train.doctor.report import Line, attempt, reason, worst
from dist_train.doctor.subject import Subject
from dist_train.errors import ConfigError

if TYPE_CHECKING:
    from dist_train.doctor.peers import Peers
    from dist_train.ranks.dist import World

GROUP_S = 20.0  # that joining may take once all have come, and a timed collective
TOGETHER_S = 300.0  # that ranks wait for the one that is slowest to read its data


def join(subject: Subject, stack: contextlib.ExitStack) -> "tuple[World, Peers] | None":
    """The ranks' group, left when the stack is closed. None if something is in the way, which the report then has."""

    from dist_train.doctor.peers import Peers
    from dist_train.ranks import dist, rendezvous

    launcher, report = subject.launcher, subject.report
    kept, deadline = rendezvous.kept_by_torchrun(), time.monotonic() + meeting.COME_WITHIN_S
    arrival = meeting.Arrival(launcher, kept, deadline)
    where = f"at {launcher.master_addr} port {launcher.master_port}"
    who = f"ss -ltnp 'sport = :{launcher.master_port}'   on the host of rank 0 shows who listens there, if not rank 0"
    for name, check, *arguments in (
        ("interface", meeting.interfaces),
        ("address", meeting.address, launcher),
        ("port", meeting.port, launcher, kept, deadline),
        ("rendezvous", arrival.check),
    ):
        with subject.limit("network", name, deadline - time.monotonic() + meeting.MORE_S, where, who):
            lines = attempt(name, check, *arguments)
        report.add("network", lines)
        if worst(lines) == "fail":
            return None
    train = subject.config.train
    try:
        device = dist.resolve_device(train.device, launcher.local_rank)
        dist.set_threads(train.threads, launcher.local_world_size)
        with subject.limit("network", "rendezvous", GROUP_S + meeting.MORE_S, where):
            world = stack.enter_context(dist.joined(launcher, device, GROUP_S))
            hosts = dist.group_of_hosts(TOGETHER_S)
            # The ranks of a node have the same first rank.
            nodes = len(set(dist.gather(launcher.rank - launcher.local_rank, hosts)))
    except ConfigError as error:
        report.add("network", [Line("fail", "device", line) for line in error.lines])
        return None
    except Exception as error:
        mend = "export GLOO_SOCKET_IFNAME=CARD NCCL_SOCKET_IFNAME=CARD   (ip -br link lists them) on all nodes"
        report.add("network", [Line("fail", "rendezvous", f"the ranks cannot join: {reason(error)}", mend)])
        return None
    return world, Peers(launcher.rank, launcher.world_size, nodes, device, hosts)
