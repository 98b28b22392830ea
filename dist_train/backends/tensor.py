"""Layers that are split over the tensor ranks of a mesh, by a table (models/split.py). torch's DTensor styles do the
work, as hooks around the layers; no forward of a model knows of it.

In training each rank may have a part of the tokens between layers; in evaluation all have all of them, so that text of
any length can be read.
"""

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from dist_train.backends.fit import some
from dist_train.backends.probe import Findings, Signs
from dist_train.config.tree import Config
from dist_train.errors import ConfigError
from dist_train.models.split import cuts, table_of, words_of
from dist_train.models.split_words import Word
from dist_train.ranks import dist

WHOLE, TOKENS = (Replicate(),), (Shard(1),)
SHORT = ("bfloat16", "float16")
# How far a sign may be off, as a share of its gradient's norm; and of the norm of all gradients, below which is noise.
TOLERANCE, TOLERANCE_SHORT, NOISE = 1e-2, 1e-1, 1e-4


def split(model: nn.Module, mesh: DeviceMesh, config: Config, findings: Findings) -> None:
    """Splits the layers of a model, in place, before they are compiled and sharded; and has it take the first samples
    again, which must give what the whole model gave. Names stay as they are. Collective.

    Args:
        model: passed models.split.check.
        mesh: the tensor dimension.
        config: of the run.
        findings: what the whole model showed.

    Raises:
        ConfigError: the split model computes something else.
    """
    words = words_of(model, config.model)
    tokens = TOKENS if cuts(words) else WHOLE
    whole = findings.first((0, 1)) if findings.first is not None else {}  # with the weights that training starts from
    modules = dict(model.named_modules())
    before = {module: dict(module._parameters) for module in modules.values()}
    for name, word in words.items():
        if word.kind == "gather":
            keeps = any(other.splits and below.startswith(f"{name}.") for below, other in words.items())
            _gather(modules[name], model, mesh, keeps)
        elif word.kind == "cut":
            _cut(modules[name], model, mesh, name)
        elif word.splits or modules[name]._parameters:
            within = any(other.kind == "gather" and name.startswith(f"{above}.") for above, other in words.items())
            style = _style(model, name, word, WHOLE if within else tokens, tokens)
            parallelize_module(modules[name], mesh, style, src_data_rank=None)  # which all ranks have drawn alike
    _tie(before)
    if findings.first is not None:
        _compare(config, model, mesh, whole, findings.first)


def _style(model: nn.Module, name: str, word: Word, gets: tuple, gives: tuple) -> ParallelStyle:
    """The style of a layer that is split, or computes its part of the tokens.

    Args:
        model: the root, which says whether it is in training.
        name: of the layer.
        word: what is done with it.
        gets: how the input of columns lies in training.
        gives: the same of what rows give.
    """
    if word.kind == "columns":
        return Columns(model, gets, WHOLE if word.gathered else (Shard(-1),))
    if word.kind == "rows":
        embeds = isinstance(model.get_submodule(name), nn.Embedding)
        return Rows(model, name, WHOLE if embeds else (Shard(-1),), WHOLE if word.gathered else gives)
    return Tokens(model)


class Columns(ColwiseParallel):
    """See ColwiseParallel. A layer may have more arguments, and give what is whole already, such as a loss.

    Args:
        model: the root.
        gets: how its input lies in training.
        gives: how its output lies.
    """

    def __init__(self, model: nn.Module, gets: tuple, gives: tuple):
        super().__init__(input_layouts=gets[0], output_layouts=gives[0])
        self.model = model

    def _prepare_input_fn(self, gets: tuple, wants: tuple, module: nn.Module, inputs: tuple, mesh: DeviceMesh) -> Any:
        gets = gets if self.model.training else WHOLE
        return ColwiseParallel._prepare_input_fn(gets, wants, module, inputs, mesh), *inputs[1:]

    def _prepare_output_fn(self, gives: tuple, local: bool, module: nn.Module, outputs: Any, mesh: DeviceMesh) -> Any:
        if not isinstance(outputs, DTensor):
            return outputs
        found = ColwiseParallel._prepare_output_fn(gives, local, module, outputs, mesh)
        return found.clone() if gives == WHOLE else _no_view(module, found)


class Rows(RowwiseParallel):
    """See RowwiseParallel.

    Args:
        model: the root.
        name: of the layer.
        gets: how its input lies.
        gives: how its output lies in training.
    """

    def __init__(self, model: nn.Module, name: str, gets: tuple, gives: tuple):
        super().__init__(input_layouts=gets[0], output_layouts=gives[0])
        self.model, self.name = model, name

    def _prepare_output_fn(self, gives: tuple, local: bool, module: nn.Module, outputs: Any, mesh: DeviceMesh) -> Any:
        gives = gives if self.model.training else WHOLE
        if gives == TOKENS:
            _check_tokens(self.name, outputs, mesh)
        return _no_view(module, RowwiseParallel._prepare_output_fn(gives, local, module, outputs, mesh))


