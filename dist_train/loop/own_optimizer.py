"""What is asked of an optimizer of the user's own: that groups keep their settings, and checkpoints hold its state."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from dist_train.config.own_code import blamed
from dist_train.config.tree import OptimConfig
from dist_train.errors import ConfigError

Factory = Callable[[Iterable[tuple[str, nn.Parameter]]], torch.optim.Optimizer]
NOT_KEPT = "expected all that changes to be in self.state[parameter], as tensors: a checkpoint holds that alone"


def is_own(config: OptimConfig) -> bool:
    """Whether the optimizer is the user's own, by import path."""
    return ":" in config.name


def check_kind(name: str, kind: Any) -> None:
    """Raises ConfigError where that is no class of optimizers."""
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        raise ConfigError(
            f"optim.name: got {name}, which is of type {type(kind).__name__}, expected a class that is derived from "
            f"torch.optim.Optimizer"
        )


def check_groups(config: OptimConfig, optimizer: torch.optim.Optimizer) -> None:
    """Raises ConfigError where an optimizer does not keep the settings of each group."""
    for group in config.groups:
        for key in group.keys() - {"match"} - optimizer.defaults.keys():
            raise ConfigError(
                f"optim.groups: got {key} {group[key]!r}, which {config.name} does not keep for each group, expected "
                f"one of {', '.join(optimizer.defaults)}; write --optim.args.{key}"
            )
    if not all("lr_scale" in group for group in optimizer.param_groups):
        raise ConfigError(
            f"optim.name: got {config.name}, which does not keep the groups that it is given; expected it to hand "
            f"them to super().__init__(params, defaults) as they are"
        )


def check_state(name: str, build: Factory) -> None:
    """Takes steps with two small weights. Raises ConfigError for what a checkpoint would not hold, and where a step
    fails."""
    weights = {"matrix": nn.Parameter(torch.linspace(-1, 1, 12).view(4, 3)), "vector": nn.Parameter(torch.ones(3))}
    optimizer = build(weights.items())
    groups, attributes = [dict(group) for group in optimizer.param_groups], _plain(vars(optimizer))
    for _ in range(2):
        for parameter in weights.values():
            parameter.grad = parameter.detach() / 2
        with blamed("optim.name", name, "asked for a step"):
            optimizer.step()
    for place, state in optimizer.state.items():
        if not any(place is parameter for parameter in weights.values()):
            raise ConfigError(f"optim.name: got {name}, which keeps state under {place!r}, {NOT_KEPT}")
        for key, value in state.items():
            _check_value(name, key, value)
    for before, after in zip(groups, optimizer.param_groups, strict=True):
        for key in after.keys() - {"params", "lr"}:
            if key not in before or not _same(before[key], after[key]):
                raise ConfigError(f"optim.name: got {name}, which changes {key!r} of its groups, {NOT_KEPT}")
    for key, value in _plain(vars(optimizer)).items():
        if key not in attributes or not _same(attributes[key], value):
            raise ConfigError(f"optim.name: got {name}, which changes its own {key!r}, {NOT_KEPT}")


def _check_value(name: str, key: Any, value: Any) -> None:
    if value is not None and not isinstance(value, torch.Tensor):
        raise ConfigError(
            f"optim.name: got {name}, which keeps {key!r} of a parameter as {type(value).__name__}, expected a "
            f"tensor, as a checkpoint holds tensors alone; for a count, torch.tensor(0.0)"
        )
    if not isinstance(key, str) or not key or "." in key:
        raise ConfigError(f"optim.name: got {name}, which keeps state as {key!r}, expected a name without dots")


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Numbers and tensors among the attributes; what else there is, a step may make and make again."""
    return {
        key: value.clone() if isinstance(value, torch.Tensor) else value
        for key, value in values.items()
        if isinstance(value, (bool, int, float, complex, torch.Tensor))
    }


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, float) and isinstance(other, float) and math.isnan(one):
        return math.isnan(other)
    return type(one) is type(other) and bool(one == other)
