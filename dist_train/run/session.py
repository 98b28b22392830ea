"""A run from its folder to its summary, in processes that have joined: start or resume, train, save."""

import platform
import time
from pathlib import Path

from dist_train import backends
from dist_train.checkpoint import resume, weights
from dist_train.checkpoint.manifest import Damaged
from dist_train.checkpoint.resume import Found
from dist_train.checkpoint.save import Checkpoints, Facts, Stopped
from dist_train.config.tree import Config
from dist_train.data.agree import agree
from dist_train.data.order import evaluated_at_once, steps_per_epoch
from dist_train.loop import optim
from dist_train.loop.average import Average
from dist_train.loop.meter import Control, Metrics, Progress
from dist_train.loop.train import evaluate, total_steps, train
from dist_train.ranks import dist, ending, watchdog
from dist_train.ranks.dist import World
from dist_train.ranks.phases import Phases
from dist_train.ranks.stop import Requests
from dist_train.run import folder, profiling
from dist_train.run.assemble import Parts
from dist_train.tasks.losses import loss_fn
from dist_train.tasks.mistakes import Mistakes
from dist_train.track.base import Course
from dist_train.track.trackers import Trackers


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
    agree(parts.data, (parts.feed, parts.test_feed), world)  # before anything whose size depends on it
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
                return _run(config, world, parts, facts, path, control, found, damaged, course, trackers)


def _run(
    config: Config, world: World, parts: Parts, facts: Facts, path: Path, control: Control,
    found: Found | None, damaged: list[Damaged], course: Course, trackers: Trackers,
) -> int:  # fmt: skip
    trackers.say("\n".join([dist.rank_table(world), *parts.loaded]))
    for error in damaged:
        trackers.say(f"passed over a damaged checkpoint: {error}")
    if found:
        resume.load_model(found, parts.model)  # before it is sharded
    flops = profiling.flops_of_step(config, world, parts)
    trackers.say(f"backend {trackers.backend}, {parts.describe()}")  # before the weights are shared out
    backend = backends.create(config, world, parts.findings)
    optimizer_fn = optim.factory(config.optim, parts.model, bool(parts.findings.sparse))
    model, optimizer = backend.prepare(parts.model, optimizer_fn)
    control.phases.journal = backend.journal
    progress, average = None, Average(config.optim, backend)
    if found:
        progress, beside = resume.load_state(found, backend, world, config.train.seed, average)
        trackers.say("\n".join([found.describe(), *beside]))
    trackers.log(_begin(course, progress, trackers.backend, world), None)
    checkpoints = Checkpoints(config, world, path, facts, backend, damaged, trackers.wandb_id, average.state)
    of = config, world, backend, model, optimizer, parts.feed, parts.test_feed, trackers
    saving = checkpoints.after_step
    after_step = profiling.profiled(config, world, path, control, trackers.say, flops, course.at, saving)
    mistakes = Mistakes(config.train.loss, parts.test_feed, parts.data.classes, world)
    try:
        result = train(*of, after_step, control, progress, mistakes, average)
    except Stopped as stopped:
        checkpoints.close()
        trackers.stopped(stopped.why, stopped.step)
        return ending.STOPPED
    checkpoints.close()
    with average.used():
        weights.save_weights(path if world.is_main else None, backend.weights())  # first of all that is left
        if not mistakes.seen:  # killed after its last step: no evaluation was left
            cfg, loss_of = config.train, loss_fn(config.train.loss)
            at_once = evaluated_at_once(cfg, world.size, parts.findings.sample_bytes)
            of = model, loss_of, parts.test_feed, at_once, world, parts.precision, control.phases
            evaluate(*of, mistakes)
    mistakes.write(path)
    trackers.finish(result, checkpoints.stalls_s)
    return ending.OK


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
