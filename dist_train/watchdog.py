"""Names the rank that is gone, or that all wait for, and ends the run: a collective that hangs tells nothing.

Every process has a thread, and every thread a connection to that of rank 0. When a process ends, its kernel closes the
connection; when a machine or a cable is gone, keepalive notices within LOST_S, whatever Python is doing. When a step
takes longer than it may, rank 0 asks all threads where their main thread stands.
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
from collections.abc import Iterator
from typing import Any

from dist_train import dist, ending
from dist_train.dist import World
from dist_train.phases import NAMES, Phases
from dist_train.speech import marked

LOST_S = 4
BEAT_S = 1.0
TICK_S = 0.25
ANSWER_S = 2.0
GRACE_S = 2 * ANSWER_S  # after which another rank speaks where rank 0 does not
CONNECT_S = 20.0
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
    """

    def __init__(self, world: World, phases: Phases, timeout_s: float | None):
        self.world, self.phases, self.timeout_s = world, phases, timeout_s
        self.leaving = False
        self.main = threading.main_thread().ident
        self.server = self._listen() if world.is_main and world.size > 1 else None
        port = self.server.getsockname()[1] if self.server else 0
        port, self.token = dist.on_main(lambda: (port, secrets.token_hex(16)))
        self.link = _connect([world.master_addr, "localhost"], port) if world.size > 1 and not world.is_main else None
        if self.link is None and not world.is_main:
            text = f"the watchdog cannot reach rank 0 at {world.master_addr}, port {port}; a lost rank is noticed late"
            print(marked(text, world.rank, world.size), flush=True)
        self.peers: dict[socket.socket, Status] = {}  # of rank 0: what each rank last said
        self.buffers: dict[socket.socket, bytes] = {}
        if self.link is not None:
            _send(self.link, {"token": self.token, **self._status()})
        self.thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self.thread.start()

    @staticmethod
    def _listen() -> socket.socket:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
        return socket.create_server(("", 0), backlog=1024)

    def leave(self) -> None:
        """From here on this rank ends by itself. Where it ends by an error, its end is the news to the others."""
        self.leaving = True

    def close(self) -> None:
        """Ends the thread, when all ranks have left."""
        self.thread.join()
        for link in [*self.buffers, *([self.server] if self.server else []), *([self.link] if self.link else [])]:
            link.close()

    # -- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        selector = selectors.DefaultSelector()
        for link in (self.server, self.link):
            if link is not None:
                selector.register(link, selectors.EVENT_READ)
        said = 0.0
        while not self.leaving:
            for key, _ in selector.select(TICK_S):
                if key.fileobj is self.server:
                    link, _ = self.server.accept()
                    _keep_alive(link)
                    selector.register(link, selectors.EVENT_READ)
                    self.buffers[link] = b""
                else:
                    self._hear(key.fileobj, selector)
            now = time.perf_counter()
            if self.link is not None and now - said > BEAT_S:
                said = now
                with contextlib.suppress(OSError):  # its end is heard
                    _send(self.link, self._status())
            if self.timeout_s is not None:
                self._judge(now - self.phases.moved - self.timeout_s, selector)
        selector.close()

    def _hear(self, link: socket.socket, selector: selectors.BaseSelector) -> None:
        try:
            data = link.recv(1 << 16)
        except OSError:
            data = b""
        *lines, self.buffers[link] = (self.buffers.get(link, b"") + data).split(b"\n")
        for line in lines:
            said = _message(line)
            if not self.world.is_main:
                self._obey(said)
            elif link in self.peers or said.get("token") == self.token:  # anyone can reach the port
                # a beat does not undo an answer that came before it
                self.peers[link] = self.peers.get(link, {}) | said | {"heard": time.perf_counter()}
        if not data:
            selector.unregister(link)
            if link is self.link:
                self._end("rank 0 is gone; its own error, if it left one, stands above")
            elif link in self.peers:
                self._lost(self.peers.pop(link))

    def _obey(self, said: Status) -> None:
        """What rank 0 asks of this rank."""
        if "end" in said:
            self._end("")
        elif "ask" in said:
            with contextlib.suppress(OSError):  # its end is heard
                _send(self.link, self._status(stack=True))

    def _status(self, stack: bool = False) -> Status:
        phases, now = self.phases, time.perf_counter()
        where = {"phase": phases.name, "step": phases.step + 1, "for_s": now - phases.since}
        status = {"rank": self.world.rank, "host": platform.node(), "pid": os.getpid(), **where}
        return status | (self._stacks() if stack else {})

    def _stacks(self) -> Status:
        """The main thread's stack, and whether it waits in a library."""
        frames = sys._current_frames()
        stack = traceback.extract_stack(frames[self.main])
        waits = any(f"{os.sep}{name}{os.sep}" in stack[-1].filename for name in LIBRARIES)
        text = traceback.format_list(stack[-STACK_LINES:])
        return {"waits": waits, "stack": "".join(text)}

    def _lost(self, status: Status) -> None:
        """A rank's connection broke."""
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
        for link in list(self.peers):
            with contextlib.suppress(OSError):
                _send(link, {"ask": True})
        deadline = time.perf_counter() + ANSWER_S
        while time.perf_counter() < deadline and any("stack" not in status for status in self.peers.values()):
            for key, _ in selector.select(TICK_S):
                if key.fileobj is not self.server:
                    self._hear(key.fileobj, selector)
        own = self._status(stack=True)
        self._tell_all(diagnosis([own, *self.peers.values()], self.timeout_s))

    def _tell_all(self, text: str) -> None:
        if self.leaving:
            return
        for link in list(self.peers):
            with contextlib.suppress(OSError):
                _send(link, {"end": True})
        self._end(text)

    def _end(self, text: str) -> None:
        if self.leaving:
            return
        if text:
            sys.stderr.write(marked(text, self.world.rank, self.world.size) + "\n")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(ending.FAILED)


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
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def _send(link: socket.socket, message: Status) -> None:
    link.sendall(json.dumps(message).encode() + b"\n")


@contextlib.contextmanager
def watching(world: World, phases: Phases, timeout_s: float | None) -> Iterator[None]:
    """Around a run. Collective."""
    dog = Watchdog(world, phases, timeout_s)
    try:
        yield
    finally:
        dog.leave()
    dist.gather(None)  # none closes its connection while another would take it for the end
    dog.close()
