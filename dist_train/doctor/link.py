"""What connects the ranks: broadcast and all-reduce timed and verified, and the ranks' clocks."""

import platform
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as torch_dist

from dist_train.doctor.peers import Peers
from dist_train.doctor.report import Line

SIZES = {1 << 10: "1 KB", 1 << 14: "16 KB", 1 << 18: "256 KB", 1 << 22: "4 MB", 1 << 26: "64 MB"}
BUDGET_S = 5.0  # for all sizes
MOST_REPEATS = 10
# Between nodes: 1 Gbit/s, what a wrong network card gives where a fast one is there.
SLOW_GB_PER_S = 0.125
SKEW_S = 1.0
PINGS = 5


def bandwidth(peers: Peers, most_bytes: int) -> Iterator[Line]:
    """A line for each size up to `most_bytes`. Collective.

    GB/s is bytes by time, of the rank that took longest. The bus bandwidth of an all-reduce is 2 (n - 1) / n times
    that: what each rank's link carries, whatever the number of ranks n.
    """
    spent_s, expected_s = 0.0, 0.0
    sizes = [count for count in SIZES if count <= most_bytes]
    for count in sizes:
        if spent_s + expected_s > BUDGET_S:
            yield Line("warn", SIZES[count], f"left out: it would take {expected_s:.0f} s on this link", _cards())
            continue
        pattern = (torch.arange(count // 4, device=peers.device) % 251).float()
        tensor = pattern.clone() if peers.rank == 0 else torch.zeros_like(pattern)
        wrong = _wrong(peers, lambda t=tensor: torch_dist.broadcast(t, 0), tensor, pattern)
        if wrong:
            yield _corrupt(SIZES[count], "a broadcast", wrong)
            return
        tensor = pattern * (peers.rank + 1)
        total = pattern * (peers.size * (peers.size + 1) // 2)  # whole numbers below 2**24, so exact
        wrong = _wrong(peers, lambda t=tensor: torch_dist.all_reduce(t), tensor, total)
        if wrong:
            yield _corrupt(SIZES[count], "the sum of an all-reduce", wrong)
            return
        budget_s = BUDGET_S / len(sizes) / 2
        broadcast_s, took_s = _median_s(peers, lambda t=tensor: torch_dist.broadcast(t, 0), budget_s)
        tensor.zero_()
        reduce_s, more_s = _median_s(peers, lambda t=tensor: torch_dist.all_reduce(t), budget_s)
        spent_s += took_s + more_s
        expected_s = 16 * 2 * (broadcast_s + reduce_s)  # the next size, verified and timed once
        yield _line(peers, count, broadcast_s, reduce_s, last=count == sizes[-1])


def _wrong(peers: Peers, run: Callable[[], Any], tensor: torch.Tensor, expected: torch.Tensor) -> list[int]:
    """The ranks on which `run` did not make `tensor` what is expected."""
    run()
    return [rank for rank, right in enumerate(peers.gather(torch.equal(tensor, expected))) if not right]


def _corrupt(name: str, what: str, ranks: list[int]) -> Line:
    mend = "NCCL_P2P_DISABLE=1 (nccl), or another network card or machine; then run the doctor again"
    return Line("fail", name, f"{what} is wrong on rank {', '.join(map(str, ranks))}", mend, {"wrong_ranks": ranks})


def _median_s(peers: Peers, run: Callable[[], Any], budget_s: float) -> tuple[float, float]:
    """Seconds of the slowest rank, the median of as many repeats as the budget allows; and what all took."""

    def once() -> float:
        torch_dist.barrier(group=peers.hosts)
        start = time.perf_counter()
        run()
        if peers.device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter() - start

    first_s = max(peers.gather(once()))
    repeats = min(MOST_REPEATS, int(budget_s / first_s))
    times = peers.gather([once() for _ in range(repeats)] or [first_s])
    slowest = [max(row) for row in zip(*times, strict=True)]
    return statistics.median(slowest), first_s + sum(slowest)


def _line(peers: Peers, count: int, broadcast_s: float, reduce_s: float, last: bool) -> Line:
    bus = 2 * (peers.size - 1) / peers.size * count / reduce_s / 1e9
    facts = {"bytes": count, "ranks": peers.size, "backend": torch_dist.get_backend()}
    facts |= {"broadcast_ms": broadcast_s * 1e3, "broadcast_gb_per_s": count / broadcast_s / 1e9}
    facts |= {"all_reduce_ms": reduce_s * 1e3, "all_reduce_gb_per_s": count / reduce_s / 1e9}
    facts["all_reduce_bus_gb_per_s"] = bus
    what = (
        f"broadcast {broadcast_s * 1e3:8.2f} ms {count / broadcast_s / 1e9:7.3f} GB/s, "
        f"all-reduce {reduce_s * 1e3:8.2f} ms {count / reduce_s / 1e9:7.3f} GB/s (bus {bus:.3f})"
    )
    if last and count >= 1 << 20 and peers.nodes > 1 and bus < SLOW_GB_PER_S:
        return Line("warn", SIZES[count], f"{what}: a slow link between nodes", _cards(), facts)
    return Line("pass", SIZES[count], what, facts=facts)


def _cards() -> str:
    variable = "NCCL_SOCKET_IFNAME" if torch_dist.get_backend() == "nccl" else "GLOO_SOCKET_IFNAME"
    return f"export {variable}=CARD   (ip -br link lists them), or python -m launch --interface CARD"


def clocks(peers: Peers) -> Iterator[Line]:
    """How far each rank's clock is from rank 0's. Collective.

    Rank 0 asks for the time; half of the round trip is the answer's age, and the fastest of a few trips counts (NTP).
    """
    skews = [(0.0, 0.0)] * peers.size
    for rank in range(1, peers.size):
        trips = [_trip(peers, rank) for _ in range(PINGS)]
        skews[rank] = min((trip for trip in trips if trip), default=(0.0, 0.0))
    facts = {"skew_s": [skew for _, skew in skews], "trip_s": [trip for trip, _ in skews]}
    hosts = peers.gather(platform.node())
    far = max(range(peers.size), key=lambda rank: abs(skews[rank][1]))
    trip_s, skew_s = skews[far]
    if abs(skew_s) > SKEW_S:
        what = f"rank {far} on {hosts[far]} is {abs(skew_s):.1f} s {'ahead of' if skew_s > 0 else 'behind'} rank 0"
        mend = f"timedatectl set-ntp true   on {hosts[far]} (systemd-timesyncd), or chronyc makestep (chrony)"
        yield Line("warn", "clocks", what, mend, facts)
        return
    most = f"at most {abs(skew_s) * 1e3:.2f} ms apart (each known to {trip_s / 2 * 1e3:.2f} ms)"
    yield Line("pass", "clocks", most, facts=facts)


def _trip(peers: Peers, rank: int) -> tuple[float, float] | None:
    """Seconds of a round trip from rank 0 to `rank`, and how far ahead its clock is; on rank 0 alone."""
    now = torch.zeros(1, dtype=torch.float64)
    if peers.rank == rank:
        torch_dist.recv(now, 0, group=peers.hosts)
        torch_dist.send(torch.tensor([time.time()], dtype=torch.float64), 0, group=peers.hosts)
    if peers.rank:
        return None
    sent, start = time.time(), time.perf_counter()
    torch_dist.send(now, rank, group=peers.hosts)
    torch_dist.recv(now, rank, group=peers.hosts)
    trip_s = time.perf_counter() - start
    return trip_s, now.item() - (sent + trip_s / 2)
