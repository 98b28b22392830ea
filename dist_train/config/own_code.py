"""Errors that the user's own code raises: shown as Python shows them, in the lines of that code alone."""

import contextlib
import sysconfig
import traceback
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from traceback import FrameSummary, TracebackException

from dist_train.errors import ConfigError, OwnCodeError

PACKAGE = str(Path(__file__).parent.parent)
LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
NO_FILE = ("<frozen ", "<string>")  # code of Python's own, and what a library has generated
FRAMES_SHOWN = 8


@contextlib.contextmanager
def blamed(path: str, name: str, done: str, ours: bool = False) -> Iterator[None]:
    """What is raised within is of the user's own code, and is refused with its file and line. Raises OwnCodeError.

    Args:
        path: the config path that led to that code.
        name: its value, `module:name`.
        done: what is being done with it, such as "imported".
        ours: it is the package's, and only what it calls may be the user's.
    """
    try:
        yield
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        if ours and not frames(error):
            raise
        home = _home(name)
        installed = any(_within(place, LIBRARIES) for place in home)  # a library's, or the user's own package
        fault, mend = ("which raises", "") if installed else ("and your own code raises", "; mend it there")
        raise OwnCodeError(
            f"{path}: got {name}, {fault} an error when it is {done}{mend}:", *_shown(error, home)
        ) from error


def frames(error: BaseException) -> list[FrameSummary]:
    """Where an error went through the user's own code, the place where it arose last."""
    found = _own(traceback.extract_tb(error.__traceback__), ())
    if isinstance(error, SyntaxError) and error.filename:  # of a module that never ran
        found += _own([FrameSummary(error.filename, error.lineno or 0, "<module>")], ())
    return found


def _shown(error: BaseException, home: tuple[str, ...]) -> list[str]:
    whole = TracebackException.from_exception(error)
    left: list[TracebackException | None] = [whole]
    while left:
        one = left.pop()
        if one is not None:
            one.stack[:] = _own(one.stack, home)[-FRAMES_SHOWN:]
            left += [one.__cause__, one.__context__]
    lines = "".join(whole.format()).splitlines()
    return [line for line in lines if line and line != "Traceback (most recent call last):"]


def _own(stack: list[FrameSummary], home: tuple[str, ...]) -> list[FrameSummary]:
    return [frame for frame in stack if _is_own(frame.filename, home)]


def _is_own(file: str, home: tuple[str, ...]) -> bool:
    if _within(file, (PACKAGE,)) or file.startswith(NO_FILE):
        return False
    return _within(file, home) or not _within(file, LIBRARIES)


def _within(file: str, places: tuple[str, ...]) -> bool:
    return any(file == place or file.startswith(f"{place}/") for place in places)


def _home(name: str) -> tuple[str, ...]:
    """Where the code of `module:name` lies: the user's package may be installed among the libraries."""
    try:
        spec = find_spec(name.partition(":")[0].partition(".")[0])
    except ValueError:  # of __main__
        spec = None
    if spec is None:
        return ()
    return tuple(spec.submodule_search_locations or [spec.origin or ""])
