"""Parameter groups: which settings of the optimizer each parameter has, by its name."""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from dist_train.config.tree import OptimConfig
from dist_train.errors import ConfigError
from dist_train.loop.hidden import MUON, others_of

Settings = dict[str, Any]
NEAR = 3  # names that are shown where a pattern matches nothing


@dataclass(frozen=True)
class Groups:
    """The groups of a model's parameters.

    Args:
        settings: of each group, without `params`: what differs from the optimizer's own arguments. The first is that of
            the parameters that no pattern matches.
        of: the number of a parameter's group, by its name; 0 if it is not there.
    """

    settings: tuple[Settings, ...]
    of: Mapping[str, int]

    def arranged(self, named: Iterable[tuple[str, nn.Parameter]]) -> list[Settings]:
        """The parameters as torch's optimizers take groups of them; those without any are left out."""
        members: dict[int, list[nn.Parameter]] = {}
        for name, parameter in named:
            members.setdefault(self.of.get(name, 0), []).append(parameter)
        return [{"params": members[i], **self.settings[i]} for i in sorted(members)]


def groups_of(config: OptimConfig, model: nn.Module | None) -> Groups:
    """The groups that a config makes of a model that no backend has prepared; of None it makes one.

    Each has a `lr_scale`: its peak learning rate divided by optim.lr, so that one schedule moves all.

    Raises:
        ConfigError: a pattern matches nothing.
    """
    splits = config.name == MUON
    settings = _variants(config, {"lr_scale": 1.0} | ({"optimizer": MUON} if splits else {}))
    beside = _variants(config, {"lr_scale": _adamw_scale(config), "optimizer": "AdamW"}) if splits else ()
    if model is None:
        return Groups(beside or settings, {})
    of = _matched(config, model)
    others = others_of(config, model, of) if splits else ()
    if config.no_decay:
        of |= {name: of.get(name, 0) + 1 + len(config.groups) for name in _without_decay(model)}
    of |= {name: of.get(name, 0) + len(settings) for name in others}
    return Groups(settings + beside, of)


def _variants(config: OptimConfig, plain: Settings) -> tuple[Settings, ...]:
    """Without a group and of each group, then the same without weight decay."""
    asked = [plain | _settings(config, group) for group in config.groups]
    undecayed = [settings if "weight_decay" in settings else settings | {"weight_decay": 0.0} for settings in asked]
    return (plain, *asked, plain | {"weight_decay": 0.0}, *undecayed)


def _settings(config: OptimConfig, group: Mapping[str, Any]) -> Settings:
    rest = {key: value for key, value in group.items() if key not in ("match", "lr")}
    return rest | ({"lr_scale": group["lr"] / config.lr} if "lr" in group else {})


def _adamw_scale(config: OptimConfig) -> float:
    """The learning rate of AdamW beside Muon, divided by optim.lr."""
    adamw = config.args.get("adamw") or {}
    return adamw["lr"] / config.lr if "lr" in adamw else 1.0


def _matched(config: OptimConfig, model: nn.Module) -> dict[str, int]:
    """The number of the first pattern that matches, from 1, by the names of the parameters. Raises ConfigError."""
    names = [name for name, _ in model.named_parameters()]
    of: dict[str, int] = {}
    lines = []
    for i, group in enumerate(config.groups, 1):
        pattern = group["match"]
        matched = [name for name in names if fnmatchcase(name, pattern)]
        new = {name: i for name in matched if name not in of}
        if not new:
            path = f"optim.groups: got match {pattern!r}"
            if matched:
                before = config.groups[of[matched[0]] - 1]["match"]
                lines.append(
                    f"{path}, but every parameter that it matches, such as {matched[0]}, belongs to an earlier group, "
                    f"such as that of {before!r}; put it before that one, or take it out"
                )
            else:
                lines.append(f"{path}, which matches no parameter of the model; {_near(pattern, model, names)}")
        of |= new
    if lines:
        raise ConfigError(*lines)
    return of


def _near(pattern: str, model: nn.Module, names: list[str]) -> str:
    every = dict(model.named_parameters(remove_duplicate=False))
    for name in every:
        if fnmatchcase(name, pattern):
            first = next(own for own in names if every[own] is every[name])
            return f"{name} is the same parameter as {first}, which is its name; write match: {first!r}"
    found = difflib.get_close_matches(pattern, names, n=NEAR, cutoff=0.3) or names[:NEAR]
    return f"expected a pattern of names such as {', '.join(found)}; * stands for anything, dots as well"


def _without_decay(model: nn.Module) -> Iterator[str]:
    """Biases, the weights of norms, and all others of at most one dimension."""
    norms = {name for name, module in model.named_modules() if "Norm" in type(module).__name__}
    for name, parameter in model.named_parameters():
        module, _, own = name.rpartition(".")
        if parameter.dim() < 2 or own == "bias" or module in norms:
            yield name
