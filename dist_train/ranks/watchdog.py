"""Names the rank that is gone, or that all wait for, and ends the run: a collective that hangs tells nothing.

Every process has a thread, and every thread a connection to that of rank 0. When a process ends, its kernel closes the
connection; when a machine or a cable is gone, keepalive notices within LOST_S, whatever Python is doing. When a step
takes longer than it may, rank 0 asks all threads where their main thread stands; where layers are shared out, it asks
after a few seconds already which of them each rank has entered. Time for which a process was suspended does not count.
Anyone can reach the port of rank 0: a connection that does not begin with the run's token is closed unread.
"""

import contextlib
import json
import os
import platform
import secrets
import selectors
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from dist_train.ranks import dist, ending, orphan
from dist_train.ranks.clock import TICK_S
from dist_train.ranks.dist import World
from dist_train.ranks.phases import NAMES, Phases
from dist_train.ranks.speech import marked

LOST_S = 4
BEAT_S = 1.0
ANSWER_S = 2.0
GRACE_S = 2 * ANSWER_S  # after which another rank speaks where rank 0 does not
CONNECT_S = 20.0
STILL_S = 5.0  # in which no rank enters a layer: their journals are compared
STEPS_TOLD = 8  # of a journal
# A rank that its launcher has left and that does not come on to a save ends after so long.
ORPHAN_S = 30.0
# Of connections that have not shown the token: how many, how long, and the bytes of each.
STRANGERS, STRANGER_S, TOKEN_BYTES = 64, 10.0, 64
FAILURES = 3  # of the thread, after which nobody watches
# Where a thread stands that waits for other ranks, or for the device.
LIBRARIES = ("torch", "deepspeed", "accelerate")
STACK_LINES = 12

Status = dict[str, Any]


