"""What a run holds and sends, computed without having it: two steps and an evaluation of rank 0, on tensors without
values, among ranks that are not there. The model, the task, the optimizer and the backend are the run's own."""

import logging
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from unittest.mock import patch

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dist_train import backends
from dist_train.backends import matrices, mesh
from dist_train.backends.base import Backend
from dist_train.backends.matrices import Matrix, Part, rows_of
from dist_train.backends.precision import Precision
from dist_train.backends.shards import local_of
from dist_train.config.tree import CompileConfig, Config, group_of
from dist_train.data.batch import Batch, like, mapped
from dist_train.data.feed import Feed
from dist_train.data.order import evaluated_at_once, largest_piece, pieces
from dist_train.data.sets import Columns, Data, Samples
from dist_train.doctor.estimate import MICRO_BATCH, Estimate
from dist_train.doctor.ledger import ASKS, Ledger
from dist_train.doctor.stand_in import BUCKETED, TRACED_AS_SINGLE, Buckets, zero
from dist_train.doctor.traffic import Route, Sent, passed_on, route
from dist_train.loop import optim
from dist_train.loop.average import Average
from dist_train.loop.evaluate import Called, in_eval
from dist_train.loop.muon import Muon
from dist_train.loop.units import loss_sum
from dist_train.models import draws
from dist_train.models.running import running
from dist_train.ranks import dist
from dist_train.ranks.dist import World
from dist_train.ranks.launcher import Launcher
from dist_train.run import assemble
from dist_train.tasks.base import nbytes, units_per_sample

CPU = torch.device("cpu")
PIECES = 2  # micro-batches that are traced of a step: those between the first and the last are as the first


def traced(config: Config, data: Data, ranks: int, of_node: int) -> Estimate:
    """The estimate of a config. The process must have no group.

    Args:
        config: of the run, with the name of its backend.
        data: its data set.
        ranks: all of them.
        of_node: ranks of a node.

    Raises:
        Exception: whatever the model or a library raises on tensors without values.
    """
    dtype = Precision(config.train.precision, CPU).dtype
    shape, name = mesh.of(config, ranks), config.backend.name
    with _quiet(), dist.imagined(ranks, of_node, shape.tensor) as world:
        trace = Trace(_traceable(config), data, world, name in BUCKETED)  # makes groups of ranks, which have numbers
        with FakeTensorMode(allow_non_fake_inputs=True), trace.ledger, _default_dtype(dtype):
            trace.build()
            trace.step(1)
            trace.step(min(PIECES, trace.micro_batches))
            trace.evaluate()
            found = trace.estimate(shape if name == "fsdp2" else None)
    return zero(found, config, ranks, of_node) if name == "deepspeed" else found


def of_run(config: Config, launcher: Launcher) -> Estimate:
    """The estimate of a run as it was started. Reads its data. Raises as `traced`, and ConfigError."""
    data = assemble.read_data(config.data, False)
    backend = replace(config.backend, name=backends.chosen(config.backend.name, launcher.name))
    return traced(replace(config, backend=backend), data, launcher.world_size, launcher.local_world_size)


