"""Before the ranks join: does the address have a meaning, is the port free or answered, has every rank come?

Each question is asked by itself, as joining answers all of them with one error after minutes.
"""

import contextlib
import errno
import ipaddress
import os
import socket
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from dist_train.doctor.report import Line, ranks
from dist_train.ranks.launcher import Launcher

if TYPE_CHECKING:
    import torch.distributed as torch_dist

COME_WITHIN_S = 15.0  # from the start of this rank
MORE_S = 5.0  # after which what has not kept to that is cut off
INTERFACES = Path("/sys/class/net")


def several_nodes(launcher: Launcher) -> bool:
    """Whether ranks run on other nodes than this."""
    return launcher.world_size > launcher.local_world_size


def own_name() -> Iterator[Line]:
    """That this host's name has an address: gloo connects through it."""
    name = socket.gethostname()
    try:
        found = addresses(name)
    except OSError as error:
        mend = f"echo '127.0.1.1 {name}' >> /etc/hosts   or export GLOO_SOCKET_IFNAME=lo"
        yield Line("fail", "own name", f"{name} does not resolve: {error.strerror}", mend)
        return
    yield Line("pass", "own name", f"{name} is {', '.join(found)}", facts={"host": name, "addresses": found})


def loopback_port() -> Iterator[Line]:
    """That a port can be had on this host."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield Line("pass", "port", f"127.0.0.1 port {server.getsockname()[1]} can be had")


def interfaces() -> Iterator[Line]:
    """That the network cards that the environment names are there."""
    there = sorted(path.name for path in INTERFACES.iterdir())
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        # nccl's own forms: ^name leaves out, =name is exact, a plain name is a prefix
        for name in os.environ.get(variable, "").lstrip("=").split(","):
            fits = [card for card in there if card == name or (variable.startswith("NCCL") and card.startswith(name))]
            if name.startswith("^"):
                break
            if name and not fits:
                shown = f"{variable} names {name}, but this host has {', '.join(there)}"
                yield Line("fail", "interface", shown, f"export {variable}={_card(there)}")
            elif name:
                yield Line("pass", "interface", f"{variable} is {name}")


def _card(there: list[str]) -> str:
    others = [name for name in there if name != "lo"]
    return others[0] if others else "lo"


def address(launcher: Launcher) -> Iterator[Line]:
    """What the name of rank 0's host means here."""
    host = launcher.master_addr
    try:
        found = addresses(host)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        mend = "export MASTER_ADDR=ADDRESS   of the host of rank 0, as ip -br address shows it there"
        yield Line("fail", "address", f"MASTER_ADDR={host} does not resolve: {why}", mend)
        return
    facts = {"host": host, "addresses": found}
    loopback = [text for text in found if ipaddress.ip_address(text.split("%")[0]).is_loopback]
    if loopback and several_nodes(launcher):
        mend = (
            f"take {host} out of the line {loopback[0]} in /etc/hosts, or export MASTER_ADDR=ADDRESS   of the host of "
            f"rank 0, as ip -br address shows it there"
        )
        what = f"{host} is {loopback[0]} here, this host alone, but there are {launcher.world_size} ranks on more nodes"
        yield Line("fail", "address", what, mend, facts)
        return
    yield Line("pass", "address", f"{host} is {', '.join(found)}", facts=facts)


def addresses(host: str) -> list[str]:
    """The addresses of a host's name. Raises OSError."""
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(row[4][0]) for row in found))


def port(launcher: Launcher, kept: bool, deadline: float) -> Iterator[Line]:
    """On rank 0 that nobody else listens at the port; elsewhere that somebody answers there.

    Args:
        launcher: of this rank.
        kept: torchrun listens there.
        deadline: until when to try, by time.monotonic().
    """
    place = f"{launcher.master_addr} port {launcher.master_port}"
    if launcher.rank == 0 and not kept:
        try:
            socket.create_server(("", launcher.master_port)).close()
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                mend = (
                    f"export MASTER_PORT={_free_port()}   on all ranks; ss -ltnp 'sport = :{launcher.master_port}' "
                    f"shows who has it"
                )
                yield Line("fail", "port", f"{launcher.master_port} is taken on this host, where rank 0 listens", mend)
            else:
                mend = f"export MASTER_PORT={_free_port()}   on all ranks"
                yield Line("fail", "port", f"rank 0 cannot listen at {launcher.master_port}: {error.strerror}", mend)
            return
        yield Line("pass", "port", f"{launcher.master_port} is free on this host, where rank 0 listens")
        return
    while True:
        try:
            socket.create_connection((launcher.master_addr, launcher.master_port), timeout=COME_WITHIN_S / 3).close()
            break
        except OSError as error:
            why = error.strerror or str(error)
            if time.monotonic() > deadline:
                mend = (
                    f"see that rank 0 runs and has this address; open the port in the firewall; "
                    f"nc -zv {launcher.master_addr} {launcher.master_port}   tries it"
                )
                what = f"rank 0 does not answer at {place} ({_resolved(launcher.master_addr)}): {why}"
                yield Line("fail", "port", what, mend)
                return
        time.sleep(0.1)
    yield Line("pass", "port", f"{place} answers")


def _free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def _resolved(host: str) -> str:
    with contextlib.suppress(OSError):
        return ", ".join(addresses(host))
    return "no address"


class Arrival:
    """A store at the run's own port, in which every rank says that it has come. It is kept until the ranks have
    joined, who then share it.

    Args:
        launcher: of this rank.
        kept: torchrun listens there.
        deadline: by time.monotonic().
    """

    store: "torch_dist.TCPStore"

    def __init__(self, launcher: Launcher, kept: bool, deadline: float):
        self.launcher, self.kept, self.deadline = launcher, kept, deadline

    def check(self) -> Iterator[Line]:
        """Whether all have come, and which have not."""
        import torch.distributed as torch_dist

        of = self.launcher
        self.store = torch_dist.TCPStore(
            of.master_addr, of.master_port, is_master=of.rank == 0 and not self.kept, wait_for_workers=False,
            multi_tenant=True, timeout=timedelta(seconds=max(1.0, self.deadline - time.monotonic())),
        )  # fmt: skip
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's store outlives a start of the ranks
        keys = [f"dist_train/doctor/{start}/{rank}" for rank in range(of.world_size)]
        self.store.set(keys[of.rank], socket.gethostname())
        missing = list(range(of.world_size))
        with contextlib.suppress(RuntimeError):  # rank 0 has given up, and its store with it
            while missing := [rank for rank in missing if not self.store.check([keys[rank]])]:
                if time.monotonic() > self.deadline:
                    break
                time.sleep(0.02)
        place = f"{of.master_addr} ({_resolved(of.master_addr)}) port {of.master_port}"
        if missing:
            shown = ", ".join(map(str, missing[:8])) + ("..." if len(missing) > 8 else "")
            what = f"rank {shown} of {of.world_size} did not come to {place} within {COME_WITHIN_S:g} s"
            mend = (
                "see the log of the node where it should run; it needs the same MASTER_ADDR, MASTER_PORT and "
                "WORLD_SIZE, and a RANK of its own"
            )
            yield Line("fail", "rendezvous", what, mend, {"missing": missing})
            return
        yield Line("pass", "rendezvous", f"{ranks(of.world_size)} came to {place}")
