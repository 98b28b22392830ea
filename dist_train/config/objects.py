"""Arguments that are objects of a dataclass, made of mappings in a config: those of transformers, and a user's own."""

import contextlib
import dataclasses
import inspect
import types
import typing
from collections.abc import Mapping
from typing import Any

from dist_train.config.own_code import frames
from dist_train.config.values import unknown
from dist_train.errors import ConfigError


def as_objects(function: Any, given: Mapping[str, Any], known: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The arguments of a function or class, where each mapping that stands for a dataclass is one of it.

    It stands for one where the argument is annotated with a dataclass, or, as in transformers, where the class has an
    attribute of that name which is annotated so. Its fields are arguments too: they are given what is known by their
    names, and a field that is a dataclass itself takes a mapping.

    Args:
        function: is called with the arguments.
        given: by name.
        known: goes to fields of these names that are not given.
        path: of the arguments in the config.

    Raises:
        ConfigError: a dataclass does not take what it is given.
    """
    mappings = [name for name, value in given.items() if isinstance(value, Mapping)]
    kinds = _kinds(function, mappings) if mappings else {}
    return {
        name: _object(kinds[name], value, known, f"{path}.{name}") if name in kinds else value
        for name, value in given.items()
    }


def _object(kind: type, given: Mapping[str, Any], known: Mapping[str, Any], path: str) -> Any:
    fields = [field.name for field in dataclasses.fields(kind) if field.init]
    hints = _hints(kind)
    values = {name: value for name, value in known.items() if name in fields}
    for name, value in given.items():
        inner = _dataclass(hints.get(name)) if isinstance(value, Mapping) else None
        values[name] = value if inner is None else _object(inner, value, known, f"{path}.{name}")
    try:
        made = kind(**values)
    except ConfigError:
        raise
    except Exception as error:
        if frames(error):  # of the user's own code, which is shown with its line
            raise
        wrong = [name for name in given if name not in fields]
        if isinstance(error, TypeError) and wrong:
            raise ConfigError(unknown(path, str(wrong[0]), fields)) from None
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path}: got {dict(given)}, which {kind.__name__} refuses: {reason}") from error
    # transformers' configs keep whatever they are given, and read it nowhere.
    own = getattr(made, "__dict__", {})
    kept = [name for name in given if name not in fields and name in own and not hasattr(kind, name)]
    if kept:
        raise ConfigError(unknown(path, kept[0], fields))
    return made


def _kinds(function: Any, names: list[str]) -> dict[str, type]:
    """The dataclasses that arguments of these names stand for."""
    try:
        takes = inspect.signature(function).parameters
    except (TypeError, ValueError):  # of a class in C
        return {}
    with contextlib.suppress(Exception):  # annotations may be any text, such as what a type checker alone knows
        takes = inspect.signature(function, eval_str=True).parameters
    own = _hints(function) if isinstance(function, type) else {}
    hints = {
        name: own.get(name) if takes[name].annotation is inspect.Parameter.empty else takes[name].annotation
        for name in names
        if name in takes
    }
    found = {name: _dataclass(hint) for name, hint in hints.items()}
    return {name: kind for name, kind in found.items() if kind is not None}


def _hints(kind: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(kind)
    except Exception:  # annotations may be any text
        return {}


def _dataclass(hint: Any) -> type | None:
    """A dataclass that is annotated, also as an optional one."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        others = [one for one in typing.get_args(hint) if one is not type(None)]
        hint = others[0] if len(others) == 1 else None
    return hint if isinstance(hint, type) and dataclasses.is_dataclass(hint) else None
