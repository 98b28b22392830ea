"""A run in the processes that have joined: the one object that its parts, hooks and own loops are handed."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, SupportsFloat

import torch
from torch import nn

from dist_train.backends.base import Backend
from dist_train.checkpoint.manifest import Damaged
from dist_train.checkpoint.resume import Found
from dist_train.checkpoint.save import Facts
from dist_train.config.tree import Config
from dist_train.data.sets import Data
from dist_train.loop.meter import Control
from dist_train.loop.work import Work
from dist_train.ranks.dist import World
from dist_train.run.assemble import Parts
from dist_train.tasks.base import Task
from dist_train.tasks.panels import Panel, encoded, write
from dist_train.track.base import Course
from dist_train.track.trackers import Trackers

# What a line of metrics holds in any case.
OF_A_LINE = ("step", "epoch", "time_s", "event", "at")


@dataclass
class Run:
    """A run.

    Args:
        config: the whole of it.
        world: this rank's place: rank, size, data_rank and data_size (those that share out samples), device, is_main.
        parts: what it is made of.
        facts: what its checkpoints must fit.
        folder: of the run.
        control: what may end it early, and where it says what it is doing.
        found: the checkpoint that it resumes from.
        damaged: checkpoints that were passed over.
        course: what it has to go.
        trackers: who is told.
        stopped: why it ends before its last step; None where it does not.
        prepared: what the loop works with, once the backend has prepared it.
        shown: panels of the report, by title.
    """

    config: Config
    world: World
    parts: Parts
    facts: Facts
    folder: Path
    control: Control
    found: Found | None
    damaged: list[Damaged]
    course: Course
    trackers: Trackers
    stopped: str | None = None
    prepared: Work | None = field(default=None, repr=False)
    shown: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False)

    @property
    def work(self) -> Work:
        """What the loop works with, once the backend has prepared it."""
        assert self.prepared is not None, "not prepared yet"
        return self.prepared

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.work.meter.result.steps

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run, if nothing ends it early."""
        return self.course.steps

    @property
    def epoch(self) -> float:
        """Passes over the data done, with the part of the current one."""
        return self.work.meter.epoch

    @property
    def data(self) -> Data:
        """The data set."""
        return self.parts.data

    @property
    def task(self) -> Task:
        """What the model is trained for."""
        return self.parts.task

    @property
    def backend(self) -> Backend:
        """What moves gradients and shards state."""
        return self.work.backend

    @property
    def model(self) -> nn.Module:
        """The model as it is to be called: in the precision of the run, wrapped or sharded by the backend."""
        return self.work.precision.called(self.work.model)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer, built by the backend. The loop sets its learning rate before each step."""
        return self.work.optimizer

    @property
    def metrics(self) -> dict[str, float]:
        """The newest value of every metric: `eval/...`, the same on all ranks, and of the last line of metrics
        `train/...`."""
        return self.trackers.newest | self.work.meter.result.evaluation

    def log(self, metrics: Mapping[str, SupportsFloat]) -> None:
        """Gives numbers to all trackers, under the current step. On any ranks: what rank 0 logs counts.

        Args:
            metrics: numbers by names such as `train/accuracy`. A tensor on a device is waited for.

        Raises:
            ValueError: a name that each line of metrics has for itself.
        """
        taken = sorted(set(metrics) & set(OF_A_LINE))
        if taken:
            raise ValueError(f"log: got {taken[0]!r}, which each line of metrics has anyway; call it train/{taken[0]}")
        self.work.meter.event({name: float(value) for name, value in metrics.items()})

    def show(self, *panels: Panel) -> None:
        """Adds panels to the run's report, which may be made while the run goes on. One whose title was shown before
        takes its place. On any ranks: what rank 0 shows counts.

        Args:
            panels: dist_train.Table(...) or dist_train.Plot(...).

        Raises:
            ValueError: one of them is none.
        """
        self.shown |= encoded(panels)
        if self.world.is_main:
            write(self.folder, self.shown)

    def say(self, text: str) -> None:
        """Writes lines for people, by rank 0."""
        self.trackers.say(text)

    def stop(self, why: str) -> None:
        """Ends the run as finished after this step, with its last evaluation, checkpoint and weights.

        A hook may call it on any rank in `start` and `after_evaluation`, and in `after_step` if it has `stops = True`.

        Args:
            why: for the console and summary.json.
        """
        self.stopped = self.stopped or why
