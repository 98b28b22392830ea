"""The loop, and evaluation. No rank test, no backend's name, no division but by the true number of samples."""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from dist_train.backends.base import Backend
from dist_train.backends.precision import Precision
from dist_train.config.tree import Config, TrainConfig
from dist_train.data.feed import Feed
from dist_train.data.order import Plan, evaluated_at_once, falls_on, pieces, share
from dist_train.loop.average import Average
from dist_train.loop.captured import Captured
from dist_train.loop.meter import Control, Meter, Progress, Result, Sink
from dist_train.loop.optim import set_lr
from dist_train.loop.schedule import lr_at
from dist_train.ranks import dist
from dist_train.ranks.dist import World
from dist_train.ranks.phases import Phases
from dist_train.tasks.losses import Loss, loss_fn

Watcher = Callable[[torch.Tensor, torch.Tensor], None]


def train(
    config: Config, world: World, backend: Backend, model: nn.Module, optimizer: torch.optim.Optimizer,
    feed: Feed, test_feed: Feed, tracker: Sink, after_step: Callable[[Meter], None], control: Control,
    progress: Progress | None = None, watch_last: Watcher | None = None, average: Average | None = None,
) -> Result:  # fmt: skip
    """Trains `model` to the end of the config. Collective.

    Args:
        config: the run.
        world: this rank's place.
        backend: has prepared `model` and `optimizer`.
        model: from inputs [batch, ...] to outputs [batch, classes].
        optimizer: its param_groups take the learning rate.
        feed: the training split.
        test_feed: the test split.
        tracker: takes the metrics.
        after_step: called after every step, with its metrics; saves checkpoints.
        control: what may end the run early, and where it says what it is doing.
        progress: of a checkpoint whose state was loaded; None at the start.
        watch_last: of the evaluation after the last step.
        average: of the weights; None makes the one that the config asks for.
    """
    cfg = config.train
    average = average or Average(config.optim, backend)
    plan = Plan.of(len(feed.split), cfg, world)
    total = total_steps(cfg, plan.steps_per_epoch)
    precision = Precision(cfg.precision, world.device)
    test_loss_of = loss_fn(cfg.loss)
    if progress is None:
        dist.seed_draws(cfg.seed, world)
    meter = Meter(tracker, total, plan, config.track.every_steps, world.device, control, progress)
    of = config, backend, model, optimizer, feed, plan, precision, meter
    average.begin(meter.result.steps)
    steps = Captured(*of) if config.compile.scope == "step" else Eager(*of)
    while (done := meter.result.steps) < total:
        epoch, first = divmod(done, plan.steps_per_epoch)
        steps.begin(epoch, first)
        for step in range(first, min(plan.steps_per_epoch, first + total - done)):
            count, lr = plan.batch_size(step), lr_at(config.optim, meter.result.steps, total)
            norm = steps.take(count, lr, meter.due(meter.result.steps + 1))
            average.after_step(meter.result.steps + 1)
            meter.step(count, lr, norm)
            if evaluation_due(cfg, meter.result.steps, total, plan.steps_per_epoch):
                watch = watch_last if meter.result.steps == total else None
                at_once = evaluated_at_once(cfg, world.size, backend.findings.sample_bytes)
                of = model, test_loss_of, test_feed, at_once, world, precision, control.phases, watch
                with meter.evaluating() as result, average.used():
                    result.update(evaluate(*of))
            after_step(meter)
    return meter.finish()


class Eager:
    """Takes the steps of a run one operation after another, under any backend."""

    def __init__(
        self, config: Config, backend: Backend, model: nn.Module, optimizer: torch.optim.Optimizer, feed: Feed,
        plan: Plan, precision: Precision, meter: Meter,
    ):  # fmt: skip
        self.backend, self.model, self.optimizer, self.feed, self.plan = backend, model, optimizer, feed, plan
        self.precision, self.dtype, self.meter, self.phase = precision, precision.dtype, meter, meter.phases
        self.loss_of = loss_fn(config.train.loss, config.train.label_smoothing)
        self.max_norm = config.train.grad_clip

    def begin(self, epoch: int, first: int) -> None:
        """Goes on from step `first` of an epoch."""
        self.batches = self.feed(self.plan.indices(epoch, first), epoch)

    def take(self, count: int, lr: float, measure: bool) -> torch.Tensor | None:
        """Takes the step that comes next, and gives its losses to the meter. Collective.

        Args:
            count: its samples over all ranks.
            lr: its learning rate.
            measure: the gradient norm is wanted.

        Returns:
            The norm, as Backend.step does.
        """
        backend, phase = self.backend, self.phase
        set_lr(self.optimizer, lr)
        micro_batches = pieces(count, self.plan.world_size, self.plan.micro_batch_size)
        for i in range(micro_batches):
            phase("data")
            inputs, targets = next(self.batches)
            phase("forward")
            with backend.accumulate(last=i + 1 == micro_batches):
                with self.precision.autocast():
                    outputs = self.model(inputs)
                if outputs.dtype is not self.dtype:
                    outputs = outputs.to(self.dtype)
                loss = self.loss_of(outputs, targets, count)
                phase("backward")
                backend.backward(loss)
            self.meter.add(loss, count)
        phase("optimizer")
        return backend.step(self.max_norm, measure)


def total_steps(cfg: TrainConfig, steps_per_epoch: int) -> int:
    """Optimizer steps of a run."""
    total = cfg.epochs * steps_per_epoch
    return total if cfg.max_steps is None else min(total, cfg.max_steps)


def evaluation_due(cfg: TrainConfig, done: int, total: int, steps_per_epoch: int) -> bool:
    """Whether the model is evaluated after this many steps of the run."""
    return done == total or falls_on(done, cfg.eval_every_steps, cfg.eval_every_epochs, steps_per_epoch)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loss_of: Loss,
    feed: Feed,
    batch_size: int,
    world: World,
    precision: Precision,
    phases: Phases | None = None,
    watch: Watcher | None = None,
) -> dict[str, float]:
    """Mean loss and accuracy over a split, each sample counted once at any world size. Collective.

    Args:
        model: from inputs [batch, ...] to outputs [batch, classes]. Each of its modules is left in the mode it was in.
        loss_of: the sum of the loss over a batch.
        feed: the split.
        batch_size: samples at once on a rank.
        world: this rank's place.
        precision: the formats of the forward pass.
        phases: is told that this goes on.
        watch: is given outputs and targets of each batch of this rank, in the order of the split.

    Returns:
        `eval/loss` and `eval/accuracy`, the same on every rank.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    n = len(feed.split)
    part = share(n, world.rank, world.size)
    mine = np.arange(part.start, part.stop)
    count = pieces(n, world.size, batch_size)  # the same on every rank: a sharded model's forward is collective
    wide = torch.float32 if feed.device.type == "mps" else torch.float64  # that device has nothing wider
    sums = torch.zeros(2, dtype=wide, device=feed.device)
    phases = phases or Phases()
    phases("evaluate")
    for inputs, targets in feed(mine[share(len(mine), i, count)] for i in range(count)):
        with precision.autocast():
            outputs = model(inputs).to(precision.dtype)
        labels = targets if targets.dim() == 1 else targets.argmax(1)
        phases.progressed()
        if watch:
            watch(outputs, targets)
        sums += torch.stack([loss_of(outputs, targets, 1), (outputs.argmax(1) == labels).sum()]).to(wide)
    for module, training in modes:
        module.training = training
    loss, correct = (dist.sum_(sums) / n).tolist()
    return {"eval/loss": loss, "eval/accuracy": correct}
