"""What machine a benchmark ran on, and how busy it was."""

import os
import platform
from pathlib import Path
from typing import Any


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def facts() -> dict[str, Any]:
    """Cores, the CPU's name, memory, and the load: how many processes wanted to run, on average of the last minute."""
    return {
        "cores": cores(),
        "cpu": _cpu(),
        "system": platform.platform(),
        "memory_gib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        "load": os.getloadavg()[0],
    }


def busy(of: dict[str, Any]) -> bool:
    """Whether others want all its cores."""
    return of["load"] > of["cores"]


def describe(of: dict[str, Any]) -> str:
    """A line for people."""
    return f"{of['cores']} cores of {of['cpu']}, load {of['load']:.1f}"


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text(encoding="utf-8").splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
