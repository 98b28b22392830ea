"""A run from its folder to its summary, in processes that have joined: start or resume, train, save."""

import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Literal

from dist_train import backends
from dist_train.backends import mesh
from dist_train.backends.base import Backend
from dist_train.backends.shards import Shards
from dist_train.checkpoint import resume, weights
from dist_train.checkpoint.save import Checkpoints, Facts, Stopped, saves
from dist_train.config.tree import Config
from dist_train.data.agree import agree
from dist_train.data.order import steps_per_epoch
from dist_train.loop import optim
from dist_train.loop.average import Average
from dist_train.loop.meter import Control, Meter, Metrics, Progress, Result
from dist_train.loop.train import train
from dist_train.loop.work import Work, total_steps
from dist_train.ranks import dist, watchdog
from dist_train.ranks.dist import World
from dist_train.ranks.phases import Phases
from dist_train.ranks.stop import Requests
from dist_train.run import assemble, folder, profiling
from dist_train.run.assemble import Parts
from dist_train.run.auditing import Alarmed
from dist_train.run.batch_statistics import notes
from dist_train.run.flops import peak_s_of_sample
from dist_train.run.hooks import Hook, Hooks
from dist_train.run.outcome import Outcome
from dist_train.run.running import Run
from dist_train.tasks.base import panels_of, shows_panels
from dist_train.track.base import Course
from dist_train.track.trackers import Trackers

NO_HOOKS: Mapping[str, Hook] = MappingProxyType({})


def run(
    config: Config, world: World, parts: Parts, facts: Facts, hooks: Mapping[str, Hook] = NO_HOOKS,
    phases: Phases | None = None, quits: bool = True,
) -> Outcome:  # fmt: skip
    """Trains to the end of the config, or until it is stopped. Collective.

    Args:
        config: the run.
        world: this rank's place.
        parts: what the run is made of.
        facts: what its checkpoints must fit.
        hooks: the user's own, by name.
        phases: where the loop is to say what it is doing, for who wants to know.
        quits: see `opened`.

    Raises:
        ConfigError: what only the run's folder can show, or the ranks' data sets together.
    """
    with opened(config, world, parts, facts, phases, quits) as one:
        training = Training(one, hooks)
        try:
            training.begin()
            return training.finish(train(training.work))
        except Ended:
            return training.finish(training.work.meter.finish())
        except Stopped as stopped:
            return training.stop(stopped)


@contextmanager
def opened(
    config: Config, world: World, parts: Parts, facts: Facts, phases: Phases | None = None, quits: bool = True
) -> Iterator[Run]:  # fmt: skip
    """A run with its folder, its trackers and its watchdog; see `run`. Collective.

    Args:
        quits: two interrupts in a row end the process; else they raise KeyboardInterrupt.
    """
    agree(parts.data, parts.feeds, world)  # before anything whose size depends on it
    cfg = config.train
    phases = phases or profiling.phases(config)
    requests = Requests(cfg.max_time_s, phases.clock, quits)
    control = Control(requests, phases, cfg.nonfinite == "stop", cfg.precision == "float16")
    with folder.opened(config, world) as path:
        if parts.data.keep is not None:
            keep = parts.data.keep
            dist.on_main(lambda: keep(path))
        found, damaged = resume.find(config, world, path, facts)  # what is wrong here, all ranks say together
        per_epoch = steps_per_epoch(len(parts.data.train), cfg.global_batch_size, cfg.drop_last)
        at, before = (found.manifest.step, found.folder.parent.parent) if found else (0, None)
        of_results = assemble.results(config, parts)
        steps, unit = total_steps(cfg, per_epoch), parts.task.unit
        course = Course(at, steps, per_epoch, cfg.global_batch_size, before, *of_results, unit)
        kept_id = found.manifest.wandb_id if found else None
        # Around the watchdog: a tracker may wait for its server, at the start and at the end.
        with (
            control.requests.listening(),
            Trackers(config, world, path, course, kept_id, lambda: parts.images(cfg.seed)) as trackers,
        ):
            control.phases.progressed()
            with watchdog.watching(world, control.phases, cfg.step_timeout_s, requests.orphaned):
                yield Run(config, world, parts, facts, path, control, found, damaged, course, trackers)


