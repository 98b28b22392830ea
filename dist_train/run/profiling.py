"""track.profile: a trace of some steps by torch.profiler, and where their time and their arithmetic went."""

import importlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, record_function

from dist_train.checkpoint.save import Stopped
from dist_train.config.tree import Config
from dist_train.loop.meter import Control, Meter, Metrics
from dist_train.ranks.dist import World, device_name
from dist_train.ranks.phases import Phases
from dist_train.run import flops
from dist_train.run.assemble import Parts
from dist_train.track import timeline
from dist_train.track.rules import PROFILE
from dist_train.whole import whole

FOLDER = "profile"
OPERATORS = 10  # lines of the table
AfterStep = Callable[[Meter], None]


class Ranges(Phases):
    """Phases that are also ranges of a trace, between `open` and `close`."""

    def __init__(self) -> None:
        super().__init__()
        self.recording = False
        self.range: record_function | None = None

    def __call__(self, name: str) -> None:
        """See Phases."""
        goes_on = name == self.name
        super().__call__(name)
        if self.recording and not goes_on:
            self._end()
            self.range = record_function(name)
            self.range.__enter__()

    def open(self) -> None:
        """From the next phase on."""
        self.recording = True

    def close(self) -> None:
        """The last range ends."""
        self._end()
        self.recording = False

    def _end(self) -> None:
        if self.range is not None:
            self.range.__exit__(None, None, None)
            self.range = None


def phases(config: Config) -> Phases:
    """The phases of a run. Those of one that is not profiled know nothing of ranges."""
    return Ranges() if config.track.profile else Phases()


def flops_of_step(config: Config, world: World, parts: Parts) -> int | str | None:
    """FLOPs of a step, or why they could not be counted; None where the run is not profiled. Before the model is
    sharded or compiled."""
    if not config.track.profile:
        return None
    try:
        return flops.of_step(config, world, parts)
    except Exception as error:  # of the user's model
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def profiled(
    config: Config, world: World, folder: Path, control: Control, say: Callable[[str], None], counted: int | str | None,
    at: int, after_step: AfterStep,
) -> AfterStep:  # fmt: skip
    """What the loop is to call after every step: `after_step`, and around the steps of track.profile the profiler.

    Args:
        config: of the run.
        world: this rank's place.
        folder: of the run.
        control: its phases are what `phases` gave.
        say: takes lines for people.
        counted: what `flops_of_step` gave.
        at: the step that the run goes on from.
        after_step: is called first.
    """
    if not config.track.profile:
        return after_step
    assert isinstance(control.phases, Ranges)
    return Recording(config, world, folder, control.phases, say, counted, at, after_step)


