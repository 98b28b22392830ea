"""Versions of Python and of the libraries, against what the package's own metadata asks for."""

import contextlib
import platform
import re
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from dist_train.backends import LIBRARIES, chosen
from dist_train.config.tree import Config
from dist_train.doctor.report import Line
from dist_train.ranks.launcher import Launcher

PACKAGE = "dist-train"
# The optional libraries that a run may import; their extras have the same names.
OPTIONAL = ("accelerate", "deepspeed", "wandb", "tensorboard")


def check(config: Config, launcher: Launcher) -> Iterator[Line]:
    """A line for Python, each library and CUDA."""
    try:
        asked = metadata.requires(PACKAGE) or []
        python = metadata.metadata(PACKAGE)["Requires-Python"] or ""
    except metadata.PackageNotFoundError:
        mend = "pip install -c constraints.txt .   in the folder of the source"
        yield Line("fail", PACKAGE, "is not installed: no metadata that says what is supported", mend)
        return
    yield _compare("python", platform.python_version(), _least(python), f"install Python {_least(python)} or newer")
    needed = {LIBRARIES.get(chosen(config.backend.name, launcher.name))}
    needed |= {name for name in ("wandb", "tensorboard") if getattr(config.track, name)}
    for requirement in asked:
        name = re.match(r"[\w.-]+", requirement)[0]
        extra = re.search(r"extra == .(\w+)", requirement)
        if not extra:
            yield _library(name, _least(requirement), True, name)
        elif extra[1] == name and name in OPTIONAL:
            yield _library(name, _least(requirement), name in needed, f"{PACKAGE}[{name}]")
    yield from _cuda(config)


def installed() -> dict[str, str]:
    """Versions of the optional libraries that are there."""
    found = {}
    for name in OPTIONAL:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _library(name: str, least: str, needed: bool, source: str) -> Line:
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        if not needed:
            return Line("pass", name, "not installed, and this run does not need it", facts={"version": None})
        return Line("fail", name, f"not installed, but this run needs {least} or newer", f"pip install '{source}'")
    line = _compare(name, version, least, f"pip install -U '{name}>={least}'")
    if line.status == "pass" or needed:
        return line
    return Line("warn", name, f"{line.what}; this run does not need it", line.mend, line.facts)


def _compare(name: str, version: str, least: str, mend: str) -> Line:
    facts = {"version": version, "supported": f">={least}"}
    if _numbers(version) < _numbers(least):
        return Line("fail", name, f"got {version}, expected {least} or newer", mend, facts)
    return Line("pass", name, f"{version} ({least} or newer)", facts=facts)


def _least(requirement: str) -> str:
    """The version after >= in a requirement; this package writes no other."""
    found = re.search(r">=\s*([\w.]+)", requirement)
    return found[1] if found else "0"


def _numbers(version: str) -> tuple[int, ...]:
    """What of a version is compared: 2.14.1+cu130 is (2, 14, 1)."""
    return tuple(int(part) for part in re.match(r"\d*(?:\.\d+)*", version)[0].split(".") if part)


def _cuda(config: Config) -> Iterator[Line]:
    """CUDA and nccl as torch was built with them, against the machine's driver."""
    import torch

    built, present = torch.version.cuda, driver()
    if built is None:
        status = "warn" if present else "pass"
        what = f"torch {torch.__version__} is built without it"
        mend = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu130"
        yield Line(status, "cuda", what + (f", but there is {present}" if present else ""), mend, {"cuda": None})
        return
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else None
    facts = {"cuda": built, "nccl": nccl, "devices": torch.cuda.device_count()}
    if torch.cuda.is_available():
        yield Line("pass", "cuda", f"{built}, {torch.cuda.device_count()} devices", facts=facts)
    elif present:
        status = "fail" if config.train.device == "cuda" else "warn"
        mend = f"nvidia-smi   shows the driver's CUDA, which must not be older than {built}; update the driver"
        what = f"torch is built for {built} and finds no device, but there is {present}"
        yield Line(status, "cuda", what, mend, facts)
    else:
        yield Line("pass", "cuda", f"torch is built for {built}; no device on this machine", facts=facts)
    yield Line("pass", "nccl", f"{nccl or 'not built in'}", facts=facts)


def driver(devices: Path = Path("/dev")) -> str:
    """What shows that this machine has an NVIDIA device; empty where nothing does."""
    found = sorted(devices.glob("nvidia[0-9]*"))
    if found:
        return str(found[0])
    return shutil.which("nvidia-smi") or ""
