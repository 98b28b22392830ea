"""What this machine has: cores, GPUs, a free port. Asked without torch, whose import takes seconds."""

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Machine:
    """Facts that a plan is made from.

    Args:
        name: the host name.
        cores: CPU cores that this process may use.
        gpus: GPUs that a process here would see.
        visible_gpus: what CUDA_VISIBLE_DEVICES says; None where it is not set.
        threads: what OMP_NUM_THREADS says; None where it is not set.
        free_port: a TCP port that nothing listens on.
        python: the interpreter.
    """

    name: str
    cores: int
    gpus: int
    visible_gpus: str | None
    threads: str | None
    free_port: int
    python: str


def look(env: Mapping[str, str] = os.environ) -> Machine:
    """This machine."""
    with socket.socket() as sock:
        sock.bind(("", 0))
        port = sock.getsockname()[1]
    visible = env.get("CUDA_VISIBLE_DEVICES")
    gpus = visible_gpus(visible, gpus_here())
    threads = env.get("OMP_NUM_THREADS")
    return Machine(
        socket.gethostname(), len(os.sched_getaffinity(0)), gpus, visible, threads, port, sys.executable or "python"
    )


def gpus_here(devices: Path = Path("/dev")) -> int:
    """NVIDIA GPUs of this machine, by their device files; where there are none, as under WSL, by nvidia-smi."""
    files = [path for path in devices.glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)]
    if files or shutil.which("nvidia-smi") is None:
        return len(files)
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return len(re.findall(r"^GPU \d+:", done.stdout, flags=re.MULTILINE)) if done.returncode == 0 else 0


def visible_gpus(visible: str | None, there: int) -> int:
    """How many of the GPUs CUDA_VISIBLE_DEVICES leaves: as CUDA reads it, what follows an invalid entry is not seen."""
    if visible is None or there == 0:
        return there
    count = 0
    for entry in visible.split(","):
        entry = entry.strip()
        if not entry or entry.startswith("-") or (entry.isdigit() and int(entry) >= there):
            break
        count += 1
    return count


def is_free(port: int) -> bool:
    """Whether a program on this machine could listen on the port."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("", port))
        except OSError:
            return False
    return True
