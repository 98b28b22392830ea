"""Where the time of profiled steps went, read from a trace of torch.profiler."""

import re
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dist_train.ranks.phases import NAMES

Spans = list[tuple[float, float]]  # begins and ends in microseconds, in order, none over another

# What the loop does between two data phases; evaluations and saves are left out.
OF_A_STEP = ("data", "forward", "backward", "optimizer", "reduce")
LAUNCHES = ("cuda_runtime", "cuda_driver")
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
COLLECTIVES = ("gloo:", "nccl:", "mpi:", "ucc:", "xccl:")
# What computes on the CPU. Of nodes of the graph only torch's own: a library's hooks wait within the others.
OPERATOR = re.compile(r"(?!c10d::|autograd::|torch::autograd::)\w[\w.]*::|## Call Compiled|\w+Backward\d+$")
# A thread that runs no operator for so long while a collective is under way waits for it. Shorter pauses are Python's.
PAUSE_US = 100.0


@dataclass(frozen=True)
class Shares:
    """Shares of the time of steps, on one rank.

    Args:
        by_phase: data, forward, backward, reduction, optimizer, other: they add up to 1. A moment belongs to the phase
            whose kernel the device runs; where it runs none, or is the CPU, to the phase that the main thread is in.
            `reduction` is what was only waited for: collectives, while nothing else was computed. `other` is what the
            loop does for metrics and stops.
        in_flight: of the time in which at least one collective was under way, waited for or not. On the CPU that
            counts from the call, and takes in the wait for ranks that come later.
        total_s: of the steps, in seconds.
    """

    by_phase: dict[str, float]
    in_flight: float
    total_s: float

    @property
    def overlapped(self) -> float:
        """How much of the collectives' time other work went on."""
        return 1 - self.by_phase["reduction"] / self.in_flight if self.in_flight else 0.0


def shares(trace: dict[str, Any]) -> Shares:
    """The shares of a trace, as json.load gives it, with a range for each phase.

    Raises:
        ValueError: there is no such range.
    """
    events = [e for e in trace["traceEvents"] if e.get("ph") == "X" and e.get("dur", 0) > 0]
    ranges = sorted(
        (e["ts"], e["ts"] + e["dur"], e["name"], e["tid"])
        for e in events
        if e.get("cat") == "user_annotation" and e["name"] in NAMES
    )
    if not ranges:
        raise ValueError("got a trace without the phases of the loop")
    host = {name: union((begin, end) for begin, end, of, _ in ranges if of == name) for name in OF_A_STEP}
    steps = union(span for spans in host.values() for span in spans)
    on_device = [e for e in events if e.get("cat") in ON_DEVICE]
    if on_device:
        kernels, flights = _by_phase(on_device, events, ranges)
        busy = union(span for spans in kernels.values() for span in spans)
        waits = without(flights, busy)
    else:
        kernels, busy = dict.fromkeys(OF_A_STEP, []), []
        flights = common(union(_span(e) for e in events if e["name"].startswith(COLLECTIVES)), steps)
        thread = ranges[0][3]
        here = [e for e in events if e.get("cat") == "cpu_op" and e["tid"] == thread]
        operators = union(_span(e) for e in here if OPERATOR.match(e["name"]))
        pauses = [(begin, end) for begin, end in without(steps, operators) if end - begin >= PAUSE_US]
        waits = common(flights, pauses)
    taken, seen, seconds = union([*busy, *waits]), [], {}
    for name in OF_A_STEP:  # a moment in which the kernels of two phases run counts once
        seconds[name] = length(without(kernels[name], seen)) + length(without(host[name], taken))
        seen = union([*seen, *kernels[name]])
    total = sum(seconds.values()) + length(waits)
    parts = {**seconds, "reduction": length(waits), "other": seconds["reduce"]}
    names = ("data", "forward", "backward", "reduction", "optimizer", "other")
    return Shares({name: parts[name] / total for name in names}, length(flights) / total, total / 1e6)


def _by_phase(
    on_device: list[dict[str, Any]], events: list[dict[str, Any]], ranges: list[tuple]
) -> tuple[dict[str, Spans], Spans]:
    """What the device ran for each phase of a step, by the time of the launch, in whatever thread; and collectives."""
    launched = {
        e["args"]["correlation"]: e["ts"]
        for e in events
        if e.get("cat") in LAUNCHES and "correlation" in e.get("args", {})
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in (*NAMES, "collective")}
    begins = [begin for begin, *_ in ranges]
    for e in on_device:
        number = bisect_right(begins, launched.get(e.get("args", {}).get("correlation"), e["ts"])) - 1
        phase = ranges[max(0, number)][2]
        found["collective" if "nccl" in e["name"].lower() and phase in OF_A_STEP else phase].append(_span(e))
    return {name: union(found[name]) for name in OF_A_STEP}, union(found["collective"])


def _span(event: dict[str, Any]) -> tuple[float, float]:
    return event["ts"], event["ts"] + event["dur"]


# -- sets of moments ---------------------------------------------------------------------------------------------------


def union(spans: Iterable[tuple[float, float]]) -> Spans:
    """The moments in any of the spans, which may be in any order."""
    out: Spans = []
    for begin, end in sorted(spans):
        if out and begin <= out[-1][1]:
            out[-1] = out[-1][0], max(end, out[-1][1])
        else:
            out.append((begin, end))
    return out


def common(a: Spans, b: Spans) -> Spans:
    """The moments in both."""
    out, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        begin, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if begin < end:
            out.append((begin, end))
        i, j = (i + 1, j) if a[i][1] < b[j][1] else (i, j + 1)
    return out


def without(a: Spans, b: Spans) -> Spans:
    """The moments in `a` that are not in `b`."""
    edges = [-float("inf"), *(edge for span in b for edge in span), float("inf")]
    return common(a, list(zip(edges[::2], edges[1::2], strict=True)))


def length(spans: Spans) -> float:
    """Microseconds."""
    return sum(end - begin for begin, end in spans)