class Watchdog:
    """The thread of a process.

    Args:
        world: this rank's place.
        phases: of the main thread.
        timeout_s: that a step may take; None for any time.
        orphaned: is called once when the launcher of this rank is gone.
    """

    def __init__(
        self, world: World, phases: Phases, timeout_s: float | None, orphaned: Callable[[], None] = lambda: None
    ):
        self.world, self.phases, self.timeout_s, self.orphaned = world, phases, timeout_s, orphaned
        self.launcher = orphan.started_by(world.launcher)
        self.alone_since: float | None = None  # the launcher is gone
        self.leaving = False
        self.main = threading.main_thread().ident
        self.server = self._listen() if world.is_main and world.size > 1 else None
        port = self.server.getsockname()[1] if self.server else 0
        port, token = dist.on_main(lambda: (port, secrets.token_hex(16)))
        self.token = token.encode()
        self.link = _connect([world.master_addr, "localhost"], port) if world.size > 1 and not world.is_main else None
        if self.link is None and not world.is_main:
            text = f"the watchdog cannot reach rank 0 at {world.master_addr}, port {port}; a lost rank is noticed late"
            print(marked(text, world.rank, world.size), flush=True)
        self.peers: dict[socket.socket, Status] = {}  # of rank 0: what each rank last said
        self.strangers: dict[socket.socket, float] = {}  # of rank 0: who has not shown the token, and since when
        self.buffers: dict[socket.socket, bytes] = {}
        self.suspects = False  # that the ranks' layers differ
        self.cleared = threading.Event()  # they do not
        self.stands: tuple[Any, float] = None, 0.0  # what the loop had reached, and since when
        self.said = 0.0
        if self.link is not None:
            with contextlib.suppress(OSError):  # its end is heard
                self.link.sendall(self.token + b"\n")
                _send(self.link, self._status())
        phases.clock.tick()
        self.thread = threading.Thread(target=self._keep_watch, name="watchdog", daemon=True)
        self.thread.start()

    @staticmethod
    def _listen() -> socket.socket:
        if socket.has_dualstack_ipv6():
            server = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
        else:
            server = socket.create_server(("", 0), backlog=1024)
        server.setblocking(False)  # who has come may be gone again
        return server

    def leave(self) -> None:
        """From here on this rank ends by itself. Where it ends by an error, its end is the news to the others."""
        self.leaving = True

    def close(self) -> None:
        """Ends the thread, when all ranks have left."""
        self.thread.join()
        for link in [*self.buffers, *([self.server] if self.server else []), *([self.link] if self.link else [])]:
            link.close()

    def failed(self) -> None:
        """The main thread has an error of a library's, which may come of layers that differ: if they do, the process
        ends here."""
        if self.phases.journal is not None and self.world.size > 1 and self.thread.is_alive():
            self.cleared.clear()
            self.suspects = True
            self.cleared.wait(3 * ANSWER_S)

    # -- the thread ---------------------------------------------------------------------------------------------------

    def _keep_watch(self) -> None:
        """Watches until this rank leaves. What fails in here is said, and begun again."""
        for left in reversed(range(FAILURES)):
            try:
                self._run()
                break
            except Exception as error:
                more = "it goes on" if left else "nobody watches this rank any more: a hang will not be noticed"
                text = f"[watchdog] failed, {type(error).__name__}: {error}; {more}"
                sys.stderr.write(marked(text, self.world.rank, self.world.size) + "\n")
        self.phases.clock.rest()

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            for link in (self.server, self.link, *self.buffers):
                if link is not None and link.fileno() >= 0 and link not in selector.get_map():
                    selector.register(link, selectors.EVENT_READ)
            while not self.leaving:
                self._listen_for(TICK_S, selector)
                now = time.perf_counter()
                if now - self.said > BEAT_S:
                    self.said = now
                    self._beat()
                self._compare_layers(selector)
                if self.timeout_s is not None:
                    self._judge(self.phases.clock.now() - self.phases.moved - self.timeout_s, selector)

    def _listen_for(self, seconds: float, selector: selectors.BaseSelector) -> None:
        """Takes what comes within a time, at least what is there."""
        for key, _ in selector.select(seconds):
            if key.fileobj is self.server:
                self._accept(selector)
            elif key.fileobj.fileno() >= 0:  # not closed meanwhile
                self._hear(key.fileobj, selector)
        self.phases.clock.tick()
        for link, since in list(self.strangers.items()):
            if time.perf_counter() - since > STRANGER_S:
                self._close(link, selector)

    def _beat(self) -> None:
        """What is done about once a second: this rank says where it is, and looks whether its launcher is there."""
        if self.link is not None:
            with contextlib.suppress(OSError):  # its end is heard
                _send(self.link, self._status())
        if self.launcher is None:
            return
        if self.alone_since is None and self.launcher.gone():
            orphan.mute_unread()
            self.alone_since = self.phases.clock.now()
            self._say(f"[watchdog] {self.launcher.name} (process {self.launcher.pid}) is gone; saving, then stopping")
            self.orphaned()
        if self.alone_since is not None and self.phases.name != "checkpoint":
            still_s = self.phases.clock.now() - max(self.alone_since, self.phases.moved)
            if still_s > ORPHAN_S:
                self._tell_all(f"[watchdog] nothing goes on for {still_s:.0f} s without the launcher; ended unsaved")

    def _accept(self, selector: selectors.BaseSelector) -> None:
        try:
            link, _ = self.server.accept()
        except BlockingIOError:  # it is gone again
            return
        except OSError:  # too many open files
            self._close(next(iter(self.strangers), None), selector)
            time.sleep(TICK_S)
            return
        link.settimeout(ANSWER_S)
        with contextlib.suppress(OSError):  # it is gone again
            _keep_alive(link)
        selector.register(link, selectors.EVENT_READ)
        self.buffers[link], self.strangers[link] = b"", time.perf_counter()
        if len(self.strangers) > STRANGERS:
            self._close(next(iter(self.strangers)), selector)

    def _close(self, link: socket.socket | None, selector: selectors.BaseSelector) -> None:
        if link is not None:
            selector.unregister(link)
            self.strangers.pop(link, None)
            self.buffers.pop(link, None)
            link.close()

    def _hear(self, link: socket.socket, selector: selectors.BaseSelector) -> None:
        try:
            data = link.recv(1 << 16)
        except OSError:
            data = b""
        if link in self.strangers and not self._introduced(link, data):
            if not data or len(self.buffers[link]) > TOKEN_BYTES or b"\n" in self.buffers[link]:
                self._close(link, selector)
            return
        *lines, self.buffers[link] = (self.buffers.get(link, b"") + data).split(b"\n")
        for line in lines:
            self._take(link, _message(line))
        if not data:
            if link is self.link:
                selector.unregister(link)
                self._end("rank 0 is gone; its own error, if it left one, stands above")
            else:
                self._close(link, selector)
                self._lost(self.peers.pop(link))

    def _introduced(self, link: socket.socket, data: bytes) -> bool:
        """Whether a connection has shown the token with this; what follows it stays in the buffer."""
        self.buffers[link] += data
        first, end, rest = self.buffers[link].partition(b"\n")
        if not end or not secrets.compare_digest(first, self.token):
            return False
        del self.strangers[link]
        self.peers[link], self.buffers[link] = {}, rest
        return True

    def _take(self, link: socket.socket, said: Status) -> None:
        """A message of a rank's."""
        if not self.world.is_main:
            self._obey(said)
            return
        self.suspects = self.suspects or said.get("suspects", False)
        # a beat does not undo an answer that came before it
        self.peers[link] = self.peers[link] | said | {"heard": time.perf_counter()}

    def _obey(self, said: Status) -> None:
        """What rank 0 asks of this rank."""
        if "end" in said:
            self._end("", said["end"])
        elif "cleared" in said:
            self._clear()
        elif "ask" in said:
            with contextlib.suppress(OSError):  # its end is heard
                _send(self.link, self._status(**{said["ask"]: True}))

    def _status(self, stack: bool = False, layers: bool = False) -> Status:
        phases, now = self.phases, time.perf_counter()
        where = {"phase": phases.name, "step": phases.step + 1, "for_s": now - phases.since}
        status = {"rank": self.world.rank, "host": platform.node(), "pid": os.getpid(), **where}
        journal = self.phases.journal
        suspects = self.suspects or (journal is not None and journal.aborting.noted.is_set())
        told = {"layers": journal.told(STEPS_TOLD)} if layers and journal else {}
        return status | {"suspects": suspects} | (self._stacks() if stack else {}) | told

    def _stacks(self) -> Status:
        """The main thread's stack, and whether it waits in a library."""
        frames = sys._current_frames()
        stack = traceback.extract_stack(frames[self.main])
        waits = any(f"{os.sep}{name}{os.sep}" in stack[-1].filename for name in LIBRARIES)
        text = traceback.format_list(stack[-STACK_LINES:])
        return {"waits": waits, "stack": "".join(text)}

    def _lost(self, status: Status) -> None:
        """A rank's connection broke."""
        if "rank" not in status:
            self._tell_all("[watchdog] a rank is gone before it has said which one it is")
            return
        ago = time.perf_counter() - status["heard"]
        self._tell_all(
            f"[watchdog] {_name(status)} is gone: its process ended, or its machine does not answer. Last heard of "
            f"{ago:.1f} s ago in phase {status['phase']} of step {status['step']}; its own error, if it left one, "
            f"stands above or in its machine's log"
        )

    def _judge(self, late_s: float, selector: selectors.BaseSelector) -> None:
        """Ends the run if its step takes too long. Rank 0 finds out where all are; the others leave it the time to."""
        if late_s <= (0 if self.world.is_main else GRACE_S):
            return
        if not self.world.is_main:
            self._end(diagnosis([self._status(stack=True)], self.timeout_s) + "\nrank 0 does not answer")
        self._ask("stack", selector)
        own = self._status(stack=True)
        self._tell_all(diagnosis([own, *(said for said in self.peers.values() if "rank" in said)], self.timeout_s))

    def _ask(self, what: str, selector: selectors.BaseSelector) -> None:
        """Has every rank say something, and waits ANSWER_S at most for them."""
        for link, status in list(self.peers.items()):
            status.pop(what, None)
            with contextlib.suppress(OSError):
                _send(link, {"ask": what})
        deadline = self.phases.clock.now() + ANSWER_S
        while self.phases.clock.now() < deadline and any(what not in status for status in self.peers.values()):
            self._listen_for(TICK_S, selector)

    def _compare_layers(self, selector: selectors.BaseSelector) -> None:
        """Ends the run where ranks have entered different layers: looked at when one suspects it, and when nothing has
        moved for a while."""
        journal, now = self.phases.journal, self.phases.clock.now()
        if journal is None or self.world.size == 1:
            return
        stands = self.phases.moved, self.phases.name, len(journal.entered)
        if stands != self.stands[0]:
            self.stands = stands, now
        if journal.aborting.noted.is_set():
            self.suspects = True
        if not self.world.is_main or not (self.suspects or now - self.stands[1] > STILL_S):
            return
        self.stands = stands, now  # not again at once
        self._ask("layers", selector)
        told = {status["rank"]: status["layers"] for status in self.peers.values() if "layers" in status}
        line = journal.difference({self.world.rank: journal.told(STEPS_TOLD)} | told)
        if line is not None:
            self._tell_all(f"dist_train: {line}", ending.BAD_CONFIG)
        if self.suspects:
            for link in list(self.peers):
                with contextlib.suppress(OSError):
                    _send(link, {"cleared": True})
            self._clear()

    def _clear(self) -> None:
        """The layers do not differ: what was held up goes on."""
        self.suspects = False
        self.cleared.set()
        if self.phases.journal is not None:
            self.phases.journal.aborting.compared.set()

    def _tell_all(self, text: str, code: int = ending.FAILED) -> None:
        if self.leaving:
            return
        for link in list(self.peers):
            with contextlib.suppress(OSError):
                _send(link, {"end": code})
        self._end(text, code)

    def _end(self, text: str, code: int = ending.FAILED) -> None:
        if self.leaving:
            return
        if text:
            self._say(text)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def _say(self, text: str) -> None:
        # a line that names ranks itself needs no rank before it
        bare = text.startswith("dist_train: ")
        with contextlib.suppress(OSError):  # nobody reads it any more
            sys.stderr.write((text if bare else marked(text, self.world.rank, self.world.size)) + "\n")
            sys.stderr.flush()


