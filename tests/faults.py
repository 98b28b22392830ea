"""What goes wrong in a rank: planted by functions that are called in its process before the run; see `zygote`."""

import contextlib
import ctypes
import fcntl
import functools
import glob
import json
import logging
import os
import re
import resource
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as torch_dist

from dist_train import versions
from dist_train.backends import BACKENDS, rules
from dist_train.backends.shards import local_of, shards_of
from dist_train.checkpoint import save, storage
from dist_train.config.lookup import load
from dist_train.data import vision
from dist_train.data.batch import Batch
from dist_train.data.feed import Feed
from dist_train.data.sets import Data
from dist_train.doctor import link, machine, meeting
from dist_train.loop import audit, meter
from dist_train.loop.evaluate import Sums
from dist_train.models.mlp import MLP
from dist_train.ranks import dist, ending, orphan, rendezvous, watchdog
from dist_train.ranks.phases import Phases
from dist_train.run import assemble, folder, session
from dist_train.run.early_stopping import EarlyStopping


class Event(NamedTuple):
    """What a rank is about to do to the files of its checkpoints.

    Args:
        at: seconds by a clock that all ranks of a machine share.
        what: mkdir, open (for writing), write, fsync, rename, remove or rmdir.
        path: below the folder of checkpoints; "." is that folder.
        to: of a rename.
    """

    at: float
    what: str
    path: str
    to: str


Moment = tuple[str, str, str, int]  # before an event: what, path and to, and how many such came before it


def moments(events: list[Event]) -> list[Moment]:
    """The moment of each event."""
    before: Counter[tuple] = Counter()
    found = []
    for event in events:
        found.append((*event[1:], before[event[1:]]))
        before[event[1:]] += 1
    return found


def watch(root: str, then: Callable[[Event], None]) -> None:
    """Calls `then` before everything that this process does to files below `root`, in whatever thread.

    Python tells of every file that it opens, renames or removes; writes and fsync, of which it does not, are wrapped.
    """
    inside = threading.local()  # what `then` does itself is no event

    def event(what: str, path: Any, to: Any = None, parent: int = -1) -> None:
        if getattr(inside, "busy", False):
            return
        inside.busy = True
        try:
            path = os.fsdecode(path)
            if parent >= 0:  # rmtree names files by their folder
                path = os.path.join(os.readlink(f"/proc/self/fd/{parent}"), path)
            if f"{path}/".startswith(f"{root}/"):
                after = alike(os.path.relpath(os.fsdecode(to), root)) if to else ""
                then(Event(time.monotonic(), what, alike(os.path.relpath(path, root)), after))
        finally:
            inside.busy = False

    def hook(name: str, arguments: tuple) -> None:
        if name == "open":
            path, _, flags = arguments
            if not isinstance(path, int) and flags & (os.O_WRONLY | os.O_RDWR):
                event("open", path)
        elif name == "os.mkdir":
            event("mkdir", arguments[0])
        elif name == "os.rename":
            event("rename", arguments[0], to=arguments[1])
        elif name in ("os.remove", "os.rmdir"):
            event(name.removeprefix("os."), arguments[0], parent=arguments[1])

    fsync, write = os.fsync, storage._Hashed.write

    def told_fsync(fd: int) -> None:
        event("fsync", os.readlink(f"/proc/self/fd/{fd}"))
        fsync(fd)

    def told_write(self: storage._Hashed, data: Any) -> int:
        event("write", self.name)
        return write(self, data)

    os.fsync, storage._Hashed.write = told_fsync, told_write
    sys.addaudithook(hook)


def alike(path: str) -> str:
    """A path as it is in every start: the folder that is written in has the start's own name."""
    return re.sub(r"^\.writing-[0-9a-f]{8}-", ".writing-", path)


def actual(root: str, path: str) -> str | None:
    """Where a path that `alike` gave is in this start."""
    found = glob.glob(os.path.join(root, path.replace(".writing-", ".writing-????????-")))
    return found[0] if found else None


def trace(root: str, path: str) -> None:
    """Writes every event to a file, a line each."""
    out = os.open(path, os.O_WRONLY | os.O_CREAT)
    watch(root, lambda event: os.write(out, f"{json.dumps(event)}\n".encode()))


def traced(path: Path) -> list[Event]:
    """What `trace` wrote."""
    return [Event(*json.loads(line)) for line in path.read_text().splitlines()]


