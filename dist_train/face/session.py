"""dist_train.session: a user's own loop, with the order, mean, backends, checkpoints and trackers of a run."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, SupportsFloat

import torch
from torch import nn

from dist_train.backends import chosen
from dist_train.backends.several import Several
from dist_train.checkpoint.save import Stopped
from dist_train.config.load import made
from dist_train.config.tree import Config, OptimConfig
from dist_train.data.batch import Batch
from dist_train.errors import ConfigError
from dist_train.face.given import configured
from dist_train.loop.optim import set_lr
from dist_train.loop.schedule import lr_at
from dist_train.loop.train import evaluation_due
from dist_train.loop.units import Units, counted
from dist_train.models.running import running
from dist_train.ranks import dist, orphan
from dist_train.ranks.launcher import Launcher, detect
from dist_train.run import out_of_memory, start
from dist_train.run.check import check
from dist_train.run.outcome import Outcome
from dist_train.run.running import Run
from dist_train.run.session import Ended, Training, opened

if TYPE_CHECKING:
    from dist_train.face.given import ConfigLike, DataLike, HookLike, ModelLike, TaskLike

LEFT = "the loop was left"


@contextmanager
def session(
    config: "ConfigLike" = None,
    *,
    data: "DataLike" = None,
    model: "ModelLike" = None,
    task: "TaskLike" = None,
    hooks: "Sequence[HookLike]" = (),
    optimizers: Mapping[str, Mapping[str, Any]] | None = None,
    **sections: Mapping[str, Any],
) -> Iterator["Session"]:
    """A run whose steps the caller takes: see Session. At the end of the context the run is finished as by `fit`, and
    `session.outcome` says what it has come to. Where it is asked to end by a signal, it is saved, and the program goes
    on after the context.

    Args:
        config: see `fit`.
        data: see `fit`.
        model: see `fit`.
        task: see `fit`: gives units and evaluation; "none" goes without, units are samples then, and evaluation is the
            loop's own.
        hooks: see `fit`.
        optimizers: of a model of several parts with an optimizer each: by the name of a child of the model what differs
            from the section `optim`, such as `{"generator": {}, "discriminator": {"lr": 4e-4}}`.
        **sections: see `fit`.

    Raises:
        ConfigError: a mistake in what was given, with a line for each.
    """
    with configured(config, data, model, task, hooks, sections) as settled:
        launcher = detect()
        optims = _optims(settled, launcher, optimizers or {})
        check(settled, launcher)
        orphan.started_by(launcher.name)
        with start.joined(settled, launcher, own_loop=True) as (world, parts, facts, every):
            parts = dataclasses.replace(parts, optims=optims)
            with opened(settled, world, parts, facts, quits=False) as run:
                loop = Session(**vars(run))
                training = loop._training = Training(loop, every, own_loop=True)
                try:
                    training.begin()
                    with out_of_memory.explained(loop):
                        yield loop
                    loop._leave()
                    loop.outcome = training.finish(training.work.meter.finish())
                except Ended:
                    loop.outcome = training.finish(training.work.meter.finish())
                except Stopped as stopped:
                    loop.outcome = training.stop(stopped)


class Step:
    """An optimizer step: this rank's micro-batches of it, each with its forward and backward. To be gone through once,
    or once for each part of the model that has an optimizer of its own.

        for batch in step:
            outputs = run.model(batch["x"])
            step.backward(loss_of(outputs, batch["y"], reduction="sum"))
        step.update()

    Attributes:
        count: samples over all ranks.
        units: what the loss is a mean over, over all ranks.
        lr: the learning rate of `optim`.
    """

    def __init__(self, loop: "Session", count: int, batches: list[Batch], units: Units, lr: float):
        self.count, self.units, self.lr = count, units, lr
        self._loop, self._batches = loop, batches
        self._batch: Batch | None = None
        self._norms: list[torch.Tensor] = []
        self._begun = False
        self._at, self._passes = loop.work.meter.result.steps, 0
        self._updated: set[str] = set()

    def __iter__(self) -> Iterator[Batch]:
        phase, backend = self._loop.control.phases, self._loop.backend
        for i, batch in enumerate(self._batches, 1):
            drawn = self._loop.work.draws.of(batch.ids, self._at, self._passes)
            with backend.accumulate(last=i == len(self._batches)), running(batch), drawn:
                phase("forward")
                self._batch = batch
                yield batch
            self._batch = None
        self._passes += 1
        phase("data")

    def backward(self, loss_sum: torch.Tensor, part: str | None = None) -> None:
        """Adds the gradient of a micro-batch's loss to that of the step. Collective.

        Args:
            loss_sum: the loss summed over the units of the batch, and not their mean: it is divided by the units of the
                whole step.
            part: of a model with several optimizers, the one that the gradient is for.
        """
        loop = self._loop
        if self._batch is None:
            raise ConfigError("session: got backward outside of a batch, expected it in `for batch in step`")
        if loss_sum.dim():
            raise ConfigError(f"session: got a loss {list(loss_sum.shape)}, expected a scalar: the sum over the batch")
        loop.control.phases("backward")
        self._begun = True
        if not self._batch.size:  # a stand-in, as this rank has no sample
            loss_sum = loss_sum * 0.0
        loss = loss_sum / self.units
        name = loop._part(part)
        if loop.several is None:
            loop.backend.backward(loss)
        else:
            loop.several.backward_of(name, loss)
        if part is None or part == next(iter(loop.models)):
            loop.work.meter.add(loss_sum)  # `train/loss` is that of the first part
        loop.control.phases("forward")

    def update(self, part: str | None = None) -> None:
        """Clips, steps and clears the gradients: of all ranks as one. Collective.

        Args:
            part: of a model with several optimizers, the one that is updated. Each of them is, in every step, maybe
                more than once.
        """
        loop, config = self._loop, self._loop.config
        loop.control.phases("optimizer")
        measure = loop.work.meter.due(loop.step + 1)
        name = loop._part(part)
        if loop.several is None:
            norm = loop.backend.step(config.train.grad_clip, measure)
        else:
            norm = loop.several.step_of(name, config.train.grad_clip, measure)
        self._updated.add(name)
        self._norms += [] if norm is None else [norm]
        loop.control.phases("data")

    def _norm(self) -> torch.Tensor | None:
        """Of all gradients of the step."""
        if len(self._norms) < 2:
            return self._norms[0] if self._norms else None
        return torch.stack(self._norms).double().square().sum().sqrt()


class Session(Run):
    """A run whose steps the caller takes.

    Attributes:
        outcome: what the run has come to; None until the end of the context.
    """

    outcome: Outcome | None = None
    _training: Training
    _open: Step | None = None
    _due = False

    @cached_property
    def several(self) -> Several | None:
        """The backends of the parts; None where the model has one optimizer."""
        return self.backend if isinstance(self.backend, Several) else None

    @cached_property
    def models(self) -> Mapping[str, nn.Module]:
        """What to call, by the name of the part; empty where the model has one optimizer."""
        called = self.work.precision.called
        return {name: called(part) for name, part in self.several.models.items()} if self.several else {}

    @cached_property
    def optimizers(self) -> Mapping[str, torch.optim.Optimizer]:
        """By the name of the part; empty where the model has one optimizer."""
        return self.several.optimizers if self.several else {}

    @cached_property
    def _schedules(self) -> list[tuple[torch.optim.Optimizer, OptimConfig]]:
        if not self.several:
            return [(self.work.optimizer, self.config.optim)]
        return [(self.optimizers[name], cfg) for name, cfg in self.parts.optims.items()]

    def steps(self) -> Iterator[Step]:
        """The steps that are left of the run, from where its checkpoint stands. When the loop comes round, what is due
        after a step is done: evaluation, hooks, lines of metrics, checkpoints, and what a signal asks for."""
        work = self.work
        plan, total, meter = work.plan, work.total_steps, work.meter
        if work.progress is None:
            dist.seed_draws(self.config.train.seed, self.world)
        work.average.begin(meter.result.steps)
        while meter.result.steps < total:
            epoch, first = divmod(meter.result.steps, plan.steps_per_epoch)
            batches = work.feed(plan.indices(epoch, first), epoch)
            steps = counted(self.task, batches, plan.sizes(first), work.feed.device)
            for at in range(first, min(plan.steps_per_epoch, first + total - meter.result.steps)):
                meter.phases("data")
                for optimizer, cfg in self._schedules:
                    set_lr(optimizer, lr_at(cfg, meter.result.steps, total))
                _, micro_batches, units = next(steps)
                lr = lr_at(self.config.optim, meter.result.steps, total)
                self._open = Step(self, plan.batch_size(at), list(micro_batches), units, lr)
                yield self._open
                self._check_taken()
                self._close()

    @property
    def step(self) -> int:
        """Optimizer steps done, the one that was just updated among them."""
        return super().step + (self._open is not None and not self._missing)

    def log(self, metrics: Mapping[str, SupportsFloat]) -> None:
        """See Run; after an update, under its step."""
        self._count()
        super().log(metrics)

    def evaluate(self) -> dict[str, float]:
        """The metrics of the task on all test splits, as the model is now: those of the step, if it was evaluated.
        Collective."""
        self._count()
        meter, evaluation = self.work.meter, self.work.evaluation
        if not evaluation.splits:
            raise ConfigError(
                "session: got evaluate(), but there is no task, or no test split, to evaluate by; expected both"
            )
        if meter.evaluated_step != meter.result.steps:
            self.work.evaluate()
        return dict(meter.result.evaluation)

    def evaluated(self, metrics: Mapping[str, float]) -> None:
        """Takes the metrics of an evaluation of the loop's own, such as `eval/score`, alike on all ranks: hooks, early
        stopping and the best checkpoint go by them. After the update of a step. Collective."""
        self._count()
        with self.work.meter.evaluating() as found:
            found.update({name: float(value) for name, value in metrics.items()})

    def gather(self, mine: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, int]:
        """The rows of all ranks, for a loss that compares samples with those of the whole batch, and where this rank's
        begin; gradients flow back. Collective."""
        return dist.gather_samples(mine, len(batch))

    def stop(self, why: str) -> None:
        """Ends the run as finished after this step. By all ranks, or by none.

        Args:
            why: for the console and summary.json.
        """
        super().stop(why)

    def _part(self, name: str | None) -> str:
        """The name of a part; empty where the model has one optimizer. Raises ConfigError."""
        if not self.models and name is not None:
            raise ConfigError(
                f"session: got the part {name!r}, but the model has one optimizer; leave it out, or write "
                f"session(..., optimizers={{{name!r}: {{}}, ...}})"
            )
        if not self.models:
            return ""
        if name is None or name not in self.models:
            raise ConfigError(f"session: got the part {name!r}, expected one of {', '.join(self.models)}")
        return name

    @property
    def _missing(self) -> list[str]:
        """The updates that the open step lacks."""
        assert self._open is not None
        return sorted((set(self.models) or {""}) - self._open._updated)

    def _count(self) -> None:
        """The open step counts, if it is taken."""
        if self._open is not None and not self._missing:
            step, self._open, self._due = self._open, None, True
            self.work.average.after_step(self.work.meter.result.steps + 1)
            self.work.meter.step(step.count, step.units, step.lr, step._norm())

    def _check_taken(self) -> None:
        """Raises ConfigError where the open step is not taken whole."""
        if self._open is not None and self._missing:
            calls = ", ".join(f"update({name!r})" if name else "update()" for name in self._missing)
            raise ConfigError(f"session: got a step without {calls}, expected it after the batches of every step")

    def _close(self) -> None:
        """Does what is due after a step. Raises Stopped and Ended."""
        self._count()
        if not self._due:
            return
        self._due = False
        work, meter = self.work, self.work.meter
        done, total = meter.result.steps, work.total_steps
        wanted = work.evaluation.splits and meter.evaluated_step != done
        if wanted and evaluation_due(self.config.train, done, total, meter.steps_per_epoch):
            work.evaluate(last=done == total)
        work.after_step(meter)

    def _leave(self) -> None:
        """The loop has ended, or was left. Raises Stopped and Ended."""
        if self._open is not None and self._open._begun:  # else it was left as it came
            self._check_taken()
        if self.step < self.total_steps:
            super().stop(LEFT)
        self._close()
        if self.step < self.total_steps:
            self._training.end_early()


def _optims(config: Config, launcher: Launcher, optimizers: Mapping[str, Mapping[str, Any]]) -> dict[str, OptimConfig]:
    """The optimizer of each part. Raises ConfigError."""
    if config.compile.scope == "step":
        raise ConfigError("compile.scope: got step, expected model: a loop of your own takes its steps itself")
    if not optimizers:
        return {}
    name = chosen(config.backend.name, launcher.name)
    if name == "deepspeed":
        raise ConfigError(
            f"backend.name: got deepspeed with optimizers of {', '.join(optimizers)}, but its engine has one; "
            f"write backend={{'name': 'ddp'}} or {{'name': 'fsdp2'}}"
        )
    if config.train.precision == "float16":
        raise ConfigError(
            "train.precision: got float16 with several optimizers, whose losses would need a scale each; "
            "write train={'precision': 'bfloat16'}"
        )
    found = {}
    for part, differs in optimizers.items():
        one = made(config, {"optim": differs})
        check(one, launcher, writes=False)
        found[part] = one.optim
    return found