class Recording:
    """Waits for its steps, records them, then takes the time of as many that nobody looks at, as a profiler slows.

    A run that goes on from within its steps records those that are left; one that goes on from after them, none.
    """

    def __init__(
        self, config: Config, world: World, folder: Path, ranges: Ranges, say: Callable[[str], None],
        counted: int | str | None, at: int, after_step: AfterStep,
    ):  # fmt: skip
        self.config, self.world, self.folder, self.ranges, self.say = config, world, folder, ranges, say
        self.flops, self.then = counted, after_step
        wanted = PROFILE | config.track.profile
        self.first, self.last = wanted["start_step"], wanted["start_step"] + wanted["steps"] - 1
        self.steps, self.step_s, self.begin = wanted["steps"], 0.0, 0.0
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else it says of a machine without a GPU that there is none
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (world.device.type == "cuda")
        self.profiler = torch.profiler.profile(activities=activities, acc_events=True)
        importlib.import_module("torch._inductor")  # the profiler does at its start: a second, not between two steps
        if isinstance(counted, str):
            say(f"track.profile: FLOPs are not counted, as the model does not run on tensors without values: {counted}")
        self.act = self._wait
        if self.first <= at + 1 <= self.last:
            self.first = at + 1
            self._start()
        elif at >= self.first:
            self.act = self._rest

    def __call__(self, meter: Meter) -> None:
        """After a step."""
        try:
            self.then(meter)
        except Stopped:
            self.act(meter, over=True)
            raise
        self.act(meter, over=meter.result.steps == meter.total_steps)

    def _wait(self, meter: Meter, over: bool) -> None:
        if meter.result.steps == meter.total_steps:
            self.say(f"track.profile: the run ended with step {meter.result.steps}, before step {self.first}: no trace")
        elif meter.result.steps == self.first - 1 and not over:
            with meter.away():
                self._start()

    def _start(self) -> None:
        self.profiler.start()
        self.ranges.open()
        self.act = self._record

    def _record(self, meter: Meter, over: bool) -> None:
        if not over and meter.result.steps < self.last:
            return
        self.ranges.close()
        self.last = meter.result.steps
        with meter.away():
            meter.phases.progressed()
            self.profiler.stop()
            path = self.folder / FOLDER / f"rank{self.world.rank}.json"
            path.parent.mkdir(parents=True, exist_ok=True)  # the run's folder may be on rank 0's disk alone
            with whole(path) as beside:
                self.profiler.export_chrome_trace(str(beside))
            if self.world.is_main:
                with path.open(encoding="utf-8") as file:
                    found = timeline.shares(json.load(file))
                self._tell(path.parent, found)
                self.step_s = found.total_s / (self.last - self.first + 1)
                meter.result.profile = _metrics(found) | self._rate(self.step_s)
            meter.phases.progressed()
        self.profiler = None  # with its events
        self.begin, self.act = _train_s(meter), self._time
        if over:
            self._time(meter, over)

    def _time(self, meter: Meter, over: bool) -> None:
        done = meter.result.steps - self.last
        if over or done == self.steps:
            if self.world.device.type != "cpu":
                torch.accelerator.synchronize()
            if done:
                where = f"steps {self.last + 1} to {meter.result.steps}, without the profiler"
                self._report(meter, (_train_s(meter) - self.begin) / done, where)
            else:
                self._report(meter, self.step_s, f"steps {self.first} to {self.last}, which the profiler slows")

    def _rest(self, meter: Meter, over: bool) -> None:
        pass

    def _tell(self, folder: Path, found: timeline.Shares) -> None:
        """Operators and shares, for people."""
        on_device = self.world.device.type != "cpu"
        rows = [row for row in self.profiler.key_averages() if not row.is_user_annotation]
        own_us = {id(row): row.self_device_time_total if on_device else row.self_cpu_time_total for row in rows}
        total_us = sum(own_us.values()) or 1
        rows.sort(key=lambda row: -own_us[id(row)])
        count = self.last - self.first + 1
        fewer = "" if count == self.steps else f", {count} of the {self.steps} asked for"
        lines = [f"profiled steps {self.first} to {self.last}{fewer}; traces in {folder}, for ui.perfetto.dev"]
        lines.append(f"{'self ms':>10}  {'share':>6}  {'calls':>6}  operator, on rank 0")
        for row in rows[:OPERATORS]:
            us = own_us[id(row)]
            lines.append(f"{us / 1e3:10.2f}  {us / total_us:6.1%}  {row.count:6}  {row.key[:80]}")
        lines.append("time: " + ", ".join(f"{name} {share:.1%}" for name, share in found.by_phase.items()))
        if found.in_flight:
            lines.append(
                f"reduction is what the rank only waited for: collectives were under way for {found.in_flight:.1%} of "
                f"the time, {found.overlapped:.0%} of that beside other work"
            )
        self.say("\n".join(lines))

    def _report(self, meter: Meter, step_s: float, where: str) -> None:
        """How fast it is, at the end of all this."""
        self.act = self._rest
        if not self.world.is_main:
            return
        rate = self._rate(step_s)
        meter.result.profile |= rate
        meter.event(meter.result.profile)
        if rate:
            peak = flops.peak_tflops(device_name(self.world.device), self.config.train.precision)
            of_peak = f", {rate['profile/peak_share']:.1%} of the peak of {peak:g}" if peak else ""
            self.say(
                f"{_short(self.flops)}FLOP a step, {rate['profile/tflops']:.3g} TFLOP/s a device{of_peak} ({where})"
            )

    def _rate(self, step_s: float) -> Metrics:
        if not isinstance(self.flops, int):
            return {}
        tflops = self.flops / step_s / self.world.size / 1e12
        peak = flops.peak_tflops(device_name(self.world.device), self.config.train.precision)
        share = {"profile/peak_share": tflops / peak} if peak else {}
        return {"profile/flops_per_step": self.flops, "profile/tflops": tflops, **share}


def _train_s(meter: Meter) -> float:
    """Seconds of training so far; those of evaluations and saves are not in it."""
    return time.perf_counter() - meter.train_begin


def _metrics(found: timeline.Shares) -> Metrics:
    by_phase = {f"profile/share/{name}": share for name, share in found.by_phase.items()}
    return by_phase | {"profile/collectives_in_flight": found.in_flight}


def _short(number: float) -> str:
    """A number with a letter for its thousands: 1.25 M."""
    for letter in ("", "k", "M", "G", "T"):
        if number < 1000:
            return f"{number:.4g} {letter}"
        number /= 1000
    return f"{number:.4g} P"