class Tokens(SequenceParallel):
    """See SequenceParallel. The rest of the model gets plain tensors.

    Args:
        model: the root.
    """

    def __init__(self, model: nn.Module):
        super().__init__(sequence_dim=1, use_local_output=True)
        self.model = model

    def _prepare_input_fn(self, gets: tuple, module: nn.Module, inputs: tuple, mesh: DeviceMesh) -> Any:
        return SequenceParallel._prepare_input_fn(gets if self.model.training else WHOLE, module, inputs, mesh)

    def _prepare_output_fn(self, local: bool, module: nn.Module, outputs: Any, mesh: DeviceMesh) -> Any:
        return _no_view(module, SequenceParallel._prepare_output_fn(local, module, outputs, mesh))


def _no_view(module: nn.Module, outputs: torch.Tensor) -> torch.Tensor:
    """fully_shard warns of a layer that it gathers by itself, and that gives a view, as to_local does."""
    return outputs.clone() if isinstance(module, FSDPModule) else outputs


def _gather(layer: nn.Module, model: nn.Module, mesh: DeviceMesh, keeps: bool) -> None:
    """Gathers the tokens of a layer's first tensor. Layers that are split within it take it as a DTensor (`keeps`), so
    that their gradients are added up once."""

    def whole(value: torch.Tensor) -> torch.Tensor:
        given = DTensor.from_local(value, mesh, TOKENS, run_check=False).redistribute(placements=WHOLE)
        return given if keeps else given.to_local()

    def enter(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        if not model.training:
            return None
        if args:
            return (whole(args[0]), *args[1:]), kwargs
        first = next(name for name, value in kwargs.items() if isinstance(value, torch.Tensor))
        return args, kwargs | {first: whole(kwargs[first])}

    layer.register_forward_pre_hook(enter, with_kwargs=True)


def _cut(layer: nn.Module, model: nn.Module, mesh: DeviceMesh, name: str) -> None:
    """Leaves each rank its part of the tokens that a layer gives."""

    def leave(_: nn.Module, args: tuple, outputs: Any) -> Any:
        if not model.training:
            return outputs
        several = isinstance(outputs, tuple)
        first = outputs[0] if several else outputs
        _check_tokens(name, first, mesh)
        part = DTensor.from_local(first, mesh, WHOLE, run_check=False).redistribute(placements=TOKENS).to_local()
        return (part, *outputs[1:]) if several else part

    layer.register_forward_hook(leave)


def _check_tokens(name: str, outputs: torch.Tensor, mesh: DeviceMesh) -> None:
    """Raises ConfigError where ranks cannot have equal parts of the tokens."""
    ranks = mesh.size()
    if outputs.dim() < 2 or outputs.shape[1] % ranks:
        raise ConfigError(
            f"backend.mesh.tensor: got {ranks}, but {name} gives {list(outputs.shape)}, expected a second dimension, "
            f"the tokens, of which each rank has an equal part; pad samples to a multiple of {ranks}, or leave "
            f"sequence, gather and cut out of the table"
        )


def _tie(before: Mapping[nn.Module, Mapping[str, nn.Parameter | None]]) -> None:
    """Makes weights that layers shared one again, and asks for gradients as before."""
    new: dict[nn.Parameter, nn.Parameter] = {}
    for module, own in before.items():
        for name, parameter in own.items():
            if parameter is not None and module._parameters[name] is not parameter:
                found = new.setdefault(parameter, module._parameters[name])
                module.register_parameter(name, found.requires_grad_(parameter.requires_grad))


def _compare(
    config: Config, model: nn.Module, mesh: DeviceMesh, whole: Signs, first: Callable[[tuple[int, int]], Signs]
) -> None:  # fmt: skip
    """Has the split model take the first samples. Raises ConfigError on all ranks where one has another result than
    the whole model."""
    path, _ = table_of(model, config.model)
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL)  # it shows a traceback before it raises
    try:
        found = first((mesh.get_local_rank(), mesh.size()))
    except (RuntimeError, ValueError, TypeError, IndexError) as error:  # torch's, of shapes that do not fit
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ConfigError(
            f"{path}: got a model that fails on the first samples as it is split: {why}; {MEND}"
        ) from error
    finally:
        log.setLevel(level)
    tolerance = TOLERANCE_SHORT if config.train.precision in SHORT else TOLERANCE
    by_rank = [said for said in dist.gather(_others(whole, found, tolerance)) if said]
    if by_rank:
        raise ConfigError(
            f"{path}: got a model that computes another {by_rank[0]} on the first samples as it is split than whole; "
            f"{MEND}"
        )


MEND = (
    "expected the same; rows take what columns of the same numbers give, a layer on a part of the tokens is named "
    "sequence, and one that needs all of them gather; leave out what does not fit"
)


def _others(whole: Signs, found: Signs, tolerance: float) -> str:
    """What the split model gives otherwise, in words; empty if nothing."""
    total = math.hypot(*(norm for name, (norm, _) in whole.items() if name))

    def differs(name: str, floor: float) -> bool:
        if name not in whole or name not in found:
            return True
        if not all(map(math.isfinite, whole[name])):
            return False
        allowed = tolerance * whole[name][0] + floor
        return not all(abs(a - b) <= allowed for a, b in zip(whole[name], found[name], strict=True))

    if differs("", 0.0):
        return "loss"
    names = tuple(name for name in {**whole, **found} if name and differs(name, NOISE * total))
    return f"gradient of {some(names)}" if names else ""
