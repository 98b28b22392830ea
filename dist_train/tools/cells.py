"""A cell of the table of `parity`: a config under a backend at a world size, run in processes of its own."""

import contextlib
import dataclasses
import os
import re
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dist_train.config.load import dump
from dist_train.config.tree import Config
from dist_train.errors import ConfigError
from dist_train.ranks.launcher import Launcher
from dist_train.run.check import check

if TYPE_CHECKING:
    from dist_train.tools.agreement import Difference, Trajectory

# A launcher that is told to end takes its ranks with it, which may take it this long.
END_S = 40
# How a traceback ends, and how torchrun tells of the first rank that ended badly.
ERROR = re.compile(r"(?:\[rank \d+\] |dist_train: )?((?:\w+\.)*[A-Za-z_]\w*(?:Error|Exception|Interrupt|Exit)\b.*)")
TOLD = re.compile(r"Root Cause.*?rank\s*:\s*(\d+).*?exitcode\s*:\s*-(\d+)", re.DOTALL)
TAIL = 1 << 20  # bytes of what a cell says that are looked at, from either end


class NotRun(Exception):
    """This machine cannot run the cell, or the config is refused."""


class Failed(Exception):
    """The cell started, and did not come to its end."""


@dataclass(frozen=True)
class Cell:
    """What a cell gave.

    Args:
        own: in the config's own precision.
        exact: in float64; None where the backend or the model has none, or it is the own one.
        rounding: of the reference alone: what rounding does to it.
        no_exact: of the reference alone: why there is no float64.
        share: of the reference alone: how its result depends on each rank's share of a batch.
    """

    own: "Trajectory"
    exact: "Trajectory | None"
    rounding: "Difference | None" = None
    no_exact: str = ""
    share: str = ""


def measure(config: Config, world_size: int, timeout_s: int, exact: bool = True) -> Cell:
    """Runs a cell. Raises NotRun and Failed, with a line for people.

    Args:
        config: with its backend.
        world_size: number of ranks; `single` is started without a launcher.
        timeout_s: for all of it.
        exact: run it in float64 too, where the backend has that.
    """
    from dist_train.tools.trajectory import read, read_rounding

    alone = config.backend.name == "single"
    launcher = Launcher() if alone else Launcher("torchrun", 0, world_size, 0, world_size)
    try:
        check(config, launcher, writes=False)
    except ConfigError as error:
        raise NotRun(error.lines[0]) from error
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "own.yaml").write_text(dump(config), encoding="utf-8")
        wide = dataclasses.replace(config, train=dataclasses.replace(config.train, precision="float64"))
        if exact and config.train.precision != "float64":
            with contextlib.suppress(ConfigError):  # the backend has no float64
                check(wide, launcher, writes=False)
                (folder / "float64.yaml").write_text(dump(wide), encoding="utf-8")
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"]
        command = [sys.executable, *([] if alone else torchrun), "-m", "dist_train.tools.trajectory", name]
        code, said = _run(command, folder, os.environ | {"OMP_NUM_THREADS": str(config.train.threads)}, timeout_s)
        if code and (refused := _text(folder / "refused.txt")):
            raise NotRun(refused)
        if code is None:
            raise Failed(f"no result within {timeout_s} s{_last(said)}")
        if code:
            raise Failed(first_error(said, code))
        files = {path.stem: path for path in folder.glob("*.npz")}
        if "own" not in files:
            raise Failed(f"it ended with exit code 0 and left no result{_last(said)}")
        return Cell(
            read(files["own"]),
            read(files["float64"]) if "float64" in files else None,
            read_rounding(files["rounding"]) if "rounding" in files else None,
            _text(folder / "float64.txt"),
            _text(folder / "share.txt"),
        )


def _run(command: list[str], folder: Path, environment: dict[str, str], timeout_s: float) -> tuple[int | None, str]:
    """The exit code, None if it was ended after `timeout_s`, and what it said. Into a file: a pipe would be held open
    by a process that outlives the cell."""
    with (folder / "said").open("w+b") as said:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=environment)
        try:
            code: int | None = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            size = os.fstat(said.fileno()).st_size  # without what the launcher says of being ended
            _end(process)
        said.seek(0)
        text = said.read(min(size, TAIL))
        at = said.seek(max(said.tell(), size - TAIL))
        return code, (text + said.read(max(0, size - at))).decode(errors="replace")


def _end(process: subprocess.Popen) -> None:
    """Ends a cell that still runs, and its ranks: a launcher that is killed outright would leave them."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def first_error(said: str, code: int) -> str:
    """A line about a cell that failed: the signal that ended a rank, else the end of the first traceback."""
    told = TOLD.search(said)
    if code < 0 or told:
        who, number = (f"rank {told[1]}", int(told[2])) if told else ("it", -code)
        return f"{who} was ended by {signal.Signals(number).name}"
    lines = said.splitlines()
    begins = ("Traceback (most recent call last)", "dist_train: ")  # as Python shows an error, and as we do
    start = next((i for i, line in enumerate(lines) if any(begin in line for begin in begins)), 0)
    found = next((match[1] for line in lines[start:] if (match := ERROR.fullmatch(line.rstrip()))), "")
    return found or f"exit code {code}{_last(said)}"


def _last(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return f"; its last line: {lines[-1][:300]}" if lines else "; it said nothing"


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""