def at_event(root: str, moment: Moment, act: Callable[[Event], None]) -> None:
    """Calls `act` before an event."""
    left = [moment[-1]]

    def maybe(event: Event) -> None:
        if event[1:] == moment[:-1]:
            left[0] -= 1
            if left[0] == -1:
                act(event)

    watch(root, maybe)


def kill_at(root: str, moment: Moment) -> None:
    """Kills this process before an event. Of a file that is not synced yet only a half is there afterwards."""

    def kill(event: Event) -> None:
        if event.what == "fsync":
            path = actual(root, event.path)
            if path is not None and os.path.isfile(path):
                os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)  # the signal comes when it comes

    at_event(root, moment, kill)


def _written(root: str, path: str) -> bool:
    found = actual(root, path)
    return found is not None and time.time() - os.path.getmtime(found) > 0.2


def fill_at(root: str, moment: Moment, filler: str, other: str | None = None) -> None:
    """Fills the file system before an event, once the file `other` has been written."""

    def fill(_: Event) -> None:
        while other and not _written(root, other):
            time.sleep(0.02)
        with open(filler, "wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass

    at_event(root, moment, fill)


def wait_at(root: str, moment: Moment, paused: str, go: str) -> None:
    """Makes the file `paused` before an event, and waits for the file `go`."""

    def wait(_: Event) -> None:
        Path(paused).touch()
        _await(go)

    at_event(root, moment, wait)


def start_after(paused: str, go: str) -> None:
    """Waits for the file `paused`; makes the file `go` when the run ends."""
    _await(paused)
    tell_end(go)


def lock_after(checked: str, go: str) -> None:
    """Makes the file `checked` when the config was found good, and asks for the lock when the file `go` is there."""
    lock = folder._lock

    def late(place: Path, rank: str):
        Path(checked).touch()
        _await(go)
        return lock(place, rank)

    folder._lock = late


def tell_end(go: str) -> None:
    """Makes the file `go` when the run ends."""
    leave = ending.leave

    def told(code: int) -> None:
        Path(go).touch()
        leave(code)

    ending.leave = told


def race(root: str, ended: str) -> None:
    """Of several runs at once, the one that saves waits until another has ended."""
    folder.LOCK_WAIT_S = 0.3
    wait_at(root, ("mkdir", ".writing-step-00000003", "", 0), f"{ended}.paused", ended)
    tell_end(ended)


def ascii_terminal() -> None:
    """As PYTHONIOENCODING=ascii."""
    sys.stdout.reconfigure(encoding="ascii", errors="strict")
    sys.stderr.reconfigure(encoding="ascii", errors="strict")


def without_locks(error: int, *then: Any) -> None:
    """The file system has no locks, and says so by an error; and what else is planted, a function's name and
    arguments."""

    def flock(*_: Any) -> None:
        raise OSError(error, os.strerror(error))

    fcntl.flock = flock
    if then:
        globals()[then[0]](*then[1:])


def _await(path: str) -> None:
    deadline = time.monotonic() + 20
    while not os.path.exists(path):
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.01)


def clock_back(root: str, moment: Moment) -> None:
    """The clock goes back an hour whenever it is read; killed at an event."""
    now = datetime.now(timezone.utc)

    class Clock:
        reads = 0

        @classmethod
        def now(cls, _: timezone) -> datetime:
            cls.reads += 1
            return now - timedelta(hours=cls.reads)

    save.datetime = Clock
    kill_at(root, moment)


def own_folder(parent: str) -> None:
    """This process alone sees an empty folder in the place of `parent`."""
    folder.SEEN_WITHIN_S = 0.5
    libc = ctypes.CDLL(None, use_errno=True)
    new_namespace, private_and_below = 0x20000, 0x40000 | 0x4000
    for done in (
        libc.unshare(new_namespace),
        libc.mount(b"none", b"/", None, private_and_below, None),
        libc.mount(b"none", parent.encode(), b"tmpfs", 0, None),
    ):
        assert done == 0, os.strerror(ctypes.get_errno())


def blind_soon() -> None:
    """A folder that is not seen soon is not seen."""
    folder.SEEN_WITHIN_S = 0.5


def skip_save() -> None:
    """This rank alone does not save."""
    save.Checkpoints.save = lambda self, meter: None


