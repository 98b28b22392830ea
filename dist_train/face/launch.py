"""dist_train.launch: ranks of one machine, started from a script or a notebook. No torch here."""

import multiprocessing
import os
import pickle
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkContext, SpawnContext
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from dist_train.config.given import named
from dist_train.errors import ConfigError, OtherRankError, RankError

Answer = TypeVar("Answer")
# When one rank has failed, the others have so long to say what they saw; then they are ended.
LEAVE_S, TERM_S = 3.0, 5.0
LOOK_S = 0.1
# After an interrupt, for the ranks to save.
SAVE_S = 30.0


@dataclass(frozen=True)
class _Failed:
    """What a rank sends in the place of an answer."""

    error: bytes | None  # pickled, where it can be
    what: str
    text: str
    echo: bool  # of another rank's end


def launch(function: Callable[..., Answer], *args: Any, ranks: int = 2, **kwargs: Any) -> list[Answer]:
    """Calls a function in several new processes of this machine that are ranks of one another, as under torchrun: `fit`
    and `session` join them. What the ranks write is written here.

    A function of a module is called in fresh processes that import it. One that only this process knows (of a cell of a
    notebook, a lambda, a nested one) is called in copies of this process, made by fork: that is refused once this
    process has used a GPU, and such ranks compute with one CPU thread each, as torch's threads do not survive a fork.
    A script that calls this at its top level does so below `if __name__ == "__main__":`.

    Args:
        function: what each rank calls.
        *args: its arguments; those of a function of a module, and all answers, can be pickled.
        ranks: how many.
        **kwargs: more of its arguments.

    Returns:
        What it returned, by rank.

    Raises:
        ConfigError: from a rank, or for what cannot be launched.
        RankError: another error of a rank, with its traceback; the error itself is its `__cause__`, where it can be
            sent. The other ranks are ended within seconds.
    """
    if ranks < 1:
        raise ConfigError(f"launch: got ranks={ranks}, expected at least 1")
    context = _context(function)
    port = _free_port()
    processes: list[BaseProcess] = []
    answers: list[Connection] = []
    outputs: dict[Connection, str] = {}
    try:
        for rank in range(ranks):
            answer, answering = context.Pipe(duplex=False)
            output, writing = context.Pipe(duplex=False)
            place = _place(rank, ranks, port)
            given = place, context.get_start_method() == "fork", answering, writing, function, args, kwargs
            process: BaseProcess = context.Process(target=_rank, args=given, name=f"rank {rank}", daemon=False)
            _start(process)
            answering.close()
            writing.close()
            processes.append(process)
            answers.append(answer)
            outputs[output] = ""
        return _Ranks(processes, answers, outputs).wait()
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
        for link in (*answers, *outputs):
            link.close()


def _context(function: Callable[..., Any]) -> SpawnContext | ForkContext:
    """How processes are made that know the function."""
    found = named(function)
    script = getattr(sys.modules["__main__"], "__file__", None)
    if found is not None and (not found.startswith("__main__:") or (script and os.path.exists(script))):
        return multiprocessing.get_context("spawn")
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        raise ConfigError(
            f"launch: got {getattr(function, '__name__', function)!r}, which only this process knows, after this "
            f"process has used a GPU, which a copy of it cannot; put the function into a module of its own, or start "
            f"the kernel anew and call launch before anything on the GPU"
        )
    return multiprocessing.get_context("fork")


def _start(process: BaseProcess) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        try:
            process.start()
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ConfigError(f"launch: got arguments that cannot be sent to another process: {error}") from error


