"""Times and losses of a run. Between log points it only keeps references: nothing here waits for the device."""

import itertools
import math
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from dist_train.data.order import Plan
from dist_train.errors import ConfigError, OtherRankError
from dist_train.loop.compiled import Compiled
from dist_train.loop.units import Units
from dist_train.ranks import dist
from dist_train.ranks.phases import NAMES, Phases
from dist_train.ranks.stop import Requests

AGREE_EVERY_S = 1.0
LISTED_RANKS = 1024  # above, a line of metrics does not list every rank
Metrics = dict[str, float | int | str | list[float]]  # text where something happened, a list by rank
Progress = Mapping[str, float]  # what Meter.progress gives


class Sink(Protocol):
    """Who is told of metrics."""

    def log(self, metrics: Metrics, line: str | None) -> None:
        """Metrics of a moment, and a line for people about them, if there is something to say."""


class Recorder:
    """Keeps the lines of metrics of the steps instead of writing them."""

    def __init__(self) -> None:
        self.steps: list[Metrics] = []

    def log(self, metrics: Metrics, line: str | None) -> None:
        """See Sink."""
        if "train/loss" in metrics:
            self.steps.append(metrics)


@dataclass(frozen=True)
class Speed:
    """What the speed of a run is said in.

    Args:
        unit: that the loss is a mean over; see Task.unit.
        peak_s: seconds that a sample takes on all devices of the run at their peak; None where that is not known.
    """

    unit: str = "samples"
    peak_s: float | None = None


SAMPLES = Speed()


@dataclass
class Result:
    """What a run has done so far.

    Args:
        steps: optimizer steps.
        epochs: passes over the data, with the part of the last one.
        samples: samples seen, over all ranks.
        units: of the task, likewise.
        train_s: seconds of training, evaluation left out.
        step_ms: durations of steps in milliseconds; on an accelerator, means between log points.
        first_step_s: seconds of the first step, its compilation included; on an accelerator, until it was launched.
        prepare_s: seconds of compiling and capturing whole steps (compile.scope: step), which are in none of the above.
        graphs: what torch.compile made, on the rank that made most.
        recompilations: of these, those of steps after the first epoch and of evaluations after the first one, which
            have shown every shape of the run.
        cached_graphs: of these, those that an earlier run had left in torch's cache.
        evaluation: the newest metrics of an evaluation, `eval/...`.
        profile: what track.profile found, `profile/...`; on rank 0.
    """

    steps: int = 0
    epochs: float = 0.0
    samples: int = 0
    units: float = 0.0
    train_s: float = 0.0
    step_ms: list[float] = field(default_factory=list)
    first_step_s: float = 0.0
    prepare_s: float = 0.0
    graphs: int = 0
    recompilations: int = 0
    cached_graphs: int = 0
    evaluation: dict[str, float] = field(default_factory=dict)
    profile: Metrics = field(default_factory=dict)

    def rates(self, unit: str) -> dict[str, float]:
        """Units and samples a second of training, by their names."""
        return {unit: self.units / self.train_s} | {"samples": self.samples / self.train_s}


@dataclass
class Control:
    """What a run is watched and ended by.

    Args:
        requests: of this rank to all.
        phases: where the main thread is.
        stops_on_nan: a loss or norm that is not finite ends the run; else its step is left out.
        norm_overflows: a norm may be infinite nevertheless, as the loss is scaled by trial.
    """

    requests: Requests = field(default_factory=Requests)
    phases: Phases = field(default_factory=Phases)
    stops_on_nan: bool = True
    norm_overflows: bool = False


class NonFiniteError(FloatingPointError):
    """A loss or a gradient that is not finite."""


