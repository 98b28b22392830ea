"""A rank that is measured: it waits for its turn, takes some steps, says how long they took, and waits again.

Ours is the package's own run from start to end, and is held where the loop says that a step has ended. Nothing in the
loop knows of it. What it is compared with takes its turns meanwhile, in the same process.
"""

import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from multiprocessing.connection import Client
from pathlib import Path

import torch
import torch.distributed as torch_dist

from dist_train.bench.slices import FIRST_STEP, RUN_IN_STEPS, WARM, WARM_STEPS, Ready, Slice
from dist_train.ranks.dist import device_name
from dist_train.ranks.phases import NAMES, Phases
from dist_train.versions import versions

ALIVE_S = 1.0

Steps = Iterator[None]  # each next() is a step


class Turns:
    """The connection to the process that leads.

    Args:
        address: of its socket.
        rank: of this process.
        device: that the steps run on.
    """

    def __init__(self, address: str, rank: int, device: torch.device):
        self.link, self.device = Client(address, family="AF_UNIX"), device
        self.link.send(rank)

    def first_step(self) -> None:
        """The first step has been taken."""
        synchronize(self.device)
        self.link.send(FIRST_STEP)

    def ready(self, ends: list[float], references: Iterable[str] = ()) -> None:
        """The first steps have been taken, and ended at these times."""
        synchronize(self.device)
        step_s = statistics.median(b - a for a, b in zip(ends, ends[1:], strict=False))
        of = torch.get_num_threads(), device_name(self.device), versions()
        self.link.send(Ready(step_s, peak_bytes(self.device), tuple(references), *of))

    def give(self, measured: Slice) -> None:
        """What the turn gave."""
        self.link.send(measured)

    def wait(self, others: Mapping[str, Steps], alive: Callable[[], None] = lambda: None) -> int:
        """Runs the turns of `others`, until it is one that is not among them.

        Args:
            others: by name.
            alive: called about once a second.

        Returns:
            The steps of that turn; 0 to end.

        Raises:
            EOFError: the process that leads is gone.
        """
        while True:
            while not self.link.poll(ALIVE_S):
                alive()
            name, steps = self.link.recv()
            if name == WARM:
                for reference in others.values():
                    timed(reference, WARM_STEPS, self.device)
                self.link.send(WARM)
            elif name in others:
                self.give(timed(others[name], steps, self.device))
            else:
                return steps


class Held(Phases):
    """The phases of ours, which the loop tells of the end of each step: there it is held until it is its turn.

    Args:
        turns: says whose turn it is.
        references: what takes its turns meanwhile, by name. They begin to exist with their first step, after ours has
            taken its own: the peak of memory until there is that of ours.
    """

    def __init__(self, turns: Turns, references: Mapping[str, Steps]) -> None:
        super().__init__()
        self.turns, self.references = turns, references
        self.taken = dict.fromkeys(NAMES, 0.0)  # what the meter has taken
        self.ends: list[float] = []  # of the steps of this slice
        self.until: float = 1
        self.steps = 0  # of the slice that is run in
        self.begin: tuple[float, float, dict[str, float]] | None = None

    def progressed(self, step: int | None = None) -> None:
        """See Phases."""
        super().progressed(step)
        if step is not None:
            self.ends.append(time.perf_counter())
            if step >= self.until:
                self._hold(step)

    def take(self) -> dict[str, float]:
        """See Phases."""
        taken = super().take()
        for name, seconds in taken.items():
            self.taken[name] += seconds
        return taken

    def _hold(self, step: int) -> None:
        turns = self.turns
        if self.steps:  # it is run in
            synchronize(turns.device)
            self.until, self.steps = step + self.steps, 0
            self.ends.clear()
            before = self._totals()
            self.since = time.perf_counter()  # what has passed until here is no phase of the loop
            self.begin = self.since, time.process_time(), before
            return
        if step == 1:
            turns.first_step()
            self.until = WARM_STEPS
            return
        if self.begin is None:
            turns.ready(self.ends, self.references)
        else:
            turns.give(self._measured(*self.begin))
        self.steps = turns.wait(self.references, self.progressed)
        self.until = step + RUN_IN_STEPS if self.steps else math.inf
        meet(turns.device)

    def _measured(self, begin: float, cpu_begin: float, before: dict[str, float]) -> Slice:
        synchronize(self.turns.device)
        end, cpu_end = time.perf_counter(), time.process_time()
        of = {name: seconds - before[name] for name, seconds in self._totals().items()}
        step_ms = durations_ms(begin, end, self.ends, self.turns.device)
        return Slice(len(self.ends), end - begin, cpu_end - cpu_begin, step_ms, of)

    def _totals(self) -> dict[str, float]:
        """Seconds in each phase so far."""
        self(self.name)
        return {name: self.taken[name] + self.seconds[name] for name in NAMES}


def alone(reference: Steps, turns: Turns) -> None:
    """The first steps of a reference, in a process of its own."""
    ends = []
    for i in range(WARM_STEPS):
        next(reference)
        ends.append(time.perf_counter())
        if i == 0:
            turns.first_step()
    turns.ready(ends)
    turns.wait({})


def timed(reference: Steps, steps: int, device: torch.device) -> Slice:
    """Some steps of a reference. All ranks begin together."""
    meet(device)
    for _ in range(RUN_IN_STEPS):
        next(reference)
    synchronize(device)
    ends: list[float] = []
    begin, cpu_begin = time.perf_counter(), time.process_time()
    for _ in range(steps):
        next(reference)
        ends.append(time.perf_counter())
    synchronize(device)
    end, cpu_end = time.perf_counter(), time.process_time()
    return Slice(steps, end - begin, cpu_end - cpu_begin, durations_ms(begin, end, ends, device))


def durations_ms(begin: float, end: float, ends: list[float], device: torch.device) -> list[float]:
    """Milliseconds of each step, on an accelerator of the mean one."""
    if device.type != "cpu":
        return [(end - begin) / len(ends) * 1e3]
    return [round((b - a) * 1e3, 4) for a, b in zip([begin, *ends], ends, strict=False)]


def meet(device: torch.device) -> None:
    """Waits for the other ranks, and for what was launched."""
    if torch_dist.is_initialized():
        torch_dist.barrier()
    synchronize(device)


def synchronize(device: torch.device) -> None:
    """Waits for what was launched."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def peak_bytes(device: torch.device) -> int:
    """The most memory so far: that torch has had of the device, on the CPU that of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would count what the parent had when it started this process
        fields = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines() if ":" in line)
        return int(fields["VmHWM"].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