def _place(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What a starter tells a rank in its environment."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    return {name: str(value) for name, value in numbers.items()} | {"MASTER_ADDR": "127.0.0.1"}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class _Ranks:
    """The ranks, as the process sees them that has started them."""

    def __init__(self, processes: list[BaseProcess], answers: list[Connection], outputs: dict[Connection, str]):
        self.processes, self.answers, self.outputs = processes, answers, outputs
        self.came: dict[int, Any] = {}
        self.failed_at: float | None = None

    def wait(self) -> list[Any]:
        """The answers by rank. Raises what a rank has raised."""
        try:
            while len(self.came) < len(self.processes) and not self._late():
                self._look(LOOK_S)
        except KeyboardInterrupt:
            self._end(signal.SIGTERM, SAVE_S)
            raise
        if self.failed_at is not None:
            self._end(signal.SIGTERM, TERM_S)
        while self.outputs and any(process.is_alive() for process in self.processes):
            self._look(LOOK_S)
        self._look(0)
        self._raise()
        return [self.came[rank] for rank in range(len(self.processes))]

    def _late(self) -> bool:
        return self.failed_at is not None and time.monotonic() - self.failed_at > LEAVE_S

    def _look(self, seconds: float) -> None:
        """Takes what has come within a time."""
        left = {link: rank for rank, link in enumerate(self.answers) if rank not in self.came}
        for link in wait([*left, *self.outputs], seconds):
            assert isinstance(link, Connection)
            if link in self.outputs:
                self._write(link)
                continue
            rank = left[link]
            try:
                self.came[rank] = link.recv()
            except EOFError:
                self.processes[rank].join()
                self.came[rank] = _died(self.processes[rank].exitcode)
            if isinstance(self.came[rank], _Failed) and self.failed_at is None:
                self.failed_at = time.monotonic()

    def _write(self, link: Connection) -> None:
        """Whole lines of what a rank has written."""
        data = os.read(link.fileno(), 1 << 16)
        text = self.outputs[link] + data.decode(errors="replace")
        *lines, rest = text.splitlines(keepends=True) or [""]
        if rest.endswith("\n") or not data:
            lines, rest = [*lines, rest], ""
        sys.stdout.write("".join(lines))
        sys.stdout.flush()
        self.outputs[link] = rest
        if not data:
            del self.outputs[link]
            link.close()

    def _end(self, number: int, seconds: float) -> None:
        """Asks the ranks to end, and makes them."""
        for process in self.processes:
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, number)
        deadline = time.monotonic() + seconds
        while any(process.is_alive() for process in self.processes) and time.monotonic() < deadline:
            self._look(LOOK_S)
        for process in self.processes:
            process.kill()

    def _raise(self) -> None:
        failed = {rank: found for rank, found in self.came.items() if isinstance(found, _Failed)}
        if not failed:
            return
        rank = min(
            failed, key=lambda rank: (failed[rank].echo, not failed[rank].text)
        )  # of equals, the first that came
        found = failed[rank]
        error = RankError(rank, found.what, found.text)
        cause = pickle.loads(found.error) if found.error else None
        if isinstance(cause, ConfigError):
            raise cause from error
        raise error from cause


def _died(code: int | None) -> _Failed:
    what = f"ended with exit code {code}"
    if code is not None and code < 0:
        what = f"was ended by {signal.Signals(-code).name}"
    return _Failed(None, f"{what}, and left no error", "", echo=False)


def _rank(
    place: dict[str, str], forked: bool, answering: Connection, writing: Connection, function: Callable[..., Any],
    args: tuple[Any, ...], kwargs: dict[str, Any],
) -> None:  # fmt: skip
    """In a rank. Does not return."""
    _redirect(writing)
    os.environ.update(place)
    if forked:
        _forget_threads()
    try:
        answer: Any = function(*args, **kwargs)
        data = pickle.dumps(answer)
    except BaseException as error:
        data = pickle.dumps(_failure(error))
    answering.send_bytes(data)
    from dist_train.ranks.ending import leave

    leave(0)


def _redirect(writing: Connection) -> None:
    """What this process writes goes to the one that has started it."""
    for fd in (1, 2):
        os.dup2(writing.fileno(), fd)
    sys.stdout = open(1, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)  # noqa: SIM115


def _forget_threads() -> None:
    """Those of torch that were there before the fork are not here: it waits for them where it wants several."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)


def _failure(error: BaseException) -> _Failed:
    from dist_train.ranks.ending import LOST_PEER

    try:
        sent = pickle.dumps(error)
        pickle.loads(sent)
    except Exception:  # an error of the user's own may be anything
        sent = None
    echo = isinstance(error, OtherRankError) or any(sign in str(error).lower() for sign in LOST_PEER)
    text = "".join(traceback.format_exception(error)).rstrip()
    return _Failed(sent, f"{type(error).__name__}: {error}", text, echo)
