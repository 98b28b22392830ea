"""Times and losses of a run. Between log points it only keeps references: nothing here waits for the device."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch

from dist_train import dist

Metrics = dict[str, float | int]
Progress = Mapping[str, float]  # what Meter.progress gives


class Sink(Protocol):
    """Who is told of metrics."""

    def log(self, metrics: Metrics, line: str | None) -> None:
        """Metrics of a moment, and a line for people about them, if there is something to say."""


class Requests:
    """What a rank may ask of all between two steps. They agree on it where they sum the loss anyway."""

    def __init__(self) -> None:
        self.asked = {"save": False}
        self.agreed = {"save": False}

    def settle(self, counts: list[float]) -> None:
        """How many ranks ask for each."""
        self.agreed = {name: count > 0 for name, count in zip(self.asked, counts, strict=True)}


@dataclass
class Result:
    """What a run has done so far.

    Args:
        steps: optimizer steps.
        epochs: passes over the data, with the part of the last one.
        samples: samples seen, over all ranks.
        train_s: seconds of training, evaluation left out.
        step_ms: durations of steps in milliseconds; on an accelerator, means between log points.
        first_step_s: seconds of the first step, its compilation included; on an accelerator, until it was launched.
        graphs: what torch.compile made, on the rank that made most.
        recompilations: of these, those of steps after the first epoch and of evaluations after the first one, which
            have shown every shape of the run.
        cached_graphs: of these, those that an earlier run had left in torch's cache.
        evaluation: the newest `eval/loss` and `eval/accuracy`.
    """

    steps: int = 0
    epochs: float = 0.0
    samples: int = 0
    train_s: float = 0.0
    step_ms: list[float] = field(default_factory=list)
    first_step_s: float = 0.0
    graphs: int = 0
    recompilations: int = 0
    cached_graphs: int = 0
    evaluation: dict[str, float] = field(default_factory=dict)


class Meter:
    """Counts a run's steps and tells the tracker of them every `every_steps`, and at the end.

    Args:
        tracker: takes the metrics.
        total_steps: of the run.
        steps_per_epoch: of the plan.
        every_steps: between log points.
        device: what the steps run on.
        progress: of the run so far, where it goes on from a checkpoint.
    """

    def __init__(
        self, tracker: Sink, total_steps: int, steps_per_epoch: int, every_steps: int, device: torch.device,
        progress: Progress | None = None,
    ):  # fmt: skip
        self.tracker, self.total_steps, self.steps_per_epoch = tracker, total_steps, steps_per_epoch
        self.every_steps, self.device = every_steps, device
        self.requests = Requests()
        self.result = Result()
        self.losses: list[torch.Tensor] = []
        self.counts: list[int] = []
        self.logged_steps = self.interval_samples = 0
        self.interval_loss = 0.0  # of the interval's steps before a checkpoint, over all ranks
        self.compiled = Compiled()
        self.begin = self.train_begin = self.step_begin = self.interval_begin = time.perf_counter()
        self.first_step = 0
        self.evaluated_step: int | None = None
        if progress is not None:
            self._resume(progress)

    @property
    def epoch(self) -> float:
        """Passes over the data so far, with the part of the current one."""
        return self.result.steps / self.steps_per_epoch

    def due(self, step: int) -> bool:
        """Whether metrics are read after this many steps."""
        return step % self.every_steps == 0 or step == self.total_steps

    def add(self, loss: torch.Tensor, count: int) -> None:
        """A micro-batch: its part of the loss of a step with `count` samples over all ranks."""
        self.losses.append(loss.detach())
        self.counts.append(count)

    def step(self, count: int, lr: float, norm: torch.Tensor | None) -> None:
        """The end of an optimizer step with `count` samples over all ranks. Collective where it is due."""
        self.result.steps += 1
        self.result.samples += count
        self.interval_samples += count
        if self.result.steps == self.first_step + 1:
            self.result.first_step_s = time.perf_counter() - self.step_begin
        if self.result.steps == self.first_step + self.steps_per_epoch:
            self.compiled.first_epoch_over()
        if self.due(self.result.steps):
            self._log(lr, norm)
        if self.device.type == "cpu":
            now = time.perf_counter()
            self.result.step_ms.append((now - self.step_begin) * 1e3)
            self.step_begin = now

    def _sum_losses(self) -> None:
        """Adds the losses since the last call to those of the interval, over all ranks, and settles the requests."""
        weights = torch.tensor(self.counts, dtype=torch.float64)
        # Each loss is a rank's sum divided by its step's samples; times the samples, the sum again.
        mine = (torch.stack(self.losses).to("cpu", torch.float64) * weights).sum() if self.losses else 0.0  # waits
        loss, *asked = dist.sum_numbers([float(mine), *self.requests.asked.values()], self.device)
        self.interval_loss += loss
        self.requests.settle(asked)
        self.losses, self.counts = [], []

    def _log(self, lr: float, norm: torch.Tensor | None) -> None:
        self._sum_losses()
        loss = self.interval_loss / self.interval_samples
        seconds = time.perf_counter() - self.interval_begin
        steps = self.result.steps - self.logged_steps
        if self.device.type != "cpu":
            self.result.step_ms.append(seconds / steps * 1e3)
        rate = self.interval_samples / seconds
        self.tracker.log(
            self._now()
            | {
                "train/loss": loss,
                "train/grad_norm": float(norm) if norm is not None else float("nan"),
                "train/lr": lr,
                "train/samples_per_s": rate,
            },
            f"step {self.result.steps}/{self.total_steps}  epoch {self.epoch:.2f}  loss {loss:.4f}  lr {lr:.3g}  "
            f"{rate:,.0f} samples/s  ETA {duration((self.total_steps - self.result.steps) * seconds / steps)}",
        )
        self.interval_samples, self.interval_loss = 0, 0.0
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
        counts = {"steps": self.result.steps, "samples": self.result.samples, "logged_steps": self.logged_steps}
        interval = {"interval_samples": self.interval_samples, "interval_loss": self.interval_loss}
        times = {"time_s": now - self.begin, "train_s": now - self.train_begin, "interval_s": now - self.interval_begin}
        return counts | interval | times | self.result.evaluation

    def _resume(self, progress: Progress) -> None:
        """Goes on from what `progress` gave."""
        self.first_step = self.result.steps = int(progress["steps"])
        self.result.samples, self.logged_steps = int(progress["samples"]), int(progress["logged_steps"])
        self.interval_samples, self.interval_loss = int(progress["interval_samples"]), progress["interval_loss"]
        self.begin -= progress["time_s"]
        self.train_begin -= progress["train_s"]
        self.interval_begin -= progress["interval_s"]
        self.result.evaluation = {name: value for name, value in progress.items() if name.startswith("eval/")}

    @contextmanager
    def away(self) -> Iterator[None]:
        """Around what is not training: its time counts neither for steps nor for their rate."""
        start = time.perf_counter()
        yield
        away = time.perf_counter() - start
        self.train_begin += away
        self.step_begin += away
        self.interval_begin += away

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


class Compiled:
    """Counts what torch.compile makes during a run; see Result. The process may have compiled before."""

    def __init__(self) -> None:
        self.graphs, self.cached = _graphs(), _cached()
        self.evaluated = 0  # graphs of evaluations
        self.first_epoch: int | None = None  # graphs of its steps
        self.first_evaluation: int | None = None

    def first_epoch_over(self) -> None:
        """After the last step of the first epoch."""
        self.first_epoch = _graphs() - self.graphs - self.evaluated

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Around an evaluation."""
        before = _graphs()
        yield
        self.evaluated += _graphs() - before
        if self.first_evaluation is None:
            self.first_evaluation = self.evaluated

    def counts(self) -> tuple[int, int, int]:
        """Graphs, recompilations and graphs from the cache, so far."""
        graphs = _graphs() - self.graphs
        trained = graphs - self.evaluated
        again = trained - (trained if self.first_epoch is None else self.first_epoch)
        return graphs, again + self.evaluated - (self.first_evaluation or 0), _cached() - self.cached


def _graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def _cached() -> int:
    return torch._dynamo.utils.counters["aot_autograd"]["autograd_cache_hit"]


def duration(seconds: float) -> str:
    """Seconds in the two largest units: 3.2s, 2m05s, 1h07m."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"
