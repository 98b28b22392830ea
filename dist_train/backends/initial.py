"""Optimizer state that a checkpoint and an optimizer do not both have: an argument was changed at the resume, or a
weight is trained that was not."""

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import nn

from dist_train.backends.fit import some


def maker(
    optimizer: torch.optim.Optimizer, arguments: Mapping[str, Any], group: int = 0
) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    """A function from parameters to another optimizer of the same kind, with the settings of one of its groups.

    Args:
        optimizer: whose groups hold its settings.
        arguments: with which it was made, for those that its groups do not hold.
        group: the number of the group.
    """
    kind, takes = type(optimizer), inspect.signature(type(optimizer)).parameters.values()
    names = {a.name for a in takes if a.kind is not a.VAR_KEYWORD}
    if any(a.kind is a.VAR_KEYWORD for a in takes):
        names |= optimizer.defaults.keys()
    settings = {key: value for key, value in optimizer.param_groups[group].items() if key in names - {"params"}}
    return lambda parameters: kind(parameters, **{**arguments, **settings})


class Initial:
    """What an optimizer keeps of a parameter, as it is at the start.

    It is asked from the optimizer itself, by a step of another one of its kind on a small parameter with a gradient of
    zeros. That leaves every value as it was made, but for counts of steps.

    Args:
        optimizer: whose groups hold its settings.
        arguments: with which it was made, for those that its groups do not hold.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, arguments: Mapping[str, Any]):
        self.make = [maker(optimizer, arguments, i) for i in range(len(optimizer.param_groups))]
        self.groups = {p: i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
        self.known: dict[tuple, dict[str, torch.Tensor]] = {}

    def of(self, parameter: torch.Tensor, group: int | None = None) -> Mapping[str, torch.Tensor]:
        """Its state by key; small tensors of one value each, or without dimensions where the state is a count.

        Args:
            parameter: of the model, or a tensor in the place of some.
            group: the number of its group; None looks it up. ZeRO hands the optimizer its tensors only for a step.
        """
        group = self.groups.get(parameter, 0) if group is None else group
        at = group, parameter.dim(), parameter.dtype, parameter.device
        if at not in self.known:
            _, dims, dtype, device = at
            small = nn.Parameter(torch.zeros((2,) * dims, dtype=dtype, device=device))
            small.grad = torch.zeros_like(small)
            optimizer = self.make[group]([small])
            optimizer.step()
            self.known[at] = {k: v for k, v in optimizer.state[small].items() if v is not None}
        return self.known[at]

    def fill(self, parameter: torch.Tensor, state: dict[str, torch.Tensor], group: int | None = None) -> None:
        """Adds what a parameter's state lacks. Of one without any the optimizer makes it by itself. See `of`."""
        for key, value in self.of(parameter, group).items() if state else ():
            if key not in state:
                alike = value.dim() == parameter.dim() > 0
                state[key] = torch.full_like(parameter.detach(), value.flatten()[0].item()) if alike else value.clone()


def differences(
    saved: Collection[tuple[str, str]], wanted: Mapping[str, Collection[str]], trained: Collection[str]
) -> tuple[list[str], list[str]]:
    """What an optimizer and a checkpoint do not both have.

    Args:
        saved: parameter and key of every state in the checkpoint.
        wanted: by parameter, the keys that the optimizer keeps.
        trained: the parameters that get gradients.

    Returns:
        Parameters of which the checkpoint has no state, though it has that of others; and lines for people.
    """
    there = set(saved)
    missing = {name: [key for key in wanted[name] if (name, key) not in there] for name in trained}
    anew = [name for name, keys in missing.items() if keys and len(keys) == len(wanted[name])]
    if len(anew) == len(trained):
        anew = []
    keys = dict.fromkeys(key for name in missing if name not in anew for key in missing[name])
    unused = dict.fromkeys(key for name, key in saved if key not in wanted[name])
    begins = "starts at its initial value: the checkpoint has none"
    lines = [f"optimizer state {key} {begins}" for key in keys]
    if anew:
        lines.append(f"optimizer state of {some(tuple(anew))} {begins}")
    return anew, [*lines, *(f"optimizer state {key} of the checkpoint is not used" for key in unused)]
