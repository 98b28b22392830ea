"""The loop. No rank test, no backend's name, no division but by the true number of units of the whole step."""

import torch

from dist_train.config.tree import TrainConfig
from dist_train.data.order import falls_on
from dist_train.loop.audit import Audit
from dist_train.loop.captured import Captured
from dist_train.loop.meter import Meter, Result
from dist_train.loop.optim import set_lr
from dist_train.loop.schedule import lr_at
from dist_train.loop.units import Units, counted, loss_sum
from dist_train.loop.work import Work
from dist_train.models.running import running
from dist_train.ranks import dist


def train(work: Work) -> Result:
    """Trains to the end of the config. Collective."""
    config, plan, total = work.config, work.plan, work.total_steps
    if work.progress is None:
        dist.seed_draws(config.train.seed, work.world)
    meter = work.meter
    work.average.begin(meter.result.steps)
    steps = Captured(work, meter) if config.compile.scope == "step" else Eager(work, meter)
    while (done := meter.result.steps) < total:
        epoch, first = divmod(done, plan.steps_per_epoch)
        steps.begin(epoch, first)
        for step in range(first, min(plan.steps_per_epoch, first + total - done)):
            count, lr = plan.batch_size(step), lr_at(config.optim, meter.result.steps, total)
            units, norm = steps.take(count, lr, meter.due(meter.result.steps + 1))
            work.average.after_step(meter.result.steps + 1)
            meter.step(count, units, lr, norm)
            if work.evaluation.splits and evaluation_due(config.train, meter.result.steps, total, plan.steps_per_epoch):
                work.evaluate(last=meter.result.steps == total)
            work.after_step(meter)
    return meter.finish()


class Eager:
    """Takes the steps of a run one operation after another, under any backend."""

    def __init__(self, work: Work, meter: Meter):
        self.backend, self.optimizer, self.task = work.backend, work.optimizer, work.task
        self.model, self.feed, self.plan = work.precision.called(work.model), work.feed, work.plan
        self.draws, self.audit, self.meter, self.phase = work.draws, Audit(work), meter, meter.phases
        self.max_norm = work.config.train.grad_clip

    def begin(self, epoch: int, first: int) -> None:
        """Goes on from step `first` of an epoch."""
        batches = self.feed.steps(self.plan, epoch, first)
        self.steps = counted(self.task, batches, self.plan.sizes(first), self.feed.device)

    def take(self, count: int, lr: float, measure: bool) -> tuple[Units, torch.Tensor | None]:
        """Takes the step that comes next, and gives its losses to the meter. Collective.

        Args:
            count: its samples over all ranks.
            lr: its learning rate.
            measure: the gradient norm is wanted.

        Returns:
            The step's units over all ranks, and the norm, as Backend.step gives it.
        """
        backend, phase = self.backend, self.phase
        set_lr(self.optimizer, lr)
        phase("data")
        micro_batches, batches, units = next(self.steps)
        for i, batch in enumerate(self.audit.watched(batches, units), 1):
            phase("forward")
            drawn = self.draws.of(batch.ids, self.meter.result.steps)
            with backend.accumulate(last=i == micro_batches), running(batch), drawn:
                loss = loss_sum(self.task, self.model, batch)
                phase("backward")
                backend.backward(loss / units)
            self.meter.add(loss)
            if i < micro_batches:
                phase("data")
        phase("optimizer")
        return units, backend.step(self.max_norm, measure)


def evaluation_due(cfg: TrainConfig, done: int, total: int, steps_per_epoch: int) -> bool:
    """Whether the model is evaluated after this many steps of the run."""
    return done == total or falls_on(done, cfg.eval_every_steps, cfg.eval_every_epochs, steps_per_epoch)
