"""The layers of a model that are sharded, gathered and compiled each by itself."""

from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatchcase

from torch import nn

from dist_train.errors import ConfigError

LISTS = (nn.ModuleList, nn.ModuleDict)  # have no forward of their own to gather for
NAMES_SHOWN = 12


def blocks(model: nn.Module, named: list[str] | None = None) -> Iterator[nn.Module]:
    """The layers of `model` that are sharded each by itself. The rest goes with the model.

    Args:
        model: before it is sharded.
        named: model.blocks: patterns of fnmatch for names or classes of modules, of which the outermost that match are
            taken. None takes the members of the outermost nn.Sequential and nn.ModuleList, but for a layer that shares
            a parameter with another part.

    Raises:
        ConfigError: a pattern matches no layer with weights, or one that shares a parameter with another part.
    """
    uses = Counter(p for _, p in model.named_parameters(remove_duplicate=False))
    for layer in _layers(model) if named is None else _named(model, named):
        own = Counter(p for _, p in layer.named_parameters(remove_duplicate=False))
        if own and all(uses[p] == own[p] for p in own):
            yield layer
        elif own and named is not None:
            shared = next(name for name, p in layer.named_parameters() if uses[p] != own[p])
            place = next(name for name, module in model.named_modules() if module is layer)
            raise ConfigError(
                f"model.blocks: got {named}, which matches {place}, but its {shared} is shared with another part of "
                f"the model, expected layers that share no weight; leave it out"
            )


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    if isinstance(module, LISTS):
        for member in module.children():
            yield from _layers(member) if isinstance(member, LISTS) else [member]
    elif isinstance(module, nn.Sequential):
        yield from module.children()
    else:
        for child in module.children():
            yield from _layers(child)


def _named(model: nn.Module, patterns: list[str]) -> list[nn.Module]:
    found: dict[nn.Module, str] = {}
    used = set()
    for name, module in model.named_modules():
        if not name or any(name.startswith(f"{outer}.") for outer in found.values()):
            continue
        mine = {one for one in patterns if fnmatchcase(name, one) or fnmatchcase(type(module).__name__, one)}
        if mine and next(module.parameters(), None) is not None:
            used |= mine
            if isinstance(module, LISTS):
                found |= {member: f"{name}.{key}" for key, member in module.named_children()}
            else:
                found[module] = name
    for pattern in patterns:
        if pattern not in used:
            with_weights = [m for m in model.modules() if m is not model and next(m.parameters(), None) is not None]
            kinds = list(dict.fromkeys(type(m).__name__ for m in with_weights if not isinstance(m, LISTS)))
            more = f" and {len(kinds) - NAMES_SHOWN} more" if len(kinds) > NAMES_SHOWN else ""
            raise ConfigError(
                f"model.blocks: got {pattern!r}, which matches no layer with weights, expected names or classes of "
                f"layers; the model has {', '.join(kinds[:NAMES_SHOWN]) or 'none'}{more}"
            )
    return list(found)
