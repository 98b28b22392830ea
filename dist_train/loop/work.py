"""What the loop works with: one object, which is handed on whole."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from dist_train.backends.base import Backend
from dist_train.backends.precision import Precision
from dist_train.config.tree import Config, TrainConfig
from dist_train.data.feed import Feed
from dist_train.data.order import Plan
from dist_train.loop.average import Average
from dist_train.loop.evaluate import Evaluation
from dist_train.loop.meter import Control, Meter, Progress, Sink, Speed
from dist_train.loop.verdicts import Alarm
from dist_train.models.draws import Draws
from dist_train.ranks.dist import World
from dist_train.tasks.base import Task


@dataclass(frozen=True)
class Work:
    """What is trained, by what, and who is told.

    Args:
        config: the run.
        world: this rank's place.
        backend: has prepared `model` and `optimizer`.
        model: what the task calls.
        optimizer: its param_groups take the learning rate.
        task: gives the loss.
        feed: the training split.
        evaluation: of the test splits.
        tracker: takes the metrics.
        control: what may end the run early, and where it says what it is doing.
        after_step: called after every step, with its metrics; saves checkpoints.
        progress: of a checkpoint whose state was loaded; None at the start.
        averaged: the average of the weights, where it was made before; see `average`.
        alarm: is told of audits; None where steps are not audited, whatever the config says.
        peak_s: see Speed.
    """

    config: Config
    world: World
    backend: Backend
    model: nn.Module
    optimizer: torch.optim.Optimizer
    task: Task
    feed: Feed
    evaluation: Evaluation
    tracker: Sink
    control: Control
    after_step: Callable[[Meter], None]
    progress: Progress | None = None
    averaged: Average | None = None
    alarm: Alarm | None = None
    peak_s: float | None = None

    @cached_property
    def average(self) -> Average:
        """Of the weights, as the config asks for it."""
        return self.averaged or Average(self.config.optim, self.backend)

    @cached_property
    def precision(self) -> Precision:
        """The formats of the run."""
        return Precision(self.config.train.precision, self.world.device)

    @cached_property
    def plan(self) -> Plan:
        """The steps of the run, and this rank's part of each."""
        return Plan.of(len(self.feed.split), self.config, self.world)

    @cached_property
    def draws(self) -> Draws:
        """What the model draws."""
        cfg, world = self.config.train, self.world
        return Draws(cfg.seed, world.data_rank, self.model, cfg.draws, world.device, world.part)

    @cached_property
    def meter(self) -> Meter:
        """Counts the steps, from the first that is asked of it."""
        cfg, control = self.config.track, self.control
        return Meter(
            self.tracker,
            self.total_steps,
            self.plan,
            cfg.every_steps,
            self.world.device,
            control,
            self.progress,
            Speed(self.task.unit, self.peak_s),
        )

    def evaluate(self, last: bool = False) -> None:
        """Evaluates the model as it is now, or its averaged weights, and tells of it. Collective.

        Args:
            last: the examiners watch.
        """
        with self.meter.evaluating() as metrics, self.average.used():
            metrics.update(self.evaluation.run(self.model, self.meter.phases, last))

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        return total_steps(self.config.train, self.plan.steps_per_epoch)


def total_steps(cfg: TrainConfig, steps_per_epoch: int) -> int:
    """Optimizer steps of a run."""
    total = cfg.epochs * steps_per_epoch
    return total if cfg.max_steps is None else min(total, cfg.max_steps)
