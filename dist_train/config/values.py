"""Values of a config: whether they are of their field's type, and what is said of those that are not."""

import difflib
import math
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import yaml

from dist_train.config import strict_yaml
from dist_train.config.tree import fields_of
from dist_train.errors import ConfigError

_WORDS = {int: "an integer", float: "a number", str: "text", bool: "true or false", type(None): "null"}


def fitting(path: str, value: Any, hint: Any, where: str = "") -> Any:
    """The value, if it is of its field's type; an integer will do for a float. Raises ConfigError."""
    for kind in typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,):
        origin, args = typing.get_origin(kind), typing.get_args(kind)
        if kind is float and type(value) is int and abs(value) < 2**1000:
            return float(value)
        items_fit = origin is not list or (type(value) is list and all(_item_fits(item, args[0]) for item in value))
        if items_fit and (type(value) is (origin or kind) or (origin is Literal and value in args)):
            return value
    shown = repr(value) if isinstance(value, str | list | dict) else yaml.safe_dump(value).split("\n")[0]
    raise ConfigError(mismatch(path, (shown if len(shown) < 80 else shown[:76] + "...") + where))


def _item_fits(item: Any, hint: Any) -> bool:
    if is_dict(hint):
        return type(item) is dict and all(type(key) is str for key in item)
    return hint is Any or type(item) is hint


def any_value(text: str) -> Any:
    """A word of the command line whose type is not known: a YAML value if it is one on its face, else text."""
    try:
        value = strict_yaml.parse(text)
    except (yaml.YAMLError, ValueError):
        return text
    starts = {dict: "{", list: "[", str: "'\"", type(None): "n~"}.get(type(value), text[:1])
    return value if text and text[0] in starts else text


def is_text(hint: Any) -> bool:
    """Whether what stands there is text, whatever it looks like."""
    return hint in (str, str | None) or typing.get_origin(hint) is Literal


def is_dict(hint: Any) -> bool:
    """Whether what stands there has keys below it."""
    return dict in (typing.get_origin(hint), *map(typing.get_origin, typing.get_args(hint)))


def _is_name_too(hint: Any) -> bool:
    """Whether a name may stand in the place of keys."""
    return isinstance(hint, types.UnionType) and str in typing.get_args(hint)


def is_optional(hint: Any) -> bool:
    """Whether null may stand there."""
    return type(None) in typing.get_args(hint)


def unknown(path: str, name: str, valid: Sequence[str], what: str = "key", near: Sequence[str] | None = None) -> str:
    """One line about a name that is not among the valid ones; a suggestion comes from `near`, or from these."""
    by_lower = {word.lower(): word for word in near or valid}
    found = near if near and len(near) == 1 else difflib.get_close_matches(name.lower(), by_lower, n=1)
    found = [by_lower[word.lower()] for word in found]
    hint = f"; did you mean {found[0]}?" if found else ""
    return f"{path}: got unknown {what} {name!r}, expected one of {', '.join(valid)}{hint}"


def describe(hint: Any) -> str:
    """A type in the words of a user."""
    if hint in _WORDS:
        return _WORDS[hint]
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin is list and is_dict(args[0]):
        return f"a list such as {_example(hint)[1:-1]}"
    if origin is list:
        example = _example(hint).strip("'")
        return f"a list such as {example} ({describe(args[0])} each)"
    if is_dict(hint):
        return "a name, or keys with values" if _is_name_too(hint) else "keys with values"
    return " or ".join(describe(a) for a in args)  # a union


def mismatch(path: str, got: str) -> str:
    """One line about a value that is not of its field's type."""
    hint = _hint(path)
    return f"{path}: got {got}, expected {describe(hint)}; for example --{path} {_example(hint)}"


def _hint(path: str) -> Any:
    """The type of the field that a config path leads to or into; None if there is none."""
    section, _, name = path.partition(".")
    return (fields_of(section) or {}).get(name.split(".")[0])


def _example(hint: Any) -> str:
    args = typing.get_args(hint)
    samples = {int: "10", float: "0.1", str: "name", bool: "true"}
    if typing.get_origin(hint) is Literal:
        return str(args[0])
    if typing.get_origin(hint) is list:
        if is_dict(args[0]):
            return "'[{match: \"head.*\", lr: 0.01}]'"
        return "'[512, 512]'" if args[0] is int else "'[train.seed]'"
    if _is_name_too(hint):
        return "global"
    if args[1:] == (str,):
        return "'{up: columns, down: rows}'"
    if is_dict(hint):
        return "'{start_step: 10, steps: 5}'" if args[1:] == (int,) else "'{key: 1}'"
    return samples[hint] if hint in samples else _example(args[0])


# -- ranges ----------------------------------------------------------------------------------------------------------


def too_small(values: Mapping[str, tuple[float | None, int]]) -> Iterator[str]:
    """A line for each value, by its config path, that is below the least one beside it."""
    for path, (value, least) in values.items():
        if value is not None and value < least:
            yield f"{path}: got {value}, expected at least {least}; for example --{path} {max(least, 1)}"


def not_finite(values: Mapping[str, float | None], zero_fits: bool, null_is_off: bool = False) -> Iterator[str]:
    """A line for each value, by its config path, that is not a finite number above 0, or 0 where that fits."""
    for path, value in values.items():
        if value is not None and not (math.isfinite(value) and (value > 0 or (zero_fits and value == 0))):
            bound = "of 0 or more" if zero_fits else "above 0"
            mend = "; null turns it off" if null_is_off else ""
            yield f"{path}: got {value}, expected a finite number {bound}{mend}; for example --{path} 0.1"


def no_share(values: Mapping[str, float | None]) -> Iterator[str]:
    """A line for each value, by its config path, that is not 0 or more and below 1."""
    for path, value in values.items():
        if value is not None and not 0 <= value < 1:
            yield f"{path}: got {value}, expected 0 or more and below 1; for example --{path} 0.1"