class Meter:
    """Counts a run's steps and tells the tracker of them every `every_steps`, and at the end.

    Args:
        tracker: takes the metrics.
        total_steps: of the run.
        plan: which samples make up a step.
        every_steps: between log points.
        device: what the steps run on.
        control: what may end the run early.
        progress: of the run so far, where it goes on from a checkpoint.
        speed: what its speed is said in.
    """

    def __init__(
        self, tracker: Sink, total_steps: int, plan: Plan, every_steps: int, device: torch.device,
        control: Control, progress: Progress | None = None, speed: Speed = SAMPLES,
    ):  # fmt: skip
        self.tracker, self.total_steps, self.plan = tracker, total_steps, plan
        self.every_steps, self.speed = every_steps, speed
        self.steps_per_epoch = plan.steps_per_epoch
        self.requests, self.phases, self.stops_on_nan = control.requests, control.phases, control.stops_on_nan
        self.norm_stops = control.stops_on_nan and not control.norm_overflows
        self.result = Result()
        self.on_cpu = device.type == "cpu"
        self.losses: list[torch.Tensor] = []
        self.of_step: list[int] = []  # of each of the losses
        self.taken: dict[int, tuple[int, Units]] = {}  # samples and units by step, over all ranks, since they were read
        self.logged_steps = self.interval_samples = 0
        self.interval_loss = self.interval_units = 0.0  # of what was read in this interval, over all ranks
        self.compiled = Compiled()
        self.begin = self.train_begin = self.step_begin = self.interval_begin = time.perf_counter()
        self.first_step = self.skipped_steps = 0
        self.evaluated_step: int | None = None
        if progress is not None:
            self._resume(progress)
        if self.phases.journal is not None:
            self.phases.journal.step = self.first_step + 1
        self.agreed_at, self.agreed_step, self.agree_step = self.begin, self.first_step, self.first_step + 1

    @property
    def epoch(self) -> float:
        """Passes over the data so far, with the part of the current one."""
        return self.result.steps / self.steps_per_epoch

    def due(self, step: int) -> bool:
        """Whether metrics are read after this many steps."""
        return step % self.every_steps == 0 or step == self.total_steps

    def add(self, loss: torch.Tensor) -> None:
        """A micro-batch: its loss, summed over its units."""
        self.losses.append(loss.detach())
        self.of_step.append(self.result.steps)

    def step(self, count: int, units: Units, lr: float, norm: torch.Tensor | None) -> None:
        """The end of an optimizer step with so many samples and units over all ranks. Collective where it is due."""
        self.taken[self.result.steps] = count, units
        self.result.steps += 1
        self.result.samples += count
        self.interval_samples += count
        if self.result.steps == self.first_step + 1:
            self.result.first_step_s = time.perf_counter() - self.step_begin
        if self.result.steps == self.first_step + self.steps_per_epoch:
            self.compiled.first_epoch_over()
        self.phases("reduce")
        due = self.due(self.result.steps)
        # Between log points a norm on a device is not looked at.
        if self.norm_stops and norm is not None and (due or norm.device.type == "cpu") and not norm.isfinite():
            self._bad_norm(norm)
        if due:
            self._log(lr, norm)
        # The host runs ahead of a device: only where it has waited for it does its clock say what a step takes.
        if self.result.steps >= self.agree_step or (due and not self.on_cpu):
            self._agree()
        self.phases.progressed(self.result.steps)
        if self.on_cpu:
            now = time.perf_counter()
            self.result.step_ms.append((now - self.step_begin) * 1e3)
            self.step_begin = now

    def _agree(self) -> None:
        """Settles the requests, about once a second: how many steps that is, all ranks say together. Collective, among
        the hosts alone."""
        now = time.perf_counter()
        step_s = (now - self.agreed_at) / (self.result.steps - self.agreed_step)
        rows = dist.gather_numbers([step_s, *self.requests.asked()])
        self.requests.settle([row[1:] for row in rows])
        self.agreed_at, self.agreed_step = now, self.result.steps
        mean_s = sum(row[0] for row in rows) / len(rows)
        self.agree_step = self.result.steps + max(1, int(AGREE_EVERY_S / mean_s))

    def _sum_losses(self) -> list[dict[str, float]]:
        """Adds the losses since the last call to those of the interval, over all ranks. Collective.

        Returns:
            Seconds of every rank in each phase since the last call.
        """
        first, last = (self.of_step[0], self.of_step[-1]) if self.of_step else (0, -1)
        sums = [0.0] * (last - first + 1)
        losses = torch.stack(self.losses).tolist() if self.losses else []  # waits for the device
        for loss, step in zip(losses, self.of_step, strict=True):
            sums[step - first] += loss
        journal = self.phases.journal
        rows = dist.gather_numbers([*sums, *self.phases.take().values(), journal.sum() if journal else 0])
        if len({row.pop() for row in rows}) > 1:
            assert journal is not None
            line = journal.difference(dict(enumerate(dist.gather(journal.told()))))
            raise ConfigError(line or f"step {self.result.steps}: the layers of the ranks differ; {journal.mend}")
        if journal:
            journal.recent.clear()
        peers = len(rows) // self.plan.world_size
        by_step = [row[: len(sums)] for row in rows[::peers]]
        total = sum(map(sum, by_step))
        if not math.isfinite(total):
            total = self._not_finite(np.array(by_step), first, losses, peers)
        self.interval_loss += total
        units = _total([units for _, units in self.taken.values()])
        self.interval_units += units
        self.result.units += units
        self.losses, self.of_step, self.taken = [], [], {}
        return [dict(zip(NAMES, row[len(sums) :], strict=True)) for row in rows]

    def _bad_norm(self, norm: torch.Tensor) -> None:
        """The gradient norm, the same on all ranks, is not finite: ends the run by the loss, if that shows why."""
        self._sum_losses()
        if not self.plan.rank == 0:
            raise OtherRankError(f"the gradient norm of step {self.result.steps} is {float(norm)}")
        raise NonFiniteError(
            f"the gradient norm of step {self.result.steps} is {float(norm)}, though its loss is finite. The newest "
            f"checkpoint is from before it. A lower optim.lr or a train.grad_clip may help; --train.nonfinite skip "
            f"leaves such steps out"
        )

    def _not_finite(self, by_step: np.ndarray, first: int, losses: list[float], peers: int) -> float:
        """Some steps' losses are not finite: ends the run, or leaves them out of the mean as they were of training.

        Args:
            by_step: [data ranks, steps] sums of losses.
            first: of these steps, from 0.
            losses: of this rank's micro-batches.
            peers: ranks of each data rank, which have the same losses.

        Returns:
            The sum of the other steps' losses.
        """
        finite = np.isfinite(by_step).all(0)
        steps = [first + int(i) for i in np.flatnonzero(~finite)]
        if not self.stops_on_nan:
            self.skipped_steps += len(steps)
            for step in steps:
                self.interval_samples -= self.taken.pop(step)[0]
            return float(by_step[:, finite].sum())
        ranks = np.flatnonzero(~np.isfinite(by_step[:, steps[0] - first])).tolist()
        if self.plan.rank not in ranks:
            raise OtherRankError(f"the loss of step {steps[0] + 1} is not finite on rank {ranks[0] * peers}")
        its = [loss for loss, step in zip(losses, self.of_step, strict=True) if step == steps[0]]
        micro = next(i for i, loss in enumerate(its) if not math.isfinite(loss))
        epoch, within = divmod(steps[0], self.plan.steps_per_epoch)
        samples = next(itertools.islice(self.plan.indices(epoch, within), micro, None)).tolist()
        rank = self.plan.rank * peers
        raise NonFiniteError(
            f"the loss of step {steps[0] + 1} is not finite on rank {rank}, in micro-batch {micro} with the samples "
            f"{samples}. The newest checkpoint is from before it. A lower optim.lr or a train.grad_clip may "
            f"help; --train.nonfinite skip leaves such steps out"
        )

    def _log(self, lr: float, norm: torch.Tensor | None) -> None:
        by_rank = self._sum_losses()
        loss = self.interval_loss / self.interval_units if self.interval_units else float("nan")
        seconds = time.perf_counter() - self.interval_begin
        steps = self.result.steps - self.logged_steps
        if not self.on_cpu:
            self.result.step_ms.append(seconds / steps * 1e3)
        unit, peak_s, rate = self.speed.unit, self.speed.peak_s, self.interval_samples / seconds
        rates = {unit: self.interval_units / seconds} | {"samples": rate}
        mfu = None if peak_s is None else rate * peak_s
        self.tracker.log(
            self._now()
            | {
                "train/loss": loss,
                "train/grad_norm": float(norm) if norm is not None else float("nan"),
                "train/lr": lr,
                **{f"train/{name}_per_s": rate for name, rate in rates.items()},
            }
            | ({} if mfu is None else {"train/mfu": mfu})
            | ({"train/skipped_steps": self.skipped_steps} if self.skipped_steps else {})
            | _by_rank(by_rank, steps),
            f"step {self.result.steps}/{self.total_steps}  epoch {self.epoch:.2f}  loss {loss:.4f}  lr {lr:.3g}  "
            f"{rates[unit]:,.0f} {unit}/s  {'' if mfu is None else f'MFU {mfu:.1%}  '}"
            f"ETA {duration((self.total_steps - self.result.steps) * seconds / steps)}",
        )
        self.interval_samples, self.interval_loss, self.interval_units = 0, 0.0, 0.0
        self.logged_steps, self.interval_begin = self.result.steps, time.perf_counter()

    @contextmanager
    def evaluating(self) -> Iterator[dict[str, float]]:
        """Around an evaluation, which puts its metrics into the dictionary. Its time is not the training's."""
        metrics: dict[str, float] = {}
        with self.away(), self.compiled.evaluating():
            yield metrics
        self.result.evaluation = metrics
        self.evaluated_step = self.result.steps
        self.tracker.log(
            self._now() | metrics,
            f"step {self.result.steps}/{self.total_steps}  epoch {self.epoch:.2f}  "
            + "  ".join(f"{name} {value:.4f}" for name, value in metrics.items()),
        )

    def progress(self) -> Progress:
        """What a checkpoint keeps, so that a resumed run's metrics go on: on every rank the same counts. Collective."""
        self._sum_losses()
        now = time.perf_counter()
        counts = {"steps": self.result.steps, "samples": self.result.samples, "units": self.result.units}
        interval = {
            "logged_steps": self.logged_steps,
            "interval_samples": self.interval_samples,
            "interval_loss": self.interval_loss,
            "interval_units": self.interval_units,
        }
        times = {"time_s": now - self.begin, "train_s": now - self.train_begin, "interval_s": now - self.interval_begin}
        return counts | interval | times | self.result.evaluation | self.result.profile

    def _resume(self, progress: Progress) -> None:
        """Goes on from what `progress` gave."""
        self.first_step = self.result.steps = int(progress["steps"])
        self.result.samples, self.logged_steps = int(progress["samples"]), int(progress["logged_steps"])
        self.result.units = progress.get("units", 0.0)  # of an older checkpoint
        self.interval_samples = int(progress["interval_samples"])
        self.interval_loss, self.interval_units = progress["interval_loss"], progress["interval_units"]
        self.begin -= progress["time_s"]
        self.train_begin -= progress["train_s"]
        self.interval_begin -= progress["interval_s"]
        self.result.evaluation = {name: value for name, value in progress.items() if name.startswith("eval/")}
        self.result.profile = {name: value for name, value in progress.items() if name.startswith("profile/")}

    @contextmanager
    def away(self) -> Iterator[None]:
        """Around what is not training: its time counts neither for steps nor for their rate."""
        start = time.perf_counter()
        yield
        away = time.perf_counter() - start
        self.train_begin += away
        self.step_begin += away
        self.interval_begin += away

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """Around the compiling and capturing of a step. Its time is not the training's."""
        start = time.perf_counter()
        with self.away():
            yield
        self.result.prepare_s += time.perf_counter() - start

    def event(self, metrics: Metrics) -> None:
        """Metrics of something that happened after the last step."""
        self.tracker.log(self._now() | metrics, None)

    def _now(self) -> Metrics:
        return {"step": self.result.steps, "epoch": self.epoch, "time_s": time.perf_counter() - self.begin}

    def finish(self) -> Result:
        """The result, after the last step. Collective."""
        self.result.epochs = self.epoch
        self.result.train_s = time.perf_counter() - self.train_begin
        # The ranks' shares of a ragged batch differ, and so may what they compile.
        most = [max(counts) for counts in zip(*dist.gather(self.compiled.counts()), strict=True)]
        self.result.graphs, self.result.recompilations, self.result.cached_graphs = most
        return self.result


def _by_rank(by_rank: list[dict[str, float]], steps: int) -> Metrics:
    """Milliseconds a step of every rank in what it does alone, data and forward; and of several ranks the one that the
    others wait for: the one that is longest in that."""
    own_ms = [(seconds["data"] + seconds["forward"]) / steps * 1e3 for seconds in by_rank]
    listed: Metrics = {"ranks/own_ms": own_ms} if len(own_ms) <= LISTED_RANKS else {}
    if len(own_ms) == 1:
        return listed
    slowest = max(range(len(own_ms)), key=own_ms.__getitem__)
    return listed | {
        "straggler/rank": slowest,
        "straggler/own_ms": own_ms[slowest],
        "straggler/median_ms": statistics.median(own_ms),
        "straggler/data_ms": by_rank[slowest]["data"] / steps * 1e3,
    }


def _total(units: list[Units]) -> float:
    counted = [value for value in units if isinstance(value, torch.Tensor)]
    known = sum(value for value in units if not isinstance(value, torch.Tensor))
    return known + (float(torch.stack(counted).sum()) if counted else 0.0)


def duration(seconds: float) -> str:
    """Seconds in the two largest units: 3.2s, 2m05s, 1h07m."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"
