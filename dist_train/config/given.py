"""Objects that a program gives in Python in the place of names in a config: each gets a name of this module.

Functions and classes that another process can import have one already, and keep it, so that the run's `config.yaml`
says what was trained. The others are known to this process alone, and only while the run goes on.
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

HOME = __name__
_GIVEN: dict[str, Any] = {}


def __getattr__(name: str) -> Any:
    try:
        return _GIVEN[name]
    except KeyError:
        raise AttributeError(f"module {HOME!r} has no attribute {name!r}") from None


@contextmanager
def objects(callables: dict[str, Any]) -> Iterator[dict[str, str]]:
    """A name for each of these functions and classes, as `module:name`, within the context.

    Args:
        callables: by what each is called where it has no name of its own.
    """
    kept = dict(_GIVEN)
    try:
        yield {key: named(value) or _given(key, value) for key, value in callables.items()}
    finally:
        _GIVEN.clear()
        _GIVEN.update(kept)


def _given(key: str, value: Any) -> str:
    _GIVEN[key] = value
    return f"{HOME}:{key}"


def named(value: Any) -> str | None:
    """`module:name` by which a function or class can be found; None where it cannot."""
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if not module or not name or "." in name:
        return None
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None
    if module == "__mp_main__":  # as a spawned process calls the script that it was started for
        module = "__main__"
    return f"{module}:{name}" if found is value else None
