"""What this process computes on, as far as it decides about the last bits. Imports no torch by itself."""

import platform
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def processor() -> str:
    """The CPU's name."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text(encoding="utf-8").splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def hardware(device: "torch.device") -> str:
    """Device, threads and torch, for people."""
    import torch

    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    kind, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    return f"{processor()} ({kind}), {threads} thread{'s' if threads > 1 else ''}, torch {torch.__version__}"
