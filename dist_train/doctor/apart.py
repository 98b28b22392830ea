"""Work in a process of its own: a group of ranks that are not there, and what tracing a model leaves, stay in it."""

import multiprocessing
import os
import pickle
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from dist_train.errors import ConfigError


class Apart:
    """A new process, which calls a function when its result is asked for. It writes nothing. It is no copy of this one:
    what threads of libraries held would be held in it for ever.

    Args:
        function: of a module; gives something that can be pickled.
        arguments: of it, which can be pickled.
    """

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        context = multiprocessing.get_context("spawn")
        self.link, there = context.Pipe()
        path = [place or os.getcwd() for place in sys.path]  # where the user's own code is found
        self.process = context.Process(target=_work, args=(there, path, function, arguments), daemon=True)
        self.process.start()
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
        self.process.kill()
        self.process.join()
        self.link.close()


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


def _work(there: Connection, path: list[str], function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    sys.path[:] = path
    there.recv()
    there.send_bytes(_answer(function, arguments))
    os._exit(0)


def _answer(function: Callable[..., Any], arguments: tuple[Any, ...]) -> bytes:
    try:
        return pickle.dumps(function(*arguments))
    except ConfigError as error:
        return pickle.dumps(ConfigError(*error.lines))
    except Exception as error:
        line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        what = f"{type(error).__name__}: {line}" if line else type(error).__name__
        return pickle.dumps(Failed(what, traceback.format_exc()))
