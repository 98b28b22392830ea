"""Names in a config to functions and classes; and what these accept, read from their source without importing it.

The checks of a config must answer before torch is imported (seconds), yet they have to know the
arguments of torch's optimizers, of models and of data sets. Parsing one source file takes milliseconds.
"""

import ast
import contextlib
import difflib
import functools
import importlib
import importlib.util
import inspect
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from dist_train.config.own_code import blamed
from dist_train.errors import ConfigError


def reference(registry: Mapping[str, str], name: str, path: str) -> tuple[str, str]:
    """Module and attribute of a registry's row or of a user's own `module:attribute`, which may be one of a class, such
    as `module:Class.method`. Raises ConfigError."""
    module, colon, attribute = registry.get(name, name).partition(":")
    if not colon:
        near = difflib.get_close_matches(name, registry, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(
            f"{path}: got unknown name {name!r}, expected one of {', '.join(registry)}, "
            f"or your own as module:name{hint}"
        )
    return module, attribute


def load(registry: Mapping[str, str], name: str, path: str) -> Any:
    """The function or class itself; imports its module. Raises ConfigError, also where the user's own module fails."""
    module, attribute = reference(registry, name, path)
    if name in registry:
        return getattr(importlib.import_module(module), attribute)
    with blamed(path, name, "imported"):
        try:
            home = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise
            raise ConfigError(_absent(path, name, f"no module {module!r}")) from None
        with contextlib.suppress(AttributeError):
            return functools.reduce(getattr, attribute.split("."), home)
    place = f"no {attribute!r} in {getattr(home, '__file__', None) or module}"
    near = difflib.get_close_matches(attribute, vars(home), n=1)
    raise ConfigError(_absent(path, name, place, *near))


def _absent(path: str, name: str, what: str, near: str = "") -> str:
    module, _, attribute = name.partition(":")
    line = f"{path}: got {name!r}, but there is {what}; expected module:name of a function or class on the Python path"
    if module == "__main__":
        return f"{line}; one of a script or a notebook is known there alone: put it into a module of its own"
    as_file = module.removesuffix(".py").replace("/", ".").strip(".")
    hint = f"{module}:{near}" if near else f"{as_file}:{attribute}" if as_file != module else ""
    return f"{line}; did you mean {hint}?" if hint else line


def accepts(registry: Mapping[str, str], name: str, path: str) -> dict[str, bool]:
    """The arguments of what `load` would give, each with whether it is required. Raises ConfigError if it is absent.

    What its module does not define in so many words, such as a name from another module, is imported to be asked.
    """
    module, attribute = reference(registry, name, path)
    file = source_of(module)
    try:
        found = file and parameters(file, attribute)
    except (SyntaxError, ValueError) as error:  # ValueError: not UTF-8, or a NUL
        raise ConfigError(f"{path}: got {name!r}, but {file} is not valid Python: {error}; mend the file") from None
    return _signature(load(registry, name, path), name, path) if found is None else found


def _signature(found: Any, name: str, path: str) -> dict[str, bool]:
    if not callable(found):
        raise ConfigError(
            f"{path}: got {name}, which is of type {type(found).__name__}, expected a function or a class"
        )
    try:
        arguments = inspect.signature(found).parameters.values()
    except (TypeError, ValueError):  # of a class in C
        return {"**": False}
    named = [a for a in arguments if a.kind is not a.VAR_POSITIONAL]
    return {
        "**" if a.kind is a.VAR_KEYWORD else a.name: a.default is a.empty and a.kind is not a.VAR_KEYWORD for a in named
    }


def source_of(module: str) -> Path | None:
    """The source file of `module`, or None if there is none. A parent package of a dotted name is imported."""
    try:
        spec = importlib.util.find_spec(module)
    except Exception:  # the parent is the user's code, and may raise anything
        return None
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None


@cache
def parameters(path: Path, name: str) -> dict[str, bool] | None:
    """The arguments that calling `name` from the file `path` takes, each with whether it is required.

    `**kwargs` appears as the name `**`. None if the file does not define `name` as a function or class, or decorates
    it, which may change what it takes.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    found: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | None = None
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and node.name == name:
            found = node
    if found is not None and found.decorator_list:
        return None
    if isinstance(found, ast.ClassDef):
        inits = [n for n in found.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
        return _arguments(inits[-1].args, skip=1) if inits else {"**": False}
    return None if found is None else _arguments(found.args, skip=0)


def _arguments(args: ast.arguments, skip: int) -> dict[str, bool]:
    positional = [*args.posonlyargs, *args.args]
    required = len(positional) - len(args.defaults)
    out = {a.arg: i < required for i, a in enumerate(positional)}
    for name in [a.arg for a in positional[:skip]]:
        del out[name]
    out |= {a.arg: default is None for a, default in zip(args.kwonlyargs, args.kw_defaults, strict=True)}
    if args.kwarg:
        out["**"] = False
    return out


@cache
def torch_optimizers() -> dict[str, Path]:
    """Every optimizer class of the installed `torch.optim`, with the file that defines it."""
    root = source_of("torch")
    if root is None:
        return {}
    found: dict[str, Path] = {}
    # The package list names the file of each class: `from .adamw import AdamW`, `from ._muon import Muon as Muon`.
    for node in ast.parse((root.parent / "optim" / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module != "torch.optim":
            path = root.parent / "optim" / (node.module.removeprefix("torch.optim.") + ".py")
            if path.is_file():
                found |= {alias.name: path for alias in node.names if alias.name[0].isupper()}
    found.pop("Optimizer", None)
    return found