def meet_soon() -> None:
    """Ranks that do not come to a save within a second do not come."""
    save.TOGETHER_S = 1.0


def fail_second_write() -> None:
    """The second write in the background fails, and is over before the next step ends."""
    write, after_step, writes = storage.write, save.Checkpoints.after_step, []

    def failing(folder, state, group):
        writes.append(folder)
        if len(writes) == 2:
            raise OSError(5, "Input/output error")
        return write(folder, state, group)

    def patient(self, meter):
        if self.pending is not None:
            self.pending.exception()  # waits
        after_step(self, meter)

    storage.write, save.Checkpoints.after_step = failing, patient


def write_during_steps(steps: int) -> None:
    """A write in the background ends a while after training has made so many steps more; none is begun meanwhile."""
    write, after_step, made = storage.write, save.Checkpoints.after_step, threading.Semaphore(0)
    begun = []

    class Pool(ThreadPoolExecutor):
        def submit(self, *call):
            assert all(future.done() for future in begun), "two writes at once, and two copies of the state"
            begun.append(super().submit(*call))
            return begun[-1]

    def slow(folder, state, group):
        assert threading.current_thread() is not threading.main_thread()
        if not folder.name.endswith("12"):  # there is no step after the last one
            for _ in range(steps):
                assert made.acquire(timeout=5), "no step was made during the write"
        time.sleep(0.1)
        return write(folder, state, group)

    def counted(self, meter):
        if self.pending is not None:
            made.release()
        after_step(self, meter)

    storage.write, save.Checkpoints.after_step, save.ThreadPoolExecutor = slow, counted, Pool


# -- hangs and stops ---------------------------------------------------------------------------------------------------


def at_phase(phase: str, step: int, act: str) -> None:
    """Does something in the main thread when it comes to a phase of a step, counted from 0."""
    goes_over, done = Phases.__call__, []

    def goes(self: Phases, name: str) -> None:
        goes_over(self, name)
        if name == phase and self.step >= step and not done:
            done.append(True)
            ACTS[act]()

    Phases.__call__ = goes


def _spin() -> None:
    while True:
        pass


def _raise() -> None:
    raise RuntimeError("planted")


ACTS: dict[str, Callable[[], Any]] = {
    "sleep": lambda: time.sleep(60),
    "spin": _spin,
    "raise": _raise,
    "exit 0": lambda: os._exit(0),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "SIGTERM": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "SIGUSR1": lambda: os.kill(os.getpid(), signal.SIGUSR1),
    "SIGINT": lambda: os.kill(os.getpid(), signal.SIGINT),
    "SIGTERM twice": lambda: [os.kill(os.getpid(), signal.SIGTERM) for _ in range(2)],
    "nothing": lambda: None,
}


def eager(phase: str = "start", step: int = 0, act: str = "nothing") -> None:
    """The ranks agree often; and see `at_phase`."""
    meter.AGREE_EVERY_S = 0.0
    at_phase(phase, step, act)


def patient_steps(seconds: float, phase: str = "optimizer") -> None:
    """Every step takes so long, before it comes to a phase."""
    goes_over = Phases.__call__

    def goes(self: Phases, name: str) -> None:
        if name == phase:
            time.sleep(seconds)
        goes_over(self, name)

    Phases.__call__ = goes


def looks_at_values() -> None:
    """The model's way depends on its input's values."""
    MLP.forward = lambda self, x: self.layers(x if float(x.sum()) < 1e9 else -x)


def bad_samples(samples: list[int]) -> None:
    """The loss of every batch with one of these samples is not finite."""
    from_memory = Feed._from_memory

    def poisoned(self: Feed, *args: Any):
        for batch in from_memory(self, *args):
            inputs, labels = batch
            bad = set(batch.ids.tolist()) & set(samples)
            yield Batch((inputs * float("nan") if bad else inputs, labels), batch.ids, batch.size)

    Feed._from_memory = poisoned


def stranger() -> None:
    """Somebody else's connection to rank 0's watchdog, which says what only rank 0 may say, and nonsense."""
    at_the_port([b'{"end": 1}\n{"ask": "stack"}\nno message\n[1]\n{"token": "guessed", "rank": 1}\n'], reset=False)


