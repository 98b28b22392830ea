"""Real runs for a tenth of the price: one process imports torch once, and every run is forked from it.

A run is `python -m dist_train ARGV` on some ranks: a forked process has its command line, environment, output and exit
code. What a test plants in a rank is a function, called there before the run begins; the product has no hook for it.
The processes of workers.py are forked from one as well.
"""

import contextlib
import faulthandler
import gc
import importlib
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

TIMEOUT_S = 40.0
# Imported before the fork: what a run would import.
WARM = ("dist_train.run.session", "dist_train.backends.single", "dist_train.backends.ddp", "dist_train.backends.fsdp2")
WARM += ("dist_train.data.synthetic", "dist_train.models.mlp", "torch._dynamo", "torch.distributed.fsdp", "faults")
WARM += ("torch._inductor", "torch._subclasses.fake_tensor", "torch.utils.flop_counter", "torch.utils.serialization")
WARM += ("dist_train.__main__", "dist_train.run.start", "dist_train.tasks.classification", "s3fs")
# What runs with the libraries need beside it.
LIBRARIES = (
    *("deepspeed", "deepspeed.runtime.zero.muon.original_muon", "accelerate", "peft", "torchvision.models"),
    *("transformers.models.bert.modeling_bert", "dist_train.backends.accelerate", "dist_train.backends.deepspeed"),
    *("dist_train.tasks.classification", "dist_train.tasks.multi_label", "dist_train.tasks.regression"),
    "dist_train.tasks.segmentation",
)


@dataclass(frozen=True)
class Run:
    """A run to start.

    Args:
        argv: of `python -m dist_train`.
        ranks: how many; 1 is a process alone.
        plant: by rank, a function of the module `faults` and its arguments, called in the rank before the run.
        kill_all: when a rank was killed, kill the others at once; else they end by themselves.
        cwd: the folder to start in; None for that of the tests.
        script: a Python file to run in place of the package, in `cwd`.
        launched: by torchrun, also where it is one rank alone.
        timeout_s: after which a rank ends with its stack.
    """

    argv: list[str]
    ranks: int = 1
    plant: dict[int, tuple[Any, ...]] | None = None
    kill_all: bool = False
    cwd: str | None = None
    script: str | None = None
    launched: bool = False
    timeout_s: float = TIMEOUT_S


@dataclass(frozen=True)
class Ended:
    """What a run left, by rank: exit codes (negative: the signal), output and errors."""

    codes: list[int]
    out: list[str]
    err: list[str]
    seconds: float

    def check(self) -> "Ended":
        """Itself, if all ranks ended well."""
        assert set(self.codes) == {0}, self
        return self


class Zygote:
    """The process that is forked; see the module.

    Args:
        more: modules that it imports beside those of WARM.
    """

    def __init__(self, *more: str) -> None:
        self.more = more
        self.process: subprocess.Popen | None = None
        self.link: Connection | None = None

    def run(self, *runs: Run) -> list[Ended]:
        """Starts the runs at the same moment, and waits for all."""
        return self._ask("_run", runs)

    def fork(self, module: str, function: str, *each: tuple[Any, ...]) -> list[int]:
        """Calls a function in a new process for each of these arguments. The processes' ids."""
        return self._ask("_fork", module, function, each)

    def wait(self, pid: int) -> int:
        """The exit code of a process that `fork` has made, when it has ended; negative: the signal."""
        return self._ask("_wait_for", pid)

    def _ask(self, *request: Any) -> Any:
        if self.process is None:
            # One thread, for the fork to be safe.
            threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
            environment = os.environ | threads | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
            with Listener(family="AF_UNIX") as listener:
                serve = f"import zygote; zygote._serve({listener.address!r}, {self.more!r})"
                self.process = subprocess.Popen([sys.executable, "-c", serve], env=environment)
                self.link = listener.accept()
        self.link.send(request)
        answer, error = self.link.recv()
        assert error is None, error
        return answer

    def close(self) -> None:
        """Ends it."""
        if self.process is not None:
            self.link.close()
            self.process.wait()


def _serve(address: str, more: tuple[str, ...]) -> None:
    for name in (*WARM, *more):
        importlib.import_module(name)
    gc.freeze()  # a collection in a forked process would copy every page
    link = Client(address, family="AF_UNIX")
    while True:
        try:
            name, *arguments = link.recv()
        except EOFError:  # the tests' process is gone
            return
        try:
            answer = globals()[name](*arguments), None
        except Exception:
            answer = None, traceback.format_exc()
        link.send(answer)


_ended: dict[int, int] = {}  # of processes that were not waited for yet: how they ended


def _wait() -> tuple[int, int]:
    """Any process, and how it ended."""
    pid, status = os.wait()
    return pid, os.waitstatus_to_exitcode(status)


def _wait_for(pid: int) -> int:
    while pid not in _ended:
        other, code = _wait()
        _ended[other] = code
    return _ended.pop(pid)


def _fork(module: str, function: str, each: tuple[tuple[Any, ...], ...]) -> list[int]:
    assert len(os.listdir("/proc/self/task")) == 1, "threads do not survive a fork"
    pids = []
    for arguments in each:
        pid = os.fork()
        if not pid:
            try:
                getattr(importlib.import_module(module), function)(*arguments)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(99)
        pids.append(pid)
    return pids


def _run(runs: tuple[Run, ...]) -> list[Ended]:
    assert len(os.listdir("/proc/self/task")) == 1, "threads do not survive a fork"
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        place: dict[int, tuple[int, int]] = {}  # by process
        for i, run in enumerate(runs):
            port = _free_port()
            for rank in range(run.ranks):
                pid = os.fork()
                if not pid:
                    _rank(run, rank, port, Path(folder) / f"{i}.{rank}")
                place[pid] = i, rank
        left, codes = set(place), {}
        seconds = [0.0] * len(runs)
        while left:
            pid, code = _wait()
            if pid not in place:
                _ended[pid] = code
                continue
            left.discard(pid)
            i, rank = place[pid]
            codes[i, rank] = code
            seconds[i] = time.perf_counter() - begin
            if runs[i].kill_all and code < 0:
                for other in left:
                    if place[other][0] == i:
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(other, signal.SIGKILL)
        read = [
            [
                [(Path(folder) / f"{i}.{rank}.{kind}").read_text() for rank in range(run.ranks)]
                for kind in ("out", "err")
            ]
            for i, run in enumerate(runs)
        ]
    return [Ended([codes[i, rank] for rank in range(run.ranks)], *read[i], seconds[i]) for i, run in enumerate(runs)]


def _rank(run: Run, rank: int, port: int, output: Path) -> None:
    """In the forked process. Does not return."""
    try:
        for fd, kind in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{output}.{kind}", os.O_WRONLY | os.O_CREAT), fd)
        faulthandler.dump_traceback_later(run.timeout_s, exit=True)
        if run.ranks > 1 or run.launched:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": run.ranks, "LOCAL_WORLD_SIZE": run.ranks}
            os.environ |= {name: str(value) for name, value in place.items()}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        from dist_train import __main__
        from dist_train.ranks import ending

        ending.ECHO_WAIT_S = 0.1
        sys.argv = ["dist_train", *run.argv]
        if run.plant and rank in run.plant:
            name, *arguments = run.plant[rank]
            getattr(importlib.import_module("faults"), name)(*arguments)
        if run.cwd is not None:
            os.chdir(run.cwd)
        if run.script is not None:
            runpy.run_path(run.script, run_name="__main__")
            ending.leave(ending.OK)
        __main__.main()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(99)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