def diagnosis(statuses: list[Status], timeout_s: float) -> str:
    """What keeps a step from ending: the ranks that are behind, or silent, and where each stands.

    Args:
        statuses: of every rank, with a stack of those that answered.
        timeout_s: that the step may take.
    """
    silent = [s for s in statuses if "stack" not in s]
    told = [s for s in statuses if "stack" in s]
    busy = [s for s in told if not s["waits"]]  # who computes or sleeps in code of its own is who the others wait for
    first = min((s["step"], NAMES.index(s["phase"])) for s in told) if told else None
    behind = [s for s in told if (s["step"], NAMES.index(s["phase"])) == first]
    named = silent or busy or behind
    lines = [f"[watchdog] step {max(s['step'] for s in statuses)} has not ended within {timeout_s:g} s"]
    for status in named:
        if "stack" not in status:
            lines.append(f"{_name(status)} does not answer; last heard of in phase {status['phase']}")
            continue
        lines.append(
            f"{_name(status)} is in phase {status['phase']} of step {status['step']} for {status['for_s']:.1f} s:"
        )
        lines += [f"    {line}" for line in status["stack"].splitlines()]
    others = [s for s in statuses if s not in named]
    lines += [f"waiting: {_name(s)} in phase {s['phase']} of step {s['step']}" for s in others]
    return "\n".join(lines)


def _name(status: Status) -> str:
    return f"rank {status['rank']} on {status['host']} (process {status['pid']})"


def _connect(addresses: list[str], port: int) -> socket.socket | None:
    for address in addresses:
        try:
            link = socket.create_connection((address, port), timeout=CONNECT_S / len(addresses))
        except OSError:
            continue
        link.settimeout(None)
        _keep_alive(link)
        return link
    return None


def _keep_alive(link: socket.socket) -> None:
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, LOST_S - 1)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, LOST_S * 1000)


def _message(line: bytes) -> Status:
    """What `_send` sent; nothing where a stranger wrote the line."""
    try:
        said = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}


def _send(link: socket.socket, message: Status) -> None:
    link.sendall(json.dumps(message).encode() + b"\n")


@contextlib.contextmanager
def watching(
    world: World, phases: Phases, timeout_s: float | None, orphaned: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Around a run. Collective."""
    dog = Watchdog(world, phases, timeout_s, orphaned)
    try:
        with dist.patient():
            yield
    except RuntimeError:
        dog.failed()
        raise
    finally:
        dog.leave()
    dist.gather(None)  # none closes its connection while another would take it for the end
    dog.close()