class Ended(Exception):
    """The run was ended by a hook, after a step that is all done; see Run.stop."""


class Training:
    """What a run does around its steps, whoever takes them. Methods are collective.

    Args:
        run: opened.
        hooks: by name.
        own_loop: the steps are taken by a loop of the user's own, which may end early as a hook may.

    Attributes:
        work: for the loop; to call its `after_step` after every step.
    """

    def __init__(self, run: Run, hooks: Mapping[str, Hook], own_loop: bool = False):
        work, flops = prepare(run)
        config, say = run.config, run.trackers.say
        self.run, self.hooks = run, Hooks(hooks, run) if hooks or own_loop else None
        best = assemble.best(config, work.task, run.data)
        self.checkpoints = Checkpoints(
            config, run.world, run.folder, run.facts, work.backend, best, run.damaged, run.trackers.wandb_id
        )
        after_step = self.checkpoints.after_step
        self.checkpoints.beside = self._state
        if self.hooks is not None:
            after_step = self._with_hooks
        of = config, run.world, run.folder, run.control, say, flops, run.course.at, after_step
        self.alarm = Alarmed(run, self.checkpoints)
        self.work = run.prepared = replace(work, after_step=profiling.profiled(*of), alarm=self.alarm)
        if config.train.audit_every_steps:
            self.checkpoints.trusted = lambda: self.alarm.clean

    def begin(self) -> None:
        """Before the first step. Raises Ended."""
        if self.hooks is None:
            return
        for line in self.hooks.start():
            self.run.trackers.say(line)
        if self.run.stopped is not None:  # killed between the last checkpoint and the end
            raise Ended

    def _state(self) -> dict[str, Shards]:
        """What a checkpoint holds beside the backend's state."""
        averages = self.work.average.state()
        return averages if self.hooks is None else averages | self.hooks.state()

    def _with_hooks(self, meter: Meter) -> None:
        assert self.hooks is not None
        self.hooks.after_step(meter)
        if self.run.stopped is not None and meter.result.steps < meter.total_steps:
            self.end_early()
        self.checkpoints.after_step(meter)

    def end_early(self) -> None:
        """Ends the run after the step that was taken last, as Run.stop says. Raises Ended."""
        meter = self.work.meter
        if self.work.evaluation.splits and meter.evaluated_step != meter.result.steps:
            self.work.evaluate(last=True)
        if saves(self.run.config.checkpoint):
            self.checkpoints.save(meter)
        raise Ended

    def stop(self, stopped: Stopped) -> Outcome:
        """The run was asked to end, and is saved."""
        self.checkpoints.close()
        if self.hooks is not None:
            self.hooks.end()
        self.run.trackers.stopped(stopped.why, stopped.step)
        return self._outcome(self.work.meter.result, "preempted", stopped.why)

    def finish(self, result: Result) -> Outcome:
        """The run has come to its end, or was ended by a hook."""
        run, work, evaluation = self.run, self.work, self.work.evaluation
        self.checkpoints.close()
        with work.average.used():
            weights.save_weights(run.folder if run.world.is_main else None, work.backend.weights())  # first of all
            wanted = evaluation.splits and (evaluation.examiners or shows_panels(work.task))
            if wanted and not evaluation.totals:  # no evaluation was left to be the last one
                evaluation.run(work.model, run.control.phases, last=True)
        for examiner in evaluation.examiners.values():
            examiner.write(run.folder)
        self._show_panels()
        if self.hooks is not None:
            self.hooks.end()
        early = run.stopped if result.steps < run.course.steps else None
        if self.alarm.steps:
            run.trackers.say(f"audited {self.alarm.steps} steps: something was found in {self.alarm.bad or 'none'}")
        run.trackers.finish(result, self.checkpoints.stalls_s, early)
        return self._outcome(result, "finished", early)

    def _show_panels(self) -> None:
        """Adds the task's own panels to the report, of each test split."""
        run, task = self.run, self.work.task
        for split, sums in self.work.evaluation.totals.items():
            found = panels_of(task, run.config.task.name, sums, run.data)
            if found:
                run.show(*(replace(panel, title=f"{panel.title}, {split}") if split else panel for panel in found))

    def _outcome(self, result: Result, status: Literal["finished", "preempted"], why: str | None) -> Outcome:
        of = result.steps, self.work.meter.epoch, result.samples, result.train_s, dict(result.evaluation)
        return Outcome(status, why, self.run.folder, *of)


