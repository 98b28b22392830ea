"""What the processes of a benchmark and the one that leads them tell each other. Knows no torch."""

from dataclasses import dataclass, field

NAMES = OURS, CEILING, BARE, TUTORIAL = "ours", "ceiling", "bare", "tutorial"
WARM_STEPS = 10  # before the first slice
# Before each slice, and not of it: another's data is in the CPU's caches, and threads and cores have gone to sleep.
RUN_IN_STEPS = 3
FIRST_STEP, WARM, END = "first step", "warm", "end"
CONFIG, SOCKET = "config.yaml", "leader.sock"  # files of a cell's folder


@dataclass(frozen=True)
class Ready:
    """A rank has taken its first steps.

    Args:
        step_s: seconds of a step, the median of the first ones.
        peak_bytes: the most memory that was used: of the device, on the CPU of the process.
        references: what can be run beside ours in this process, by name.
        threads: of a rank on the CPU.
        device: its name.
        versions: of what is used.
    """

    step_s: float
    peak_bytes: int
    references: tuple[str, ...]
    threads: int
    device: str
    versions: dict[str, str]


@dataclass(frozen=True)
class Slice:
    """Some steps in a row, on one rank.

    Args:
        steps: how many.
        seconds: wall time of all.
        cpu_s: CPU time of the process, all its threads.
        step_ms: of each step; on an accelerator of the mean one, as a step is only launched.
        phases: seconds in each phase of the loop; of ours alone.
    """

    steps: int
    seconds: float
    cpu_s: float
    step_ms: list[float]
    phases: dict[str, float] = field(default_factory=dict)
