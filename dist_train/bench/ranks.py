"""The processes of a cell, seen from the one that leads: it starts them, gives turns, and hears what they took."""

import dataclasses
import os
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any

from dist_train.bench.slices import CONFIG, END, FIRST_STEP, SOCKET, WARM, Ready, Slice
from dist_train.config.load import dump
from dist_train.config.tree import Config, RunConfig

START_S, TURN_S, END_S = 300.0, 600.0, 60.0
POLL_S = 0.2


class NotRun(Exception):
    """A process ended where it should not, or did not answer.

    Args:
        why: what it said.
        refused: it was about the config.
    """

    def __init__(self, why: str, refused: bool = False):
        super().__init__(why)
        self.refused = refused


class Ranks:
    """The processes, from start to end.

    Args:
        program: what Python runs, `-m MODULE` or a file; it is given a folder and `name`.
        name: what it is to run.
        world_size: 1 is a process alone, more are started by torchrun.
        config: that they read; its run.dir becomes one of theirs.
        by_torchrun: also one process.

    Attributes:
        start_s: from the start of the command until all ranks had taken their first step.
        ready: what each rank said after its first steps.
    """

    def __init__(self, program: list[str], name: str, world_size: int, config: Config, by_torchrun: bool):
        self.program, self.name, self.world_size, self.config = program, name, world_size, config
        self.starter = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"]
        self.starter = self.starter if by_torchrun else []
        self.links: list[Connection] = []
        self.start_s = 0.0
        self.ready: list[Ready] = []

    def __enter__(self) -> "Ranks":
        """Starts them. Raises NotRun."""
        self.home = tempfile.TemporaryDirectory(prefix="bench")
        folder = Path(self.home.name)
        self.log = (folder / "log").open("w+", encoding="utf-8")
        self.process: subprocess.Popen[str] | None = None
        try:
            self._start(folder)
        except BaseException:
            self.kill()
            raise
        return self

    def _start(self, folder: Path) -> None:
        config = dataclasses.replace(self.config, run=RunConfig(str(folder / "run")))
        (folder / CONFIG).write_text(dump(config), encoding="utf-8")
        environment = os.environ | {"OMP_NUM_THREADS": str(self.config.train.threads)}
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(folder / SOCKET))
            server.listen()
            server.settimeout(POLL_S)
            begin = time.perf_counter()
            words = [sys.executable, *self.starter, *self.program, str(folder), self.name]
            self.process = subprocess.Popen(words, stdout=self.log, stderr=self.log, text=True, env=environment)
            found: dict[int, Connection] = {}
            while len(found) < self.world_size:
                try:
                    link = Connection(server.accept()[0].detach())
                except TimeoutError:
                    self._still_there(begin + START_S)
                    continue
                found[link.recv()] = link
        self.links = [found[rank] for rank in range(self.world_size)]
        self._hear(FIRST_STEP, begin + START_S)
        self.start_s = time.perf_counter() - begin
        self.ready = self._hear(None, begin + START_S)

    def warm(self) -> None:
        """The references take their first steps."""
        self._say(WARM, 0)
        self._hear(WARM, time.perf_counter() + START_S)

    def turn(self, name: str, steps: int) -> list[Slice]:
        """Some steps of one of them, by rank. Raises NotRun."""
        self._say(name, steps)
        return self._hear(None, time.perf_counter() + TURN_S)

    def end(self) -> None:
        """Lets them come to their end. Raises NotRun."""
        self._say(END, 0)
        assert self.process is not None
        try:
            code = self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            raise NotRun(f"did not end within {END_S:.0f} s") from None
        if code:
            raise self._ended(code)

    def kill(self) -> None:
        """Ends them at once."""
        for link in self.links:
            link.close()  # at which a rank ends by itself
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.log.close()
        self.home.cleanup()

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.kill()

    def _say(self, name: str, steps: int) -> None:
        for link in self.links:
            try:
                link.send((name, steps))
            except OSError:
                self._gone()

    def _hear(self, expected: str | None, deadline: float) -> list[Any]:
        """A message of every rank, by rank."""
        answers: dict[int, Any] = {}
        while len(answers) < self.world_size:
            pending = {link: rank for rank, link in enumerate(self.links) if rank not in answers}
            for link in wait(list(pending), timeout=POLL_S):
                try:
                    answers[pending[link]] = link.recv()
                except (EOFError, OSError):
                    self._gone()
            self._still_there(deadline)
        found = [answers[rank] for rank in range(self.world_size)]
        assert expected is None or found == [expected] * self.world_size, found
        return found

    def _still_there(self, deadline: float) -> None:
        assert self.process is not None
        if self.process.poll() is not None:
            raise self._ended(self.process.returncode)
        if time.perf_counter() > deadline:
            raise NotRun("did not answer in time")

    def _gone(self) -> None:
        """A rank has closed its connection: its process will end."""
        assert self.process is not None
        try:
            code = self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            code = 0
        raise self._ended(code)

    def _ended(self, code: int) -> NotRun:
        """The error, with the line that says why, of what they wrote."""
        self.log.seek(0)
        lines = [line.strip() for line in self.log if line.strip()]
        refused = [line.removeprefix("dist_train: ") for line in lines if line.startswith("dist_train:")]
        ranks = [line for line in lines if line.startswith("[rank ")]
        said = refused or ranks[-1:] or lines[-1:] or [f"exit code {code}"]
        return NotRun(said[0], bool(refused))


def of(config: Config, name: str, world_size: int) -> Ranks:
    """The processes of ours, or of a reference alone."""
    return Ranks(["-m", "dist_train.bench.worker"], name, world_size, config, config.backend.name != "single")