def prepare(run: Run) -> tuple[Work, int | str | None]:
    """What the loop works with, on the backend, at the step where it starts; and FLOPs of a step, if they are asked
    for. Collective."""
    config, world, parts, trackers, found = run.config, run.world, run.parts, run.trackers, run.found
    laid = mesh.of(config, world.size) if config.backend.mesh else None
    place = dict(zip(mesh.DIMENSIONS, laid.place(world.rank), strict=True)) if laid else None
    trackers.say("\n".join([dist.rank_table(world, place), *parts.loaded, *parts.findings.notes]))
    for error in run.damaged:
        trackers.say(f"passed over a damaged checkpoint: {error}")
    if found:
        resume.load_model(found, parts.model)  # before it is sharded
    flops = profiling.flops_of_step(config, world, parts)
    peak_s = peak_s_of_sample(config, world, parts.model)
    said = [f"backend {trackers.backend}, {parts.describe()}", *parts.about()]  # before the weights are shared out
    if parts.findings.draws and config.train.draws == "keyed":
        said.append(
            f"model: draws by {', '.join(parts.findings.draws)}, which depends on the number of ranks; only dropout "
            f"and stochastic depth are keyed (train.draws)"
        )
    trackers.say("\n".join([*said, *notes(config, parts.findings, world.data_size)]))
    backend = _backend(config, world, parts)
    # A model with several optimizers has one for each of its parts, made in _backend.
    of_all = None if parts.optims else parts.model
    model, optimizer = backend.prepare(parts.model, optim.factory(config.optim, of_all, parts.unfused(config)))
    run.control.phases.journal = backend.journal
    progress, average = None, Average(config.optim, backend)
    if found:
        progress, beside = resume.load_state(found, backend, world, config.train.seed, average)
        trackers.say("\n".join([found.describe(), *beside]))
    began = _begin(run.course, progress, trackers.backend, world) | ({"mesh": str(laid)} if laid else {})
    trackers.log(began | _measured(parts, run.course), None)
    examiners = {name: parts.task.examiner(parts.data, feed, world) for name, feed in parts.test_feeds.items()}
    watched = {name: examiner for name, examiner in list(examiners.items())[:1] if examiner is not None}
    evaluation = parts.evaluation(config, world, watched)
    of = config, world, backend, model, optimizer, parts.task, parts.feed, evaluation, trackers, run.control
    return Work(*of, after_step=lambda meter: None, progress=progress, averaged=average, peak_s=peak_s), flops


def _backend(config: Config, world: World, parts: Parts) -> Backend:
    if not parts.optims:
        return backends.create(config, world, parts.findings)
    from dist_train.backends.several import Several

    def make(name: str) -> Backend:
        return backends.create(replace(config, optim=parts.optims[name]), world, parts.findings)

    children = dict(parts.model.named_children())
    factories = {name: optim.factory(cfg, children.get(name)) for name, cfg in parts.optims.items()}
    return Several(config, world, make, factories)


def _begin(course: Course, progress: Progress | None, backend: str, world: World) -> Metrics:
    """The line of metrics.jsonl that tells of a start."""
    return {
        "step": course.at,
        "epoch": course.at / course.steps_per_epoch,
        "time_s": progress["time_s"] if progress else 0.0,
        "event": "resume" if progress else "start",
        "at": time.time(),
        "backend": backend,
        "world_size": world.size,
        "host": platform.node(),
    }


def _measured(parts: Parts, course: Course) -> Metrics:
    """What that line says about metrics, for who reads them."""
    if not parts.task.evaluates:
        return {}
    return {
        "unit": parts.task.unit,
        "lower_is_better": sorted(parts.task.lower_is_better),
        "test_splits": [name for name in parts.data.tests if name],
        "best_metric": course.results[0] if course.results else None,
    }
