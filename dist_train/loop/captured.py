"""compile.scope: step. An optimizer step as a function of tensors on the device alone, replayed as a CUDA graph.

Between two lines of metrics the host does nothing but start replays. The order of the samples and the learning rates of
an epoch go to the device when the epoch begins; a counter there, which the step itself moves on, says where in them it
is; the losses stay there until they are read.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import numpy as np
import torch

from dist_train.backends.base import compiled
from dist_train.data.order import share
from dist_train.errors import ConfigError
from dist_train.loop.meter import Meter
from dist_train.loop.schedule import lr_at
from dist_train.loop.work import Work
from dist_train.tasks.base import units_per_sample

WARM_UPS = 3  # what torch's manual asks for before a capture
Replay = Callable[[], object]


class Captured:
    """Takes the steps of a run in one process, without a word from the host; with the face of train.Eager.

    A step with another number of samples, as the last of an epoch may be, is a graph of its own, and so is one whose
    gradient norm is wanted. The first step of each kind is taken as it is, for what torch makes at a first use; the
    second is captured.

    Raises:
        ConfigError: a step of this model or optimizer cannot be captured.
    """

    def __init__(self, work: Work, meter: Meter):
        assert work.feed.resident  # held by run/assemble.py
        self.config, self.backend, self.model, self.plan = work.config, work.backend, work.model, work.plan
        self.meter, self.max_norm = meter, work.config.train.grad_clip
        each = units_per_sample(work.task)
        assert each is not None  # held by run/assemble.py
        self.each, plan, task, feed, optimizer = each, work.plan, work.task, work.feed, work.optimizer
        precision, device = work.precision, work.precision.device
        self.order = torch.zeros(plan.steps_per_epoch, plan.global_batch_size, dtype=torch.int64, device=device)
        # torch's kernels on CUDA read a learning rate as float32; on the CPU it stays the number that the config gives.
        rates = {"dtype": torch.float64 if device.type == "cpu" else torch.float32, "device": device}
        self.scales = np.array([group["lr_scale"] for group in optimizer.param_groups])
        self.rates = torch.zeros(plan.steps_per_epoch, len(self.scales), **rates)  # [steps, groups]
        self.rate = torch.zeros(1, len(self.scales), **rates)
        between_lines = min(self.config.track.every_steps, meter.total_steps)
        self.losses = torch.zeros(between_lines, plan.micro_batches(0), dtype=precision.dtype, device=device)
        self.norm = torch.zeros((), dtype=precision.dtype, device=device)
        self.at = torch.zeros(2, dtype=torch.int64, device=device)
        self.step, self.place = self.at[:1], self.at[1:]  # of the epoch; of its losses
        self.draws = work.draws
        self.before = torch.zeros(1, dtype=torch.int64, device=device)  # steps of the run before this epoch
        self.unread = 0  # the place, on the host
        for i, group in enumerate(optimizer.param_groups):
            group["lr"] = self.rate[0, i]
            if device.type == "cuda":
                assert group["fused"]  # held by backends/rules.py: it reads the rate, and counts steps, on the device
                group["capturable"] = True
        model = precision.called(work.model)

        def loss(samples: torch.Tensor) -> torch.Tensor:
            return task.sums(model, feed.gather(samples))["loss"]

        self.loss = compiled(loss, self.config.compile)
        self.graphs = Graphs(device) if device.type == "cuda" else NoGraphs(device)
        self.replays: dict[tuple[int, bool], Replay | None] = {}  # by samples, and whether the norm is wanted

    def begin(self, epoch: int, first: int) -> None:
        """Goes on from step `first` of an epoch."""
        start, done, total = first * self.plan.global_batch_size, self.meter.result.steps, self.meter.total_steps
        samples = np.concatenate(list(self.plan.indices(epoch, first)))
        lrs = [lr_at(self.config.optim, done + i, total) for i in range(self.plan.steps_per_epoch - first)]
        _send(samples, self.order.view(-1)[start : start + len(samples)])
        _send(np.outer(lrs, self.scales), self.rates[first:])
        self.step.fill_(first)
        self.before.fill_(done - first)

    def take(self, count: int, lr: float, measure: bool) -> tuple[int, torch.Tensor | None]:
        """Takes the step that comes next; see train.Eager. Its learning rate is on the device already."""
        measure_or_clip = measure or self.max_norm is not None
        self.meter.phases("forward")
        replay = self.replays.get((count, measure_or_clip))
        if replay is None:
            self._take_or_capture(count, measure_or_clip)
        else:
            replay()
        for i in range(self.plan.pieces(count)):
            self.meter.add(self.losses[self.unread, i])
        self.unread += 1
        if measure:  # for a line of metrics, with which the losses are read
            self.unread = 0
            self.place.zero_()
        return count * self.each, self.norm if measure_or_clip else None

    def _take_or_capture(self, count: int, measure: bool) -> None:
        """The first step of its kind, or the second."""
        step, key = partial(self._step, count, measure), (count, measure)
        if key in self.replays:
            with self._preparing():
                self.replays[key] = self.graphs.capture(step)
            self.replays[key]()
            return
        if not any(known == count for known, _ in self.replays):
            with self._preparing():
                self._warm_up(count)
        self.replays[key] = None
        with self.graphs.aside():
            step()

    @contextmanager
    def _preparing(self) -> Iterator[None]:
        """Around what is done once: its time is counted apart, without that of steps still under way."""
        self.graphs.wait()
        with self.meter.preparing():
            yield
            self.graphs.wait()

    def _warm_up(self, count: int) -> None:
        """Compiles forward and backward, and has torch make what it makes at their first use, so that the steps that
        count are as long as any. Nothing of it stays: neither gradients nor draws nor what layers keep, such as the
        running mean of a norm."""
        device, buffers = self.at.device, list(self.model.buffers())
        kept = [buffer.clone() for buffer in buffers]
        drawing = [device] if device.type == "cuda" else []  # beside the CPU, which always is
        with torch.random.fork_rng(drawing), self.graphs.aside():
            for _ in range(WARM_UPS):
                self._gradients(count)
                for parameter in self.model.parameters():
                    parameter.grad = None
        for buffer, value in zip(buffers, kept, strict=True):
            buffer.copy_(value)

    def _step(self, count: int, measure: bool) -> None:
        """A whole step, of which nothing is the host's but the number of samples."""
        torch.index_select(self.rates, 0, self.step, out=self.rate)
        self._gradients(count)
        norm = self.backend.step(self.max_norm, measure)
        if norm is not None:
            self.norm.copy_(norm)
        self.at.add_(1)

    def _gradients(self, count: int) -> None:
        samples = self.order.index_select(0, self.step)[0, :count]
        micro_batches = self.plan.pieces(count)
        for i in range(micro_batches):
            mine = samples[share(count, i, micro_batches, self.plan.group)]
            with self.draws.of(mine, self.meter.result.steps, on_device=self.before + self.step):
                loss = self.loss(mine)
                self.backend.backward(loss / (count * self.each))
            self.losses[:, i].index_copy_(0, self.place, loss.detach().view(1))


