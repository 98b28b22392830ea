"""What the class or function that a section of the config names takes, held against what the section gives it."""

import functools
import inspect
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from dist_train.config.lookup import accepts
from dist_train.config.tree import Config

# What data sets of ours tell of themselves, for arguments of these names.
FACTS = ("input_shape", "classes", "outputs", "target_shape", "vocab_size", "block", "tokenizer")


def facts_of(config: Config) -> tuple[str, ...] | None:
    """The names of the facts of a config's data set; None of one that is not ours, which may tell more."""
    return None if ":" in config.data.name else (*FACTS, *config.data.facts)


def asked(function: Any, known: Mapping[str, Any]) -> dict[str, Any]:
    """Of what is known, that which has the name of an argument of a function or class. An argument that a
    functools.partial has bound does not ask any more."""
    bound = function.keywords if isinstance(function, functools.partial) else {}
    names = {p.name for p in _parameters(function) if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)} - set(bound)
    return {name: value for name, value in known.items() if name in names}


def placed(function: Any, values: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Arguments by name, as a call needs them: those that a function takes by their place alone, and the rest."""
    first, rest = [], dict(values)
    for parameter in _parameters(function):
        if parameter.kind is not parameter.POSITIONAL_ONLY or parameter.name not in rest:
            break
        first.append(rest.pop(parameter.name))
    return first, rest


def _parameters(function: Any) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # of a class in C
        return []


def problems(
    registry: Mapping[str, str], name: str, section: str, values: Mapping[str, Any], given: Collection[str],
    by_us: tuple[str, ...] = (), facts: tuple[str, ...] | None = (),
) -> Iterator[str]:  # fmt: skip
    """Arguments that `name` does not take, and required ones that are not there.

    Args:
        registry: names of ours.
        name: of one of them, or module:attribute.
        section: of the config.
        values: its arguments.
        given: the config path of each.
        by_us: what the package itself passes to who asks by name.
        facts: what the data set passes to who asks by name; None where it may be more than is known now.
    """
    takes = accepts(registry, name, f"{section}.name")
    ours = [k for k in takes if k not in by_us and k != "**"]
    for path in sorted(given):
        key = path.rpartition(".")[2]
        if key in by_us:
            yield f"{path}: got {values[key]!r}, but it is set by the package; leave it out"
        elif key not in takes and "**" not in takes:
            own = ", ".join(k for k in ours if k not in (FACTS if facts is None else facts)) or "no arguments"
            yield f"{path}: got {values[key]!r}, but {name} does not have it; it takes {own}; leave it out"
    for key in ours:
        if takes[key] and key not in values and facts is not None and key not in facts:
            path = f"{section}.args.{key}"
            yield f"{path}: got nothing, expected a value: {name} needs it; write --{path} VALUE"
