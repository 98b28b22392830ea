"""Whether the launcher that started this rank is still there: a rank without it has nobody to end it."""

import contextlib
import functools
import os
import re
import select
from dataclasses import dataclass
from pathlib import Path

# What starts ranks and stays until they have ended: as a program, a script or a module of Python's.
PROGRAMS = (
    *("torchrun", "torch.distributed.run", "torch.distributed.launch", "accelerate", "accelerate.commands.launch"),
    *("accelerate.commands.accelerate_cli", "deepspeed", "deepspeed.launcher.launch", "mpirun", "mpiexec", "orterun"),
    *("mpiexec.hydra", "hydra_pmi_proxy", "hydra_bstrap_proxy", "orted", "prte", "prted", "prterun", "slurmstepd"),
)
STARTERS = ("torchrun", "accelerate", "deepspeed", "mpirun", "mpiexec", "srun")


@dataclass(frozen=True)
class Started:
    """The process of a launcher.

    Args:
        pid: of it.
        at: when it started, in clock ticks since the machine did: a number of a process is used again.
        name: of its program.
    """

    pid: int
    at: int
    name: str

    def gone(self) -> bool:
        """Whether it has ended, waited for or not."""
        found = _stat(self.pid)
        return found is None or found[0] in "ZX" or found[2] != self.at


@functools.cache
def started_by(launcher: str) -> Started | None:
    """The nearest process above this one that is a launcher; None where a process was started otherwise, such as by
    a shell that may end. Asked early: of a launcher that is gone already nothing is known.

    Args:
        launcher: its name by the environment.
    """
    if launcher not in STARTERS:
        return None
    pid = os.getppid()
    while pid > 0 and (found := _stat(pid)) is not None:
        name = _program(pid)
        if name is not None:
            return Started(pid, found[2], name)
        pid = found[1]
    return None


def _stat(pid: int) -> tuple[str, int, int] | None:
    """State, parent and start of a process; None if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text[text.rindex(")") + 2 :].split()  # the name before may hold anything
    return fields[0], int(fields[1]), int(fields[19])


def _program(pid: int) -> str | None:
    """Which of PROGRAMS a process is; None if none."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return None
    if words[0].startswith("slurmstepd"):  # it writes its own title
        return "slurmstepd"
    names = [os.path.basename(words[0])]
    if re.fullmatch(r"python[\d.]*", names[0]):
        script = next((i for i, word in enumerate(words) if i and (word == "-m" or not word.startswith("-"))), 0)
        names = [words[script + 1] if words[script] == "-m" else os.path.basename(words[script])]
    return next((name for name in names if name in PROGRAMS), None)


def mute_unread() -> None:
    """Sends what is written to nowhere where it went to a pipe that nobody reads any more, as it would be an error."""
    for fd in (1, 2):
        with contextlib.suppress(OSError):
            poll = select.poll()
            poll.register(fd, 0)
            if any(event & select.POLLERR for _, event in poll.poll(0)):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, fd)
                os.close(nowhere)
