"""How much memory a run needs, computed without having it: the model, a step and an evaluation on fake tensors."""

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_train import backends
from dist_train.backends.precision import Precision
from dist_train.config.tree import Config, group_of
from dist_train.data.batch import Batch, like, mapped
from dist_train.data.feed import GATHERED, Feed
from dist_train.data.order import evaluated_at_once, largest_piece
from dist_train.data.sets import Columns, Data, Samples
from dist_train.loop import optim
from dist_train.loop.evaluate import Called
from dist_train.models.blocks import blocks
from dist_train.ranks.launcher import Launcher
from dist_train.run import assemble
from dist_train.tasks.base import nbytes

BUCKET_ELEMENTS = 500_000_000  # the most that DeepSpeed reduces at once


@dataclass(frozen=True)
class Needs:
    """Bytes of a rank.

    Args:
        weights: parameters and buffers, as the backend shares them out.
        gradients: likewise.
        optimizer: its state, likewise.
        library: what the backend holds beside these: gathered layers, buckets, masters.
        working: the most that a step or an evaluation holds beyond all these: activations, temporaries.
        data: the data set, where it is held in memory.
        state: weights and optimizer state of the whole model, as a checkpoint holds them.
        busiest: when that is: in a micro-batch, an evaluation, or an update of the weights.
        samples: at once, then.
    """

    weights: int
    gradients: int
    optimizer: int
    library: int
    working: int
    data: int
    state: int
    busiest: str
    samples: int


