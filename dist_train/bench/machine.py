"""What machine a benchmark ran on, and how busy it was."""

import os
import platform
from typing import Any

from dist_train.ranks.processor import processor


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def facts() -> dict[str, Any]:
    """Cores, the CPU's name, memory, and the load: how many processes wanted to run, on average of the last minute."""
    return {
        "cores": cores(),
        "cpu": processor(),
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