class Graphs:
    """Captures on a CUDA device, all into one pool of memory: no graph leaves anything there that another needs."""

    def __init__(self, device: torch.device):
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """In the stream in which graphs are captured: what torch holds for a stream is made there."""
        before = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(before)
        with torch.cuda.stream(self.stream):
            yield
        before.wait_stream(self.stream)

    def capture(self, function: Callable[[], None]) -> Replay:
        """What does again what the function does now; the function itself only says it. Raises ConfigError."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, self.pool, self.stream):
                function()
        except RuntimeError as error:
            # The end of a capture that has failed fails as well, and says less.
            reason = str(error.__context__ or error).strip().splitlines()[0]
            raise ConfigError(
                f"compile.scope: got step, but a step cannot be captured as a CUDA graph: {reason}; expected a model "
                f"that leaves all to the device; write --compile.scope model"
            ) from error
        return graph.replay

    def wait(self) -> None:
        """Until the device has done all that it was given."""
        torch.cuda.synchronize(self.device)


class NoGraphs:
    """In their place where there are none, such as on the CPU: the function is called again."""

    def __init__(self, device: torch.device):
        self.device = device

    def aside(self) -> AbstractContextManager:
        """See Graphs."""
        return nullcontext()

    def capture(self, function: Callable[[], None]) -> Replay:
        """See Graphs."""
        return function

    def wait(self) -> None:
        """See Graphs."""


def _send(values: np.ndarray, to: torch.Tensor) -> None:
    """To the device, for the steps that come after; a number that is not pinned would be waited for."""
    source = torch.from_numpy(values).to(to.dtype)
    to.copy_(source.pin_memory() if to.device.type == "cuda" else source, non_blocking=True)
