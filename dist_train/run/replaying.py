"""Steps of a run, taken again, and what each was made of: the loss of each sample, and the gradient by parameter."""

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dist_train import backends
from dist_train.backends.base import Backend
from dist_train.backends.shards import local_of
from dist_train.checkpoint import resume
from dist_train.checkpoint.resume import Found
from dist_train.config.tree import Config
from dist_train.data.batch import Batch, leaves_of, mapped
from dist_train.loop import optim
from dist_train.loop.average import Average
from dist_train.loop.evaluate import Called, Evaluation
from dist_train.loop.meter import Control, Meter, Metrics, Recorder
from dist_train.loop.train import train
from dist_train.loop.work import Work
from dist_train.ranks import dist
from dist_train.ranks.dist import World
from dist_train.run.assemble import Parts
from dist_train.tasks.base import Task, units_of, units_per_sample

APART = 1e-3  # relative: how far the parts of a loss may be from the whole, which rounding never is


@dataclass
class Step:
    """A step that was taken again, over all ranks.

    Args:
        number: counts from 1, as the lines of metrics do.
        units: what its loss is a mean over.
        loss: the mean.
        grad_norm: before clipping; None where it was not measured.
        layers: the same by parameter.
        samples: the number and the loss of each, the mean over its units, the largest first; not finite ones before.
        unknown: why there is no loss of each sample; empty where there is.
    """

    number: int
    units: float = 0.0
    loss: float = 0.0
    grad_norm: float | None = None
    layers: dict[str, float] = field(default_factory=dict)
    samples: list[tuple[int, float | None]] = field(default_factory=list)
    unknown: str = ""


class Reached(Exception):
    """The last step is taken."""