def needs(config: Config, data: Data, launcher: Launcher, device: torch.device) -> Needs:
    """Of rank 0, which holds the largest share. Raises what the model raises on fake tensors."""
    cfg, world = config.train, launcher.world_size
    precision = Precision(cfg.precision, torch.device("cpu"))  # a size does not depend on the device
    micro = largest_piece(cfg.global_batch_size, world, cfg.micro_batch_size, group_of(config.model) or 1)
    task, feed = assemble.make_task(config, data), _feed(config, data, precision)
    kind = feed.of(np.zeros(1, np.int64))
    with FakeTensorMode(allow_non_fake_inputs=True), _default_dtype(precision.dtype):
        model = assemble.maker(config, data)()
        task.begin(model)
        parameters = [p for p in model.parameters() if p.requires_grad]
        for p in parameters:
            p.grad = torch.zeros_like(p)
        called = Called(precision.called(model))
        training = peak(lambda: task.sums(called, _batch(feed, kind, micro))["loss"].backward())
        model.eval()
        with torch.no_grad():
            task.sums(called, like(kind, 1))
            evaluated = evaluated_at_once(cfg, world, nbytes(kind.tree) + nbytes(called.outputs))
            largest = max((len(split) for split in data.tests.values()), default=0)
            evaluated = min(evaluated, -(-largest // world))
            evaluation = peak(lambda: task.sums(called, _batch(feed, kind, evaluated))) if evaluated else 0
    state, updating = _optimizer(config, model, device)
    shares = _shares(config, launcher, model, state)
    held = sum(nbytes(split.tree) for split in data.splits.values() if isinstance(split, Columns))
    whole = _bytes(model.state_dict().values()) + sum(_bytes(tensors) for tensors in state.values())
    phases = [(training, "micro-batch", micro), (evaluation, "evaluation", evaluated), (updating, "update", 0)]
    working, busiest, samples = max(phases)
    return Needs(*shares, working, held, whole, busiest, samples)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """What is made is of this type; a module of fake tensors cannot be converted."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _feed(config: Config, data: Data, precision: Precision) -> Feed:
    cfg = config.data
    return Feed(data.train, data, torch.device("cpu"), precision.dtype, cfg.normalize, cfg.one_hot)


def _batch(feed: Feed, kind: Batch, count: int) -> Batch:
    """So many samples; from memory, the first of those that are gathered together."""
    together = like(kind, count * -(-GATHERED // count) if not isinstance(feed.split, Samples) else count)
    tree = mapped(together.tree, lambda leaf: leaf.narrow(0, 0, count) if isinstance(leaf, torch.Tensor) else leaf)
    return Batch(tree, together.ids[:count], count)


State = dict[nn.Parameter, list[torch.Tensor]]


def _optimizer(config: Config, model: nn.Module, device: torch.device) -> tuple[State, int]:
    """The optimizer's state by parameter, with its averaged weights; and the most that a step holds beyond it."""
    build, averages = optim.factory(config.optim, model), config.optim.ema is not None

    def step(of: dict[str, nn.Parameter]) -> tuple[State, int]:
        optimizer = build(of.items())
        for group in optimizer.param_groups:
            if device.type != "cpu" and group.get("foreach", 0) is None:
                group["foreach"] = True  # torch's choice on an accelerator: all parameters at once
        optimizer.step()
        temporary = peak(optimizer.step)
        kept = {p: [v for v in optimizer.state[p].values() if isinstance(v, torch.Tensor)] for p in of.values()}
        return {p: [*tensors, p.detach()] if averages else tensors for p, tensors in kept.items()}, temporary

    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            return step(named)
    except torch._subclasses.fake_tensor.DataDependentOutputException:
        pass  # one that reads its own numbers; it steps on real zeros, a parameter at a time
    state, most = {}, 0
    for name, p in named.items():
        real = nn.Parameter(torch.zeros(p.shape, dtype=p.dtype))
        real.grad = torch.zeros_like(real)
        found, temporary = step({name: real})
        state[p], most = [v.to("meta") for v in found[real]], max(most, temporary)
    return state, most


def _shares(config: Config, launcher: Launcher, model: nn.Module, state: State) -> tuple[int, int, int, int]:
    """Weights, gradients, optimizer state and the library's own, in bytes on rank 0."""
    n, backend = launcher.world_size, backends.chosen(config.backend.name, launcher.name)
    parameters, buffers = list(model.parameters()), _bytes(model.buffers())
    weights, gradients = _bytes(parameters), _bytes(state)
    optimizer = sum(_bytes(tensors) for tensors in state.values())
    if backend == "fsdp2":
        layers = [_bytes(layer.parameters()) for layer in blocks(model, config.model.blocks)]
        rest = weights - sum(layers)
        # The weights outside of layers stay gathered. Of layers one computes and one is on its way, and a gradient.
        library = rest + 3 * max(layers, default=0) if layers else 2 * weights
        sharded = sum(_rows(t, p, n) for p, tensors in state.items() for t in tensors)
        return sum(_rows(p, p, n) for p in parameters) + buffers, sum(_rows(p, p, n) for p in state), sharded, library
    if backend == "deepspeed":
        stage = config.backend.zero_stage or 0
        bucket = min(weights // 4, BUCKET_ELEMENTS) * 4
        masters = -(-weights // n) if stage else 0
        return (
            (-(-weights // n) if stage == 3 else weights) + buffers,
            -(-gradients // n) if stage >= 2 else gradients,
            -(-optimizer // n) if stage else optimizer,
            masters + bucket,
        )
    return weights + buffers, gradients, optimizer, 0


def _rows(tensor: torch.Tensor, parameter: torch.Tensor, n: int) -> int:
    """Bytes of rank 0's part of a tensor that is sharded as its parameter is: by rows."""
    if tensor.shape != parameter.shape or not tensor.dim():
        return tensor.nbytes
    return -(-tensor.shape[0] // n) * math.prod(tensor.shape[1:]) * tensor.itemsize


def _bytes(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors)


class _Live(TorchDispatchMode):
    """Bytes of the tensors that were made within, and are still there; and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in known:
                self._made(tensor.untyped_storage())
        return out

    def _made(self, storage: torch.UntypedStorage) -> None:
        key, count = storage._cdata, storage.nbytes()
        if key in self.sizes:
            return
        self.sizes[key] = count
        self.now += count
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


def peak(run: Callable[[], Any]) -> int:
    """The most bytes that tensors made by `run` take at once."""
    with _Live() as live:
        run()
    return live.most
