"""Work in a process of its own: a group of ranks that are not there, and what tracing a model leaves, stay in it."""

import os
import pickle
import signal
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import Pipe
from typing import Any

from dist_train.errors import ConfigError


class Apart:
    """A process that is forked now, and calls a function when its result is asked for. It writes nothing.

    To be made before this process has started threads, such as torch's of a backward.

    Args:
        function: gives something that can be pickled.
        arguments: of it.
    """

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self.link, there = Pipe()
        self.pid = os.fork()
        if not self.pid:
            try:
                self.link.close()
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, 1)
                os.dup2(null, 2)
                there.recv()
                there.send_bytes(_answer(function, arguments))
            finally:
                os._exit(0)
        there.close()

    def result(self) -> Any:
        """What the function gives. Once. Raises what it raises: a ConfigError, or else a Failed."""
        try:
            self.link.send(None)
            found = pickle.loads(self.link.recv_bytes())
        except (EOFError, OSError):
            found = Failed("the process that computed it was ended, perhaps as memory was short", "")
        self.close()
        if isinstance(found, Exception):
            raise found
        return found

    def close(self) -> None:
        """Ends the process, whatever it does."""
        if self.pid:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.link.close()
            self.pid = 0


class Failed(RuntimeError):
    """What a function in another process has raised.

    Args:
        what: the error, in a line.
        text: its traceback.
    """

    def __init__(self, what: str, text: str):
        super().__init__(what)
        self.what, self.text = what, text

    def __reduce__(self) -> tuple:
        return Failed, (self.what, self.text)


def _answer(function: Callable[..., Any], arguments: tuple[Any, ...]) -> bytes:
    try:
        return pickle.dumps(function(*arguments))
    except ConfigError as error:
        return pickle.dumps(ConfigError(*error.lines))
    except Exception as error:
        line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        what = f"{type(error).__name__}: {line}" if line else type(error).__name__
        return pickle.dumps(Failed(what, traceback.format_exc()))
