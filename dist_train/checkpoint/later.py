"""Weights of a file or a checkpoint for a model that is sharded before it has any: each rank reads its own boxes."""

from functools import partial

import torch
from torch import nn

from dist_train.backends.start import Source, Start, mapped_source
from dist_train.checkpoint import weights
from dist_train.checkpoint.manifest import Manifest
from dist_train.checkpoint.places import Folder
from dist_train.checkpoint.resume import read_boxes, read_weights
from dist_train.models.recording import Unrecordable


def warm_start(model: nn.Module, start: Start, path: Folder, strict: bool) -> tuple[str, ...]:
    """What weights.warm_start does, for a model whose parameters are on the meta device: buffers are loaded now, and
    the parameters when they are there. Gives lines that say what fits.

    Raises:
        ConfigError: see weights.warm_start.
        Unrecordable: a layer loads its weights in a way of its own.
    """
    if any(_loads_itself(module) for module in model.modules()):
        raise Unrecordable("makes layers that load their weights in a way of their own")
    if weights.is_checkpoint(path):
        folder, given = weights.newest(path, "model.init_from", _forms)
    else:
        folder, given = None, weights.read(path)
    found = weights.match(model, given)
    lines = weights.said(path, found, strict)
    own = model.state_dict()
    beside = {name: value for name, value in found.found.items() if not own[name].is_meta}
    parameters = {name: value for name, value in found.found.items() if name not in beside}
    if folder is None:
        start.source = mapped_source(parameters)
    elif found.stripped:
        raise Unrecordable("makes layers whose weights have other names in the checkpoint")
    else:
        beside = {name: torch.empty(value.shape, dtype=value.dtype) for name, value in beside.items()}
        read_weights(folder, beside)
        start.source = Source(parameters.keys(), partial(read_boxes, folder))
    model.load_state_dict(beside, strict=False)
    return lines


def _forms(folder: Folder, what: Manifest) -> tuple[Folder, weights.State]:
    """A checkpoint's folder, and its tensors without values."""
    forms = {
        name: torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype), device="meta")
        for name, tensor in what.model.items()
    }
    return folder, forms


def _loads_itself(module: nn.Module) -> bool:
    own = type(module)._load_from_state_dict is not nn.Module._load_from_state_dict
    return bool(module._load_state_dict_pre_hooks) or (own and not type(module).__module__.startswith("torch.nn."))
