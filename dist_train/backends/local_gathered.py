"""The gradients that a rank has computed by itself under fully_shard, before they are reduced and cut into shards."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from dist_train.backends.local import See, told


@contextmanager
def seen_gathered(model: nn.Module, see: See) -> Iterator[Mapping[int, torch.Tensor]]:
    """See local.seen. What a layer computes with, and what gets a gradient, is there from its forward on only: it is
    looked for as the layer is entered. Gives what has been found so far.

    Args:
        model: sharded.
        see: is handed the whole parameters.
    """
    handles: list[Any] = []
    known: dict[int, torch.Tensor] = {}

    def enter(layer: nn.Module, _: Any) -> None:
        for name, module, own in places[layer]:
            parameter = module._parameters[own]
            if parameter is not None and parameter.requires_grad and id(parameter) not in known:
                known[id(parameter)] = parameter
                handles.append(parameter.register_post_accumulate_grad_hook(told(name, see)))

    places = _places(model)
    handles += [layer.register_forward_pre_hook(enter) for layer in places]  # after fully_shard's own, which gathers
    try:
        yield known
    finally:
        for handle in handles:
            handle.remove()


def _places(model: nn.Module) -> dict[nn.Module, list[tuple[str, nn.Module, str]]]:
    """Of each layer that is gathered by itself, its parameters: name, module and the name there."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, FSDPModule)}
    found: dict[nn.Module, list[tuple[str, nn.Module, str]]] = {layer: [] for layer in layers.values()}
    for name, module in model.named_modules():
        above = max((of for of in layers if not of or name == of or name.startswith(f"{of}.")), key=len)
        prefix = f"{name}." if name else ""
        found[layers[above]] += [(prefix + own, module, own) for own in module._parameters]
    return found