NONSENSE = {
    "nesting": b"[" * 200_000 + b"\n",
    "no end": b"x" * (1 << 20),
    "no text": b"\xff\xfe\x00" * 9 + b"\n",
    "huge number": b'{"rank": ' + b"9" * 10_000 + b"}\n",
    "not finite": b'{"rank": NaN, "for_s": Infinity}\n',
    "half a line": b'{"rank": 1',
    "nothing": b"",
    "end": b'{"end": 0}\n{"suspects": true}\n',
    "status": b'{"token": "guessed", "rank": 7, "host": "x", "pid": 1, "phase": "data", "step": 1, "for_s": 0}\n',
}


def at_the_port(words: list[bytes], reset: bool, times: int = 1, linger_s: float = 0.0) -> None:
    """Somebody else's connections to rank 0's watchdog, before this rank's own and beside it: one a word, closed after
    a while."""
    connect = watchdog._connect

    def call(port: int) -> None:
        for word in words * times:
            with contextlib.suppress(OSError):
                link = socket.create_connection(("127.0.0.1", port))
                if reset:  # as it is closed
                    link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                link.sendall(word)
                time.sleep(linger_s)
                link.close()

    def both(addresses: list[str], port: int) -> socket.socket | None:
        call(port)
        threading.Thread(target=call, args=(port,), daemon=True).start()
        return connect(addresses, port)

    watchdog._connect = both


def watchdog_fails(times: int) -> None:
    """The watchdog's thread has an error of its own, so often."""
    beat, failed = watchdog.Watchdog._beat, []

    def failing(self: watchdog.Watchdog) -> None:
        if len(failed) < times:
            failed.append(True)
            raise ZeroDivisionError("planted")
        beat(self)

    watchdog.BEAT_S, watchdog.Watchdog._beat = 0.0, failing


def launched_by(pid: int) -> None:
    """The launcher of this rank is a process of the test's."""
    found = orphan._stat(pid)
    orphan.started_by = lambda name: orphan.Started(pid, found[2], "torchrun")
    watchdog.BEAT_S = 0.1
    patient_steps(0.02)


def deaf_without_launcher(pid: int) -> None:
    """So too, but it hangs before it can save."""
    launched_by(pid)
    watchdog.ORPHAN_S = 1.0
    at_phase("forward", 3, "sleep")


def suspend(seconds: float) -> None:
    """Stops in its fourth step, and is continued by another process after a while."""

    def stop() -> None:
        if not os.fork():
            time.sleep(seconds)
            os.kill(os.getppid(), signal.SIGCONT)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGSTOP)

    ACTS["suspend"] = stop
    at_phase("forward", 3, "suspend")


def leave_out(layers: list[int]) -> None:
    """This rank leaves out some of the model's layers when it trains, from the third step on."""
    forward, calls = torch.nn.Sequential.forward, []

    def fewer(self: torch.nn.Sequential, x: torch.Tensor) -> torch.Tensor:
        calls.append(self.training)
        if not self.training or sum(calls) < 3:
            return forward(self, x)
        for i, layer in enumerate(self):
            x = x if i in layers else layer(x)
        return x

    torch.nn.Sequential.forward = fewer


