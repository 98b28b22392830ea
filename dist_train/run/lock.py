"""One run at a time writes in a folder.

The file system's own lock says so, which ends with the process however it ends. Some file systems have none (NFS
without its lock daemon, some FUSE and Lustre mounts). There a file says who writes, and is touched by a thread as long
as the process lives. It no longer counts once the process is gone or, of a process on another machine, once it was not
touched for a while. An object store has none either; there an object says who writes, and is sent again and again.
"""

import contextlib
import errno
import fcntl
import os
import platform
import re
import secrets
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import IO

from dist_train.checkpoint.urls import Unreachable, Url

# Locked by the process that writes in a run's folder, which says in it who it is.
LOCK = ".lock"
# The file where there are no locks. Its second line tells processes apart: boot, namespace, process, start, chance.
WRITER = ".writer"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)
BEAT_S = 2.0
STALE_S = 30.0
# In an object store, where each beat is paid for.
STORE_BEAT_S = 10.0
STORE_STALE_S = 60.0
# Of two that take the same stale file at the same moment, the first has seen the other's after this long.
SETTLE_S = 0.5


class BusyError(Exception):
    """Another process writes there; the message says which."""


def take(folder: Path, wait_s: float, lost: Callable[[str], None]) -> tuple[Callable[[], None], str | None]:
    """Makes this process the one that writes in a folder.

    Args:
        folder: that is there.
        wait_s: how long to wait for one that is about to end.
        lost: called in a thread, with who writes now, where a file system has no locks and another process has taken
            this one for dead.

    Returns:
        A function that gives the folder free, and why there are no locks; None where there are.

    Raises:
        BusyError: another process writes there.
        OSError: nothing can be written there.
    """
    file = (folder / LOCK).open("a+", encoding="utf-8")
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise BusyError(said_by_holder(file)) from None
            time.sleep(0.1)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            file.close()
            return _Beating(_OnDisk(folder / WRITER), wait_s, lost).close, os.strerror(error.errno)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}\n")
    file.flush()
    return file.close, None


def take_in_store(place: Url, wait_s: float, lost: Callable[[str], None]) -> Callable[[], None]:
    """The same in an object store; see `take`. Raises BusyError, Unreachable."""
    return _Beating(_InStore(place / WRITER), wait_s, lost).close