def _traceable(config: Config) -> Config:
    """Of a run that takes as much memory, compiles nothing, and is of a backend that takes tensors without values."""
    name = "single" if config.backend.name in TRACED_AS_SINGLE else config.backend.name
    return replace(config, compile=CompileConfig(), backend=replace(config.backend, name=name))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings of libraries, which a run would show; and without the traceback that torch logs of an error."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            log.setLevel(level)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """What is made is of this type; a module of tensors without values cannot be converted."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Trace:
    """The training of one rank. Its methods are to be called on tensors without values, and within its ledger.

    Args:
        config: of the run, as `_traceable` gives it.
        data: its data set.
        world: rank 0.
        buckets: gradients lie in buckets; see Buckets.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    average: Average
    draws: draws.Draws

    def __init__(self, config: Config, data: Data, world: World, buckets: bool):
        self.config, self.data, self.world, self.bucketed = config, data, world, buckets
        cfg, of = config.train, config.data
        self.precision = Precision(cfg.precision, CPU)  # a size does not depend on the device
        self.task = assemble.make_task(config, data)
        rest = of.normalize, of.one_hot, 0, cfg.seed, self.task.loss_of_vectors, assemble.batch_transforms(config, data)
        self.feed = Feed(data.train, data, CPU, self.precision.dtype, *rest)
        self.kind = self.feed.of(np.zeros(1, np.int64))
        group = (cfg.micro_batch_size if config.backend.reduce == "ordered" else group_of(config.model)) or 1
        counts = cfg.global_batch_size, world.data_size, cfg.micro_batch_size, group
        self.micro, self.micro_batches = largest_piece(*counts), pieces(*counts)
        self.backend: Backend = backends.create(config, world)
        self.buckets: Buckets | None = None
        self.ledger, self.held = Ledger(), {"weights": 0, "gradients": 0, "optimizer": 0}
        self.steps, self.evaluated = 0, 0
        self.sent: list[tuple[int, Sent]] = []  # of a step, how often
        self.exchanged = 0  # bytes of matrices, by an optimizer that computes with them

    def build(self) -> None:
        """Makes the model, and has the backend prepare it."""
        cfg, ledger = self.config, self.ledger
        ledger.enter("build")
        model = assemble.maker(cfg, self.data)()
        self.task.begin(model)
        if cfg.train.draws == "keyed":
            draws.frame(model, cfg.model.blocks, parts=not self.task.evaluates)
        ledger.enter("prepare")
        with patch.object(matrices, "SeesMatrices", ()):  # which would ask all ranks what they hold of each
            self.model, self.optimizer = self.backend.prepare(model, optim.factory(cfg.optim, model))
        if isinstance(self.optimizer, Muon):
            self.exchanged = _by_itself(self.optimizer)
        if self.bucketed:
            self.buckets = Buckets(self.backend.parameters)
        self.average = Average(cfg.optim, self.backend)
        self.average.begin(0)
        self.draws = draws.Draws(cfg.train.seed, 0, self.model, cfg.train.draws, CPU)
        self._tell("weights", chain(self.model.parameters(), self.model.buffers()))
        self._tell("optimizer", self._state())

    def step(self, count: int) -> None:
        """A step of so many micro-batches."""
        ledger, backend, called = self.ledger, self.backend, self.precision.called(self.model)
        ledger.enter("data")
        # Where units are counted, the micro-batches of two steps are there.
        ahead = 0 if units_per_sample(self.task) is not None else 2 * self.micro_batches - 1
        waiting = [self._batch(self.micro) for _ in range(ahead)]
        self.sent, ledger.sent = [], []
        for i in range(count):
            last = i == count - 1
            ledger.enter("data")
            batch = self._batch(self.micro)
            if self.buckets:
                self.buckets.last = last
            ledger.enter("forward")
            with backend.accumulate(last), running(batch), self.draws.of(batch.ids, self.steps):
                loss = loss_sum(self.task, called, batch)
                ledger.enter("backward")
                backend.backward(loss / self.micro)
            if not last:
                self.sent, ledger.sent = [(self.micro_batches - 1, sent) for sent in ledger.sent], []
        self._tell("gradients", (p.grad for p in backend.parameters if p.grad is not None))
        ledger.enter(ASKS)
        backend.step(self.config.train.grad_clip, measure=True)
        self.sent += [(1, sent) for sent in ledger.sent]
        ranks = tuple(range(self.world.size))
        self.sent.append((1, Sent("all_gather", passed_on("all_gather", self.exchanged, len(ranks)), ranks)))
        self.steps += 1
        self.average.after_step(self.steps)
        self._tell("optimizer", self._state())
        del waiting

    def evaluate(self) -> None:
        """A batch of the largest test split."""
        cfg, ledger = self.config.train, self.ledger
        largest = max((len(split) for split in self.data.tests.values()), default=0)
        if not (largest and self.task.evaluates):
            return
        called, ranks = Called(self.precision.called(self.model)), self.world.data_size
        ledger.enter("evaluation")
        with torch.no_grad(), in_eval(self.model), self.average.used():
            self.task.sums(called, like(self.kind, 1))
            at_once = evaluated_at_once(cfg, ranks, nbytes(self.kind.tree) + nbytes(called.outputs))
            self.evaluated = min(at_once, -(-largest // ranks))
            self.task.sums(called, self._batch(self.evaluated))
        ledger.enter("")

    def estimate(self, shape: mesh.Mesh | None) -> Estimate:
        """Of what was counted. `shape` is that of a backend with a mesh."""
        peak = self.ledger.peak(*MICRO_BATCH, "update", "evaluation")
        samples = {"update": 0, "evaluation": self.evaluated}.get(peak.phase, self.micro)
        whole = sum(t.numel() * t.itemsize for t in chain(self.model.state_dict().values(), self._state()))
        data = sum(nbytes(split.tree) for split in self.data.splits.values() if isinstance(split, Columns))
        sent: Counter[Route] = Counter()
        for times, one in self.sent:
            if len(one.ranks) > 1:
                sent[route(one.ranks, shape, self.world.local_size)] += times * one.bytes
        return Estimate(
            peak, samples, self.micro, self.micro_batches, self.held, whole, data,
            self.ledger.peak("build", "prepare").total, dict(sent),
        )  # fmt: skip

    def _batch(self, count: int) -> Batch:
        """So many samples; from memory, the first of those that are gathered together."""
        at_once = 1 if isinstance(self.feed.split, Samples) else self.feed.at_once
        together = like(self.kind, count * -(-at_once // count))
        tree = mapped(together.tree, lambda leaf: leaf.narrow(0, 0, count) if isinstance(leaf, torch.Tensor) else leaf)
        return Batch(tree, together.ids[:count], count)

    def _state(self) -> list[torch.Tensor]:
        """The optimizer's, with averaged weights."""
        state = [v for values in self.optimizer.state.values() for v in values.values() if isinstance(v, torch.Tensor)]
        return [*state, *(self.average.kept or ())]

    def _tell(self, kind: str, tensors: Iterable[torch.Tensor]) -> None:
        own = [local_of(tensor) for tensor in tensors]
        self.held[kind] = max(self.held[kind], sum(tensor.nbytes for tensor in own))
        self.ledger.tell(kind, own)


def _by_itself(optimizer: Muon) -> int:
    """Has it compute with what this rank holds of each matrix, as it is: it exchanges nothing that way. What it would
    exchange, in bytes of the whole: the results of matrices that every rank holds; and of those that ranks hold parts
    of, the parts as well."""
    exchanged = 0
    for group in optimizer.param_groups:
        for parameter in group["params"] if optimizer.sees(group) else ():
            local = local_of(parameter)
            optimizer.layout[parameter] = [Matrix(rows_of(local.shape), 0, (Part(0, local.numel()),))]
            whole = parameter.numel() * parameter.itemsize
            exchanged += whole if local.shape == parameter.shape else 2 * whole
    return exchanged
