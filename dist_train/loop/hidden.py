"""Which weights of a model are matrices to Muon."""

from collections.abc import Mapping

from torch import nn

from dist_train.backends.fit import some
from dist_train.config.tree import OptimConfig
from dist_train.errors import ConfigError

MUON = "Muon"


def others_of(config: OptimConfig, model: nn.Module, group_of: Mapping[str, int]) -> list[str]:
    """The parameters that AdamW takes, by the model's own names.

    Args:
        config: of the optimizer. A group with `optimizer` decides for what it matches.
        model: that no backend has prepared.
        group_of: the number of the group that matches a parameter, from 1.

    Raises:
        ConfigError: Muon is asked to take what is no matrix, or nothing.
    """
    hidden, possible = _hidden(model), _matrices(model)
    chosen: dict[str, bool] = {}  # whether it is Muon's
    for name, _ in model.named_parameters():
        i = group_of.get(name, 0)
        said = config.groups[i - 1].get("optimizer") if i else None
        chosen[name] = name in hidden if said is None else said == MUON
        if chosen[name] and name not in possible:
            match = config.groups[i - 1]["match"]
            raise ConfigError(
                f"optim.groups: got optimizer Muon for {match!r}, which matches {name} of shape "
                f"{list(model.get_parameter(name).shape)}, expected matrices, or kernels of convolutions; write a "
                f"narrower pattern, such as '*.weight'"
            )
    if not any(chosen[name] and p.requires_grad for name, p in model.named_parameters()):
        raise ConfigError(
            f"optim.name: got Muon for a model without a hidden matrix (it has {some(tuple(chosen))}); write "
            f"--optim.name AdamW, or choose some with optim.groups '[{{match: ..., optimizer: Muon}}]'"
        )
    return [name for name, muon in chosen.items() if not muon]


def _matrices(model: nn.Module) -> set[str]:
    """What can be orthogonalised: two dimensions, or a kernel of a convolution that connects all its channels."""
    kernels = {m.weight for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd) and m.groups == 1}
    return {
        name
        for name, p in model.named_parameters()
        if (p.dim() == 2 or p in kernels) and p.is_floating_point() and p.numel()
    }


def _hidden(model: nn.Module) -> set[str]:
    """Those of them that are hidden: not of an embedding or a norm, and not of the last nn.Linear, the output."""
    heads = [m for m in model.modules() if isinstance(m, nn.Linear)][-1:]
    outer = {
        p
        for m in model.modules()
        if "Embedding" in type(m).__name__ or "Norm" in type(m).__name__ or m in heads
        for p in m.parameters(recurse=False)
    }
    return {name for name in _matrices(model) if model.get_parameter(name) not in outer}