def holder(folder: Path) -> str | None:
    """The process that writes in a run's folder; None if none does. Many ranks may ask at once."""
    try:
        with (folder / LOCK).open(encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return said_by_holder(file)
            except OSError as error:
                return _beats(folder / WRITER) if error.errno in NO_LOCKS else None
    except (OSError, ValueError):  # no such folder, or a name that none can have
        pass
    return None


def how_to_end(said: str) -> str:
    """The rest of a line that refuses a folder: how its holder, as it has named itself, is ended."""
    pid = said.split()[1] if re.fullmatch(r"process \d+ on \S+", said) else None
    return f"; to end that run, which may have lost its launcher: kill {pid} on {said.split()[-1]}" if pid else ""


def said_by_holder(file: IO[str]) -> str:
    """What the process that has locked a file has written there of itself, a moment after it locked it."""
    for _ in range(20):
        file.seek(0)
        if said := file.read().strip():
            return said
        time.sleep(0.05)
    return "a process that has not said which"


# -- without locks -----------------------------------------------------------------------------------------------------


class _Mark(ABC):
    """What tells who writes."""

    beat_s: float
    stale_s: float

    @abstractmethod
    def make(self, text: str) -> bool:
        """Makes it, by one of several that try; whether by this one."""

    @abstractmethod
    def replace(self, text: str) -> None:
        """Takes the place of what is there."""

    @abstractmethod
    def touch(self, text: str) -> None:
        """Shows that who made it lives."""

    @abstractmethod
    def read(self) -> tuple[str, int]:
        """Its text, and what changes when it is touched; of none, nothing."""

    @abstractmethod
    def remove(self) -> None:
        """Takes it away."""


class _OnDisk(_Mark):
    """A file."""

    def __init__(self, path: Path):
        self.path, self.beat_s, self.stale_s = path, BEAT_S, STALE_S

    def make(self, text: str) -> bool:
        """See _Mark."""
        try:
            with self.path.open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            return False
        return True

    def replace(self, text: str) -> None:
        """See _Mark."""
        beside = self.path.with_name(f"{self.path.name}.{secrets.token_hex(8)}")
        beside.write_text(text, encoding="utf-8")
        beside.replace(self.path)

    def touch(self, text: str) -> None:
        """See _Mark."""
        os.utime(self.path)

    def read(self) -> tuple[str, int]:
        """See _Mark."""
        return _read(self.path)

    def remove(self) -> None:
        """See _Mark."""
        self.path.unlink()


class _InStore(_Mark):
    """An object, whose last line counts the beats."""

    def __init__(self, url: Url):
        self.url, self.beat_s, self.stale_s, self.beats = url, STORE_BEAT_S, STORE_STALE_S, 0

    def make(self, text: str) -> bool:
        """See _Mark."""
        return self.url.create_text(f"{text}0\n")

    def replace(self, text: str) -> None:
        """See _Mark."""
        self.url.write_text(f"{text}{self.beats}\n")

    def touch(self, text: str) -> None:
        """See _Mark."""
        self.beats += 1
        self.replace(text)

    def read(self) -> tuple[str, int]:
        """See _Mark."""
        try:
            text, _, beats = self.url.read_text().rstrip("\n").rpartition("\n")
        except FileNotFoundError:
            return "", 0
        return f"{text}\n", int(beats) if beats.isdecimal() else 0

    def remove(self) -> None:
        """See _Mark."""
        self.url.remove()


class _Beating:
    """What tells who writes, touched until it is closed; see `take`."""

    def __init__(self, mark: _Mark, wait_s: float, lost: Callable[[str], None]):
        self.mark, self.lost = mark, lost
        self.own = f"process {os.getpid()} on {platform.node()}\n{_identity(os.getpid())} {secrets.token_hex(8)}\n"
        if not mark.make(self.own):
            _wait_until_dead(mark, wait_s)
            mark.replace(self.own)
            time.sleep(SETTLE_S)
            if (now := mark.read()[0]) != self.own:
                raise BusyError(_who(now))
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._beat, daemon=True, name="writer")
        self.thread.start()

    def _beat(self) -> None:
        while not self.ended.wait(self.mark.beat_s):
            with contextlib.suppress(OSError, Unreachable):  # a moment without a server is no reason to end
                if (now := self.mark.read()[0]) != self.own:
                    self.lost(_who(now))
                    return
                self.mark.touch(self.own)

    def close(self) -> None:
        """Gives the folder free."""
        self.ended.set()
        self.thread.join()
        with contextlib.suppress(OSError, Unreachable):
            if self.mark.read()[0] == self.own:
                self.mark.remove()


def _wait_until_dead(mark: _Mark, wait_s: float) -> None:
    """Returns when the process that a mark tells of is gone. Raises BusyError when it is seen to live."""
    first = seen = mark.read()
    start = since = time.monotonic()
    while True:
        alive = _lives(seen[0])
        if alive is False or time.monotonic() - since > mark.stale_s:
            return
        if time.monotonic() - start > wait_s and (alive or seen != first):
            raise BusyError(_who(seen[0]))
        time.sleep(mark.beat_s / 20)
        if (now := mark.read()) != seen:
            seen, since = now, time.monotonic()


def _beats(path: Path) -> str | None:
    """Who is told of by a file that counts; None if none is."""
    text, at_ns = _read(path)
    alive = _lives(text) if text else False
    if alive is None:
        alive = abs(time.time() - at_ns / 1e9) < STALE_S
    return _who(text) if alive else None


def _read(path: Path) -> tuple[str, int]:
    """The text of a file, and when it was touched, in nanoseconds; of none, nothing."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:  # opened, NFS asks its server how the file is now
            return file.read(), os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return "", 0


def _who(text: str) -> str:
    return text.partition("\n")[0] or "a process that has not said which"


def _lives(text: str) -> bool | None:
    """Whether the process that a file tells of lives; None where that cannot be seen from here."""
    if not text:
        return None  # not written yet, or removed
    told = text.partition("\n")[2].split()
    here = _identity(os.getpid()).split()
    if len(told) != len(here) + 1 or told[:2] != here[:2] or "?" in told:
        return None
    return told[2].isdecimal() and _identity(int(told[2])).split() == told[:-1]


def _identity(process: int) -> str:
    """Boot of the machine, namespace of processes, process and when it started."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        text = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
        state, *facts = text.rpartition(")")[2].split()
        if state not in ("Z", "X"):  # killed, and waiting for its parent
            return f"{boot} {os.readlink('/proc/self/ns/pid')} {process} {facts[18]}"
    except OSError:  # gone, or no Linux
        pass
    return f"? ? {process} ?"