def slow_layer(seconds: float) -> None:
    """A layer of this rank takes long, once, and the watchdog looks at layers sooner than that."""
    forward, slow = torch.nn.Linear.forward, []

    def late(self: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        if self.training and torch_dist.is_initialized() and len(slow) < 9:
            slow.append(True)
            if len(slow) == 9:
                time.sleep(seconds)
        return forward(self, x)

    torch.nn.Linear.forward = late


def look_soon() -> None:
    """The watchdog compares layers where nothing has moved for a moment."""
    watchdog.STILL_S = 0.3


def takes_port() -> None:
    """Another program listens at the port where the ranks are to meet, and does not answer."""
    taken.append(socket.create_server(("", int(os.environ["MASTER_PORT"]))))


taken: list[socket.socket] = []


def speaks_soon() -> None:
    """Who waits for ranks says so after a moment."""
    rendezvous.SPEAKS_AFTER_S = (0.3, 60.0)
    dist.joined.__wrapped__.__defaults__ = (1.5, 1)


# -- what the doctor is to find ----------------------------------------------------------------------------------------


def set_environment(variables: dict[str, str]) -> None:
    """Variables that another program left, or a user set."""
    os.environ.update(variables)


def wait_less(seconds: float) -> None:
    """The doctor waits for other ranks so long."""
    meeting.COME_WITHIN_S, meeting.MORE_S = seconds, 0.5


def installed(folder: str) -> None:
    """The distributions in this folder are the first that Python finds."""
    sys.path.insert(0, folder)


def not_installed(name: str) -> None:
    """This library has never been installed."""
    version, find = metadata.version, rules.find_spec

    def absent(asked: str) -> str:
        if asked == name:
            raise metadata.PackageNotFoundError(name)
        return version(asked)

    metadata.version = absent
    rules.find_spec = lambda asked: None if asked == name else find(asked)


def listens_only() -> None:
    """A stranger in the place of rank 0: it takes connections, and never answers."""
    server = socket.create_server(("", int(os.environ["MASTER_PORT"])))
    taken, _ = server.accept()
    server.settimeout(20)
    with contextlib.suppress(OSError):
        kept, _ = server.accept()
        kept.settimeout(20)
        while kept.recv(1 << 16):
            pass
    taken.close()
    os._exit(0)


def leaves() -> None:
    """A rank that ends before it has met the others."""
    os._exit(0)


def clock_ahead(seconds: float) -> None:
    """This rank's clock is ahead."""
    now = time.time
    time.time = lambda: now() + seconds


def flips_bits(least_bytes: int) -> None:
    """What this rank receives of a large sum has a wrong bit."""
    reduce = torch_dist.all_reduce

    def wrong(tensor: Any, *arguments: Any, **options: Any) -> None:
        reduce(tensor, *arguments, **options)
        if tensor.nbytes >= least_bytes:
            tensor.view(-1)[-1] += 1

    torch_dist.all_reduce = wrong


def torn_checkpoint(by: str) -> None:
    """A disk that acknowledges what it did not write: a byte differs, or the last ones are not there."""
    write = storage.write

    def torn(folder: Path, state: Any, group: Any) -> Any:
        files = write(folder, state, group)
        path = next(folder / name for name in files if name != ".metadata")
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data if by == "flip" else data[:-1000])
        return files

    storage.write = torn


def other_version(name: str) -> None:
    """This rank has another version of a library."""
    used = versions.versions
    versions.versions = lambda: used() | {name: "0.0.1"}


def broken_check() -> None:
    """A check of the doctor has a mistake."""

    def raises() -> tuple[int, int]:
        raise KeyError("MemAvailable")

    machine.memory = raises


def few_files(limit: int) -> None:
    """ulimit -n."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))


def far_apart() -> None:
    """The ranks are on two nodes, whose link is below what is expected."""
    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    meeting.several_nodes = lambda launcher: False  # they meet at 127.0.0.1 all the same
    link.SLOW_GB_PER_S = 1e9


def weigh(backend: str, path: str) -> None:
    """Writes the bytes of weights and gradients before the first update, and of the optimizer's state after it."""
    kind = load(BACKENDS, backend, "backend.name")
    step, done = kind.step, []

    def weighed(self: Any, *arguments: Any, **options: Any) -> Any:
        weights = [p for group in self.optimizer.param_groups for p in group["params"]]
        held = [_bytes(weights), _bytes([p.grad for p in weights])]
        norm = step(self, *arguments, **options)
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        if not done:
            done.append(Path(path).write_text(json.dumps([*held, _bytes(states)])))
        return norm

    kind.step = weighed


def peak_memory(path: str) -> None:
    """Writes the most bytes of memory that the process had while it trained. Tensors are mapped each by itself and
    unmapped when they are freed, so that what is counted is what is in use."""
    libc, train, m_mmap_threshold = ctypes.CDLL(None), session.train, -3
    libc.mallopt(m_mmap_threshold, 1 << 16)

    def weighed(work: Any) -> Any:
        libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # counts VmHWM from here
        result = train(work)
        status = Path("/proc/self/status").read_text()
        Path(path).write_text(str(int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 1024))
        return result

    session.train = weighed


def _bytes(tensors: list[Any]) -> int:
    """Of what this rank holds."""
    return sum(part.nbytes for t in tensors if isinstance(t, torch.Tensor) for _, part in shards_of(t).boxes)


def temporary_folder(path: str) -> None:
    """TMPDIR."""
    os.environ["TMPDIR"] = path
    tempfile.tempdir = None  # what it was when the process was made


