"""A run from its folder to its summary, in processes that have joined: start or resume, train, save."""

import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from dist_train import backends
from dist_train.checkpoint import resume, weights
from dist_train.checkpoint.manifest import Damaged
from dist_train.checkpoint.resume import Found
from dist_train.checkpoint.save import Checkpoints, Facts, Stopped
from dist_train.config.tree import Config
from dist_train.data.agree import agree
from dist_train.data.order import steps_per_epoch
from dist_train.loop import optim
from dist_train.loop.meter import Control, Metrics, Progress
from dist_train.loop.train import train
from dist_train.loop.work import Work, total_steps
from dist_train.ranks import dist, ending, watchdog
from dist_train.ranks.dist import World
from dist_train.ranks.phases import Phases
from dist_train.ranks.stop import Requests
from dist_train.run import assemble, folder, profiling
from dist_train.run.assemble import Parts
from dist_train.track.base import Course
from dist_train.track.trackers import Trackers


@dataclass
class Run:
    """A run in the processes that have joined: what its parts are handed as one.

    Args:
        config: the run.
        world: this rank's place.
        parts: what it is made of.
        facts: what its checkpoints must fit.
        folder: of the run.
        control: what may end it early, and where it says what it is doing.
        found: the checkpoint that it resumes from.
        damaged: checkpoints that were passed over.
        course: what it has to go.
        trackers: who is told.
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


def run(config: Config, world: World, parts: Parts, facts: Facts, phases: Phases | None = None) -> int:
    """Trains to the end of the config, or until it is stopped. Collective.

    Args:
        config: the run.
        world: this rank's place.
        parts: what the run is made of.
        facts: what its checkpoints must fit.
        phases: where the loop is to say what it is doing, for who wants to know.

    Returns:
        The exit code.

    Raises:
        ConfigError: what only the run's folder can show, or the ranks' data sets together.
    """
    with opened(config, world, parts, facts, phases) as one:
        return _train(one)


@contextmanager
def opened(
    config: Config, world: World, parts: Parts, facts: Facts, phases: Phases | None = None
) -> Iterator[Run]:  # fmt: skip
    """A run with its folder, its trackers and its watchdog; see `run`. Collective."""
    agree(parts.data, parts.feeds, world)  # before anything whose size depends on it
    cfg = config.train
    phases = phases or profiling.phases(config)
    requests = Requests(cfg.max_time_s, phases.clock)
    control = Control(requests, phases, cfg.nonfinite == "stop", cfg.precision == "float16")
    with folder.opened(config, world) as path:
        found, damaged = resume.find(config, world, path, facts)  # what is wrong here, all ranks say together
        per_epoch = steps_per_epoch(len(parts.data.train), cfg.global_batch_size, cfg.drop_last)
        at, before = (found.manifest.step, found.folder.parent.parent) if found else (0, None)
        course = Course(at, total_steps(cfg, per_epoch), per_epoch, cfg.global_batch_size, before)
        kept_id = found.manifest.wandb_id if found else None
        # Around the watchdog: a tracker may wait for its server, at the start and at the end.
        with (
            control.requests.listening(),
            Trackers(config, world, path, course, kept_id, lambda: parts.images(cfg.seed)) as trackers,
        ):
            control.phases.progressed()
            with watchdog.watching(world, control.phases, cfg.step_timeout_s, requests.orphaned):
                yield Run(config, world, parts, facts, path, control, found, damaged, course, trackers)


def _train(run: Run) -> int:
    config, world, trackers = run.config, run.world, run.trackers
    work, flops = prepare(run)
    best = assemble.best(config, work.task)
    checkpoints = Checkpoints(config, world, run.folder, run.facts, work.backend, best, run.damaged, trackers.wandb_id)
    saving = checkpoints.after_step
    work = replace(
        work,
        after_step=profiling.profiled(
            config, world, run.folder, run.control, trackers.say, flops, run.course.at, saving
        ),
    )
    try:
        result = train(work)
    except Stopped as stopped:
        checkpoints.close()
        trackers.stopped(stopped.why, stopped.step)
        return ending.STOPPED
    checkpoints.close()
    weights.save_weights(run.folder if world.is_main else None, work.backend.weights())  # first of all that is left
    examiners = work.evaluation.examiners.values()
    if not all(examiner.seen for examiner in examiners):  # killed after its last step: no evaluation was left
        work.evaluation.run(work.model, run.control.phases, last=True)
    for examiner in examiners:
        examiner.write(run.folder)
    trackers.finish(result, checkpoints.stalls_s)
    return ending.OK


def prepare(run: Run) -> tuple[Work, int | None]:
    """What the loop works with, on the backend, at the step where it starts; and FLOPs of a step, if they are asked
    for. Collective."""
    config, world, parts, trackers, found = run.config, run.world, run.parts, run.trackers, run.found
    trackers.say("\n".join([dist.rank_table(world), *parts.loaded]))
    for error in run.damaged:
        trackers.say(f"passed over a damaged checkpoint: {error}")
    if found:
        resume.load_model(found, parts.model)  # before it is sharded
    flops = profiling.flops_of_step(config, world, parts)
    trackers.say(f"backend {trackers.backend}, {parts.describe()}")  # before the weights are shared out
    backend = backends.create(config, world, parts.findings)
    model, optimizer = backend.prepare(parts.model, optim.factory(config.optim, bool(parts.findings.sparse)))
    run.control.phases.journal = backend.journal
    progress = None
    if found:
        progress, beside = resume.load_state(found, backend, world, config.train.seed)
        trackers.say("\n".join([found.describe(), *beside]))
    trackers.log(_begin(run.course, progress, trackers.backend, world), None)
    examiners = {name: parts.task.examiner(parts.data, feed, world) for name, feed in parts.test_feeds.items()}
    watched = {name: examiner for name, examiner in list(examiners.items())[:1] if examiner is not None}
    evaluation = parts.evaluation(config, world, watched)
    of = config, world, backend, model, optimizer, parts.task, parts.feed, evaluation, trackers, run.control
    return Work(*of, after_step=lambda meter: None, progress=progress), flops


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
