"""Weights and running statistics that training leaves as they are, by patterns of their names."""

import difflib
from collections.abc import Iterable
from fnmatch import fnmatchcase
from types import MethodType

import torch
from torch import nn

from dist_train.errors import ConfigError


def freeze(model: nn.Module, patterns: list[str]) -> None:
    """Freezes the parameters and buffers that the patterns of model.frozen name, in place.

    A parameter asks for no gradient any more. A layer all of whose buffers are frozen, such as a norm with its running
    statistics, stays in eval mode, where it does not change them.

    Args:
        model: on any device.
        patterns: of fnmatch, for names as in model.state_dict(). Of several that match a name, the last decides; one
            that begins with `!` takes back what the ones before it have frozen.

    Raises:
        ConfigError: a pattern matches nothing.
    """
    names: dict[torch.Tensor, list[str]] = {}  # a tied weight has several
    for tensors in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        for name, tensor in tensors:
            names.setdefault(tensor, []).append(name)
    for pattern in patterns:
        if not any(_matches(pattern, several) for several in names.values()):
            raise _nothing(pattern, model, names.values())
    frozen = {tensor for tensor, several in names.items() if _is_frozen(patterns, several)}
    for parameter in model.parameters():
        if parameter in frozen:
            parameter.requires_grad_(False)
    for module in model.modules():
        buffers = list(module.buffers(recurse=False))
        if buffers and frozen.issuperset(buffers):
            module.training = False
            module.train = MethodType(_stay, module)  # type: ignore[method-assign]


def _stay(module: nn.Module, mode: bool = True) -> nn.Module:
    """In place of a module's own train()."""
    for child in module.children():
        child.train(mode)
    return module


def _is_frozen(patterns: list[str], names: Iterable[str]) -> bool:
    last = next((pattern for pattern in reversed(patterns) if _matches(pattern, names)), "!")
    return not last.startswith("!")


def _matches(pattern: str, names: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern.removeprefix("!")) for name in names)


def _nothing(pattern: str, model: nn.Module, names: Iterable[list[str]]) -> ConfigError:
    every = [name for several in names for name in several]
    bare = pattern.removeprefix("!")
    within = [name for name in every if name.startswith(f"{bare}.")]
    near = [f"{bare}.*"] if within else difflib.get_close_matches(bare, every, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    parts = ", ".join(dict.fromkeys(name.partition(".")[0] for name in every))
    return ConfigError(
        f"model.frozen: got {pattern!r}, which matches no parameter or buffer, expected a pattern of their names, such "
        f"as {every[0] if every else 'layer.*'}; the model has {parts or 'none'}{hint}"
    )