class Watched(Task):
    """A task that looks at the losses of some steps.

    The loss of a sample is what the task gives for what the model gave for that sample: the model is not called again,
    as it might draw otherwise, or take statistics over a single sample.

    Attributes:
        looking: at the step that goes on.
        parts: sum of the losses, units, and number and loss of each sample, of each micro-batch of the step.
        unknown: see Step.
    """

    def __init__(self, task: Task):
        self.task = task
        self.units_per_sample = units_per_sample(task)
        self.mixes_samples = task.mixes_samples
        self.looking = False
        self.begin()

    def begin(self) -> None:
        """Another step."""
        self.parts: list[tuple[float, float, list[tuple[int, float | None]]]] = []
        self.unknown = "its loss compares samples with each other" if self.mixes_samples else ""

    def units(self, batch: Batch) -> torch.Tensor | int:
        """See Task."""
        return self.task.units(batch)

    def sums(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """See Task."""
        if not self.looking:
            return self.task.sums(model, batch)
        called = Called(model)
        found = self.task.sums(called, batch)
        if batch.size:
            total, units = float(found["loss"].detach()), float(units_of(self.task, batch))
            self.parts.append((total, units, self._each(model, called.outputs, batch, total)))
        return found

    @torch.no_grad()
    def _each(self, model: nn.Module, outputs: Any, batch: Batch, total: float) -> list[tuple[int, float | None]]:
        numbers = batch.ids.tolist()
        if not self.unknown and not _by_sample(outputs, batch.size):
            self.unknown = "what the model gives has no row for each sample"
        if self.unknown:
            return [(number, None) for number in numbers]
        losses, sums = [], []
        for i in range(batch.size):
            one = Batch(_row(batch.tree, i), batch.ids[i : i + 1], 1)
            loss = float(self.task.sums(Given(model, _row(outputs, i)), one)["loss"])
            sums.append(loss)
            losses.append(loss / max(1.0, float(units_of(self.task, one))))
        if math.isfinite(total) and abs(math.fsum(sums) - total) > APART * max(abs(total), 1e-30):
            self.unknown = "its loss is no sum over samples"
            return [(number, None) for number in numbers]
        return list(zip(numbers, losses, strict=True))


class Given:
    """A model that gives what it gave before."""

    def __init__(self, model: nn.Module, outputs: Any):
        self.model, self.outputs = model, outputs

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What was given."""
        return self.outputs

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


class Gradients:
    """The gradient of a step, as the optimizer is given it: seen by putting itself before the optimizer's step."""

    def __init__(self, backend: Backend, world: World):
        self.backend, self.world = backend, world
        self.seen: dict[int, torch.Tensor] | None = None
        inner = backend.optimizer.step

        def step(*args: Any, **kwargs: Any) -> Any:
            if self.seen is not None:
                self._look(self.seen)
            return inner(*args, **kwargs)

        backend.optimizer.step = step  # type: ignore[method-assign]

    def _look(self, seen: dict[int, torch.Tensor]) -> None:
        # ZeRO 3 steps some of its buffers at a time, which have no gradient before and after.
        for i, tensor in enumerate(self.backend.updated()):
            if tensor.grad is not None:
                seen[i] = local_of(tensor.grad).detach().clone()

    def norms(self, whole: float | None) -> dict[str, float]:
        """The norm of each parameter's gradient, before it was clipped. Collective.

        Args:
            whole: the norm of all, before clipping.
        """
        seen, self.seen = self.seen or {}, None
        live = self.backend.trained()
        lie = [seen.get(i, torch.zeros_like(tensor)) for i, tensor in enumerate(live)]
        mine = {
            name: (
                sum(float(part.abs().double().square().sum()) for _, part in shards.boxes),
                sum(part.numel() for _, part in shards.boxes) / max(1, math.prod(shards.shape)),
            )
            for name, shards in self.backend.named(lie).items()
        }
        squares: dict[str, float] = {}
        copies: dict[str, float] = {}
        for of_rank in dist.gather(mine):
            for name, (square, share) in of_rank.items():
                squares[name] = squares.get(name, 0.0) + square
                copies[name] = copies.get(name, 0.0) + share  # 1 where ranks share it out
        found = {name: math.sqrt(square / max(copies[name], 1e-30)) for name, square in squares.items()}
        clipped = math.sqrt(math.fsum(norm * norm for norm in found.values()))
        by = whole / clipped if whole and clipped and math.isfinite(whole / clipped) else 1.0
        return {name: norm * by for name, norm in found.items()}


def replay(
    config: Config, world: World, parts: Parts, found: Found | None, first: int, last: int, end: int
) -> tuple[list[Step], list[Metrics]]:
    """Takes the steps after a checkpoint, or from the start, up to `end` again. Collective.

    Args:
        config: of the run.
        world: this rank's place.
        parts: what the run is made of.
        found: the checkpoint; None to begin at the start.
        first: the first step that is looked at, counted from 1.
        last: the last one.
        end: the last one that is taken.

    Returns:
        The steps that were looked at, the same on all ranks; and the lines of metrics of all that were taken.
    """
    if found:
        resume.load_model(found, parts.model)
    task, lines, taken = Watched(parts.task), Recorder(), list[Step]()
    backend = backends.create(config, world, parts.findings)
    model, optimizer = backend.prepare(parts.model, optim.factory(config.optim, parts.model, parts.unfused(config)))
    average, progress = Average(config.optim, backend), None
    if found:
        progress, _ = resume.load_state(found, backend, world, config.train.seed, average)
    gradients = Gradients(backend, world)
    norms = _measured(backend)

    def look_at(number: int) -> None:
        task.looking = first <= number <= last
        task.begin()
        gradients.seen = {} if task.looking else None

    def after_step(meter: Meter) -> None:
        done = meter.result.steps
        if task.looking:
            norm = None if norms[-1] is None else float(norms[-1])
            taken.append(_step(done, task, norm, gradients.norms(norm)))
        if done == end:
            raise Reached
        look_at(done + 1)

    nothing = Evaluation(config.train, parts.task, {}, world, parts.precision, 0)
    control = Control(stops_on_nan=False)
    of = config, world, backend, model, optimizer, task, parts.feed, nothing, lines, control
    work = Work(*of, after_step=after_step, progress=progress, averaged=average)
    look_at((found.manifest.step if found else 0) + 1)
    with suppress(Reached):
        train(work)
    return taken, lines.steps


def _measured(backend: Backend) -> list[torch.Tensor | None]:
    """The norms of the steps, as they are taken; every one is measured."""
    norms: list[torch.Tensor | None] = []
    inner = backend.step

    def step(max_norm: float | None, measure: bool) -> torch.Tensor | None:
        norms[:] = [inner(max_norm, True)]
        return norms[-1]

    backend.step = step  # type: ignore[method-assign]
    return norms


def _step(number: int, task: Watched, norm: float | None, layers: Mapping[str, float]) -> Step:
    """A step over all ranks. Collective."""
    gathered = dist.gather_data((task.parts, task.unknown))
    parts = [part for of_rank, _ in gathered for part in of_rank]
    units = math.fsum(units for _, units, _ in parts)
    loss = math.fsum(total for total, _, _ in parts) / max(1.0, units) if _finite(parts) else math.nan
    unknown = next((why for _, why in gathered if why), "")
    samples = [sample for _, _, each in parts for sample in each]
    if unknown:
        samples = [(number, None) for number, _ in samples]
    samples.sort(key=lambda one: (-_size(one[1]), one[0]))
    return Step(number, units, loss, norm, dict(layers), samples, unknown)


def _finite(parts: list[tuple[float, float, list[tuple[int, float | None]]]]) -> bool:
    return all(math.isfinite(total) for total, _, _ in parts)


def _size(loss: float | None) -> float:
    return 0.0 if loss is None else math.inf if math.isnan(loss) else loss


def _by_sample(outputs: Any, size: int) -> bool:
    tensors = [leaf for leaf in leaves_of(outputs) if isinstance(leaf, torch.Tensor)]
    return bool(tensors) and all(leaf.dim() > 0 and len(leaf) == size for leaf in tensors)


def _row(tree: Any, i: int) -> Any:
    """The part of a tree of tensors that is of one sample."""
    return mapped(tree, lambda leaf: leaf[i : i + 1] if isinstance(leaf, torch.Tensor) and leaf.dim() else leaf)