def small_shared_memory(size: str) -> None:
    """This process and its children alone see so small a /dev/shm."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_namespace, private_and_below = 0x20000, 0x40000 | 0x4000
    for done in (
        libc.unshare(new_namespace),
        libc.mount(b"none", b"/", None, private_and_below, None),
        libc.mount(b"none", b"/dev/shm", b"tmpfs", 0, f"size={size}".encode()),
    ):
        assert done == 0, os.strerror(ctypes.get_errno())


def fingerprint_during(step: int | None) -> None:
    """The hash over the data is there once a step has been made; or may not be asked for."""
    made, fingerprint, goes_on = threading.Event(), Data.fingerprint, Phases.progressed

    def progressed(self: Phases, *steps: int) -> None:
        goes_on(self, *steps)
        if step is not None and self.step >= step:
            made.set()

    def late(self: Data) -> str:
        assert step is not None, "the hash is rank 0's to make"
        assert made.wait(15), "training waits for the hash"
        return fingerprint(self)

    Phases.progressed, Data.fingerprint = progressed, late


# -- what a run says ---------------------------------------------------------------------------------------------------


def placed(environment: dict[str, str], name: str | None = None, *arguments: Any) -> None:
    """Variables of the environment; and another function of this module."""
    os.environ.update(environment)
    if name is not None:
        globals()[name](*arguments)


def on_terminal(path: str, name: str | None = None, *arguments: Any) -> None:
    """Output and errors go to a terminal; and another function of this module."""
    terminal = os.open(path, os.O_RDWR | os.O_NOCTTY)
    for fd in (1, 2):
        os.dup2(terminal, fd)
    os.environ["TERM"] = "xterm-256color"
    if name is not None:
        globals()[name](*arguments)


def modules_at_end(path: str) -> None:
    """Writes the names of all modules to a file when the run ends."""
    leave = ending.leave

    def told(code: int) -> None:
        Path(path).write_text("\n".join(sys.modules))
        leave(code)

    ending.leave = told


def warn(then: str = "nothing") -> None:
    """Warns when the first step begins, in Python's two ways, and does something."""

    def both() -> None:
        warnings.warn("planted one", stacklevel=1)
        logging.getLogger("planted").warning("planted two")
        ACTS[then]()

    ACTS["warn"] = both
    at_phase("forward", 0, "warn")


def without_wandb_core(step: int) -> None:
    """W&B's own process is killed when the step begins."""

    def kill() -> None:
        for task in Path("/proc/self/task").iterdir():
            for pid in (task / "children").read_text().split():
                if b"wandb-core" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(int(pid), signal.SIGKILL)

    ACTS["kill wandb-core"] = kill
    at_phase("forward", step, "kill wandb-core")


def report_memory(path: str, copies: bool = False) -> None:
    """Writes what this process holds in memory, in bytes: JSON, a list of moments of the run, and the peak.

    Args:
        path: of the file.
        copies: plant a rank that holds the pixels by itself.
    """
    moments_: list[dict[str, int]] = []
    written: list[int | None] = []
    goes_over, progressed, ended = Phases.__call__, Phases.progressed, ending.leave

    def sample() -> None:
        lines = [line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]]
        moments_.append({kind.rstrip(":"): int(amount) * 1024 for kind, amount, _ in lines})
        written[:] = [_private_bytes("-ubyte")]

    def goes(self: Phases, name: str) -> None:
        goes_over(self, name)
        if name == "checkpoint" or (name == "optimizer" and self.step % 10 == 0):
            sample()

    def goes_on(self: Phases, *step: int) -> None:
        progressed(self, *step)
        if self.name == "evaluate":
            sample()

    def leave(code: int) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        Path(path).write_text(json.dumps({"moments": moments_, "peak_rss": peak, "written": written[0]}))
        ended(code)

    Phases.__call__, Phases.progressed, ending.leave = goes, goes_on, leave
    if copies:
        mapped, vision.idx.mapped = vision.idx.mapped, lambda *of: mapped(*of).clone()


def _private_bytes(name: str) -> int | None:
    """Bytes that this process wrote to its private mappings of files with `name` in their path; None without any."""
    inside, found = False, None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            inside = name in line
        elif inside and line.startswith("Anonymous:"):
            found = (found or 0) + int(line.split()[1]) * 1024
    return found


def forgets_early_stopping() -> None:
    """The state of early stopping is not taken from a checkpoint."""
    EarlyStopping.load = lambda self, state: None


