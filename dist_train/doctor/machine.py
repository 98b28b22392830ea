"""This node: devices, cores, memory, shared memory, open files. Limits of a container count as the machine's."""

import os
import platform
import resource
from collections.abc import Iterator
from pathlib import Path

from dist_train.config.tree import Config
from dist_train.doctor.report import Line, size
from dist_train.ranks.launcher import Launcher

CGROUP = Path("/sys/fs/cgroup")
SHM = "/dev/shm"
LEAST_SHM = 1e9  # a container's is 64 MB, unless it is told otherwise
LEAST_MEMORY = 0.5e9  # for a rank, of which torch alone takes most
UNLIMITED = 1 << 60


def check(config: Config, launcher: Launcher) -> Iterator[Line]:
    """A line for each."""
    yield _cores(launcher)
    yield _memory(launcher)
    yield _shm(config, launcher)
    yield _files(config, launcher)
    yield from _devices(config)


def _cores(launcher: Launcher) -> Line:
    count, what = float(len(os.sched_getaffinity(0))), f"{os.cpu_count()} cores on {platform.node()}"
    allowed = _cpu_quota()
    if count < (os.cpu_count() or 1):
        what += f", {count:.0f} of them for this process"
    if allowed is not None and allowed < count:
        count = allowed
        what += f", of which the container may use {allowed:g}"
    facts = {"cores": count, "host": platform.node()}
    if count < launcher.local_world_size:
        mend = f"start {max(1, int(count))} processes a node, or give the job or container more cores"
        return Line("warn", "cores", f"{what}; fewer than the {launcher.local_world_size} ranks here", mend, facts)
    return Line("pass", "cores", what, facts=facts)


def _cpu_quota() -> float | None:
    """Cores that the control groups of this process allow; None for all."""
    found = []
    for group in _groups():
        quota = _read(group / "cpu.max") or _read(group / "cpu.cfs_quota_us") + _read(group / "cpu.cfs_period_us")
        if len(quota) == 2 and quota[0].isdecimal():
            found.append(int(quota[0]) / int(quota[1]))
    return min(found, default=None)


def _groups() -> Iterator[Path]:
    """The control groups that this process is in: its own and those around it, of both versions."""
    for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        top = CGROUP / controllers
        own = top / path.lstrip("/")
        yield from [own, *(parent for parent in own.parents if parent.is_relative_to(top))]


def memory() -> tuple[int, int]:
    """Bytes of main memory: all, and what can still be had."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    of = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    total, available = of["MemTotal"], of["MemAvailable"]
    for group in _groups():
        most = _read(group / "memory.max") or _read(group / "memory.limit_in_bytes")
        used = _read(group / "memory.current") or _read(group / "memory.usage_in_bytes")
        if most and used and most[0].isdecimal() and int(most[0]) < UNLIMITED:
            # What files left in memory counts as used, and is given back when it is needed.
            stat = _read(group / "memory.stat")
            cached = int(stat[stat.index("inactive_file") + 1]) if "inactive_file" in stat else 0
            total = min(total, int(most[0]))
            available = min(available, int(most[0]) - int(used[0]) + cached)
    return total, available


def _memory(launcher: Launcher) -> Line:
    total, available = memory()
    facts = {"total_bytes": total, "available_bytes": available}
    what = f"{size(available)} of {size(total)} are free"
    if available < LEAST_MEMORY * launcher.local_world_size:
        mend = "ps aux --sort=-rss | head   shows who has it; end that, or start fewer ranks"
        return Line("warn", "memory", f"{what}; {launcher.local_world_size} ranks want more to start", mend, facts)
    return Line("pass", "memory", what, facts=facts)


def _shm(config: Config, launcher: Launcher) -> Line:
    place = os.statvfs(SHM)
    total, free = place.f_blocks * place.f_frsize, place.f_bavail * place.f_frsize
    facts = {"total_bytes": total, "free_bytes": free}
    users = [f"{config.data.workers} workers a rank"] if config.data.workers else []
    users += ["nccl"] if launcher.local_world_size > 1 and Path("/dev/nvidia0").exists() else []
    if users and free < LEAST_SHM:
        mend = "docker run --shm-size=8g ..., or mount -o remount,size=8g /dev/shm"
        return Line("warn", "shared memory", f"{SHM} has {size(free)} free for {' and '.join(users)}", mend, facts)
    return Line("pass", "shared memory", f"{SHM} has {size(free)} free", facts=facts)


def _files(config: Config, launcher: Launcher) -> Line:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft = UNLIMITED if soft == resource.RLIM_INFINITY else soft
    needed = 256 + 4 * launcher.world_size + 64 * config.data.workers  # connections of a rank, pipes of a worker
    facts = {"limit": soft, "needed": needed}
    if soft < needed:
        return Line("warn", "open files", f"ulimit -n is {soft}, expected {needed}", "ulimit -n 65536", facts)
    return Line("pass", "open files", f"ulimit -n is {soft}", facts=facts)


def _devices(config: Config) -> Iterator[Line]:
    """Of CUDA, which tells of its memory."""
    import torch

    if config.train.device == "cpu" or not torch.cuda.is_available():
        return
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        what = f"{torch.cuda.get_device_name(index)}, {size(free)} of {size(total)} free"
        facts = {"total_bytes": total, "free_bytes": free, "device": torch.cuda.get_device_name(index)}
        if free < total / 2:
            yield Line("warn", f"cuda:{index}", what, "nvidia-smi   shows which process has the rest; end it", facts)
        else:
            yield Line("pass", f"cuda:{index}", what, facts=facts)


def _read(path: Path) -> list[str]:
    """The words of a small file; none if it is not there."""
    try:
        return path.read_text(encoding="ascii").split()
    except OSError:
        return []