def tells_what_follows_a_step() -> None:
    """Prints what the loop calls after each step."""
    trains = session.train

    def tells(work: Any) -> Any:
        print("after a step:", work.after_step.__qualname__)
        return trains(work)

    session.train = tells


def another_epochs_order() -> None:
    """Steps are made up of the samples that the next epoch has there."""
    from dist_train.data.order import Plan

    own = Plan.indices
    Plan.indices = lambda plan, epoch, *where: own(plan, epoch + 1, *where)


# -- means that are no means over all ranks ----------------------------------------------------------------------------


def own_units(tensor: torch.Tensor) -> dist.Pending:
    """Each rank's own units, as many times as there are ranks: what a mean over ranks makes of them."""
    return lambda: tensor * torch_dist.get_world_size()


OVER_RANKS = Sums.over_ranks


def averaged(sums: Sums) -> dict[str, torch.Tensor]:
    """As if each rank divided by itself, and the ranks' metrics were averaged."""
    sums.tensors = {name: value / sums.tensors["units"] for name, value in sums.tensors.items()}
    return OVER_RANKS(sums)


def units_by_rank() -> None:
    """See `own_units`."""
    dist.sum_later = own_units


def metrics_by_rank() -> None:
    """See `averaged`."""
    Sums.over_ranks = averaged


# -- facts -------------------------------------------------------------------------------------------------------------


def fact_to_another(name: str, argument: str) -> None:
    """What a data set tells of itself is passed to an argument of another name too."""
    asks = assemble.asked

    def asked(function: Any, known: Mapping[str, Any]) -> dict[str, Any]:
        return asks(function, known) | asks(function, {argument: known.get(name)})

    assemble.asked = asked


# -- backends ----------------------------------------------------------------------------------------------------------


def other_backend(name: str, path: str) -> None:
    """Under the name of a backend another class is taken."""
    BACKENDS[name] = path


# -- devices that compute wrongly --------------------------------------------------------------------------------------


def _flip(tensor: torch.Tensor) -> None:
    """One bit of the first number, in the middle of its fraction."""
    local_of(tensor).view(-1)[:1].view(torch.int32).bitwise_xor_(1 << 12)


class _Wrong(torch.autograd.Function):
    """A weight whose gradient has a wrong bit where `due` says so."""

    due: Callable[[], bool]

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor) -> torch.Tensor:
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        if _Wrong.due():
            _flip(gradient)
        return gradient


def flips_gradient(step: int, always: bool = False) -> None:
    """A bit of a weight's gradient is wrong: once, in a step counted from 1, or in every backward from that step on."""
    goes_over, at, done = Phases.__call__, [0], []

    def goes(self: Phases, name: str) -> None:
        goes_over(self, name)
        at[0] = self.step + 1

    def due() -> bool:
        if at[0] < step or (done and not always):
            return False
        done.append(True)
        return True

    def forward(self: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        weight = _Wrong.apply(self.weight) if self.training else self.weight
        return torch.nn.functional.linear(x, weight, self.bias)

    Phases.__call__, _Wrong.due, torch.nn.Linear.forward = goes, due, forward


def flips_weight(step: int) -> None:
    """A bit of a weight changes before a step, counted from 1."""
    goes_over, init, models, done = Phases.__call__, MLP.__init__, [], []

    @functools.wraps(init)
    def made(self: MLP, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        models.append(self)

    def goes(self: Phases, name: str) -> None:
        goes_over(self, name)
        if name == "data" and self.step == step - 1 and not done:
            done.append(True)
            _flip(next(models[-1].parameters()))

    MLP.__init__, Phases.__call__ = made, goes


def compares_with_itself(step: int | None = None) -> None:
    """An audit that compares each digest with itself; and see `flips_gradient`."""
    stack_all = dist.stack_all

    def wrong(tensor: torch.Tensor) -> torch.Tensor:
        every = stack_all(tensor)
        every[:, 1] = every[:, 0].roll(1)
        return every

    dist.stack_all = wrong
    if step is not None:
        flips_gradient(step)


def audits_itself(step: int | None = None) -> None:
    """An audit in which each rank computes its own share again; and see `flips_gradient`, always."""
    audit.NEXT = audit.ARBITER = 0
    if step is not None:
        flips_gradient(step, always=True)


def other_processor() -> None:
    """This rank is on a machine of another kind."""
    audit.hardware = lambda device: "Another CPU (DEFAULT), 1 thread, torch 0.1"
