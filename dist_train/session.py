"""A run from its folder to its summary, in processes that have joined: start or resume, train, save."""

import contextlib
from pathlib import Path

from dist_train import backends, dist, ending, folder, optim, profiling, watchdog, weights
from dist_train.assemble import Parts
from dist_train.checkpoint import resume
from dist_train.checkpoint.manifest import Damaged
from dist_train.checkpoint.resume import Found
from dist_train.checkpoint.save import Checkpoints, Facts, Stopped
from dist_train.config import Config
from dist_train.dist import World
from dist_train.losses import loss_fn
from dist_train.meter import Control
from dist_train.mistakes import Mistakes
from dist_train.stop import Requests
from dist_train.track import Tracker
from dist_train.train import evaluate, train


def run(config: Config, world: World, parts: Parts, facts: Facts) -> int:
    """Trains to the end of the config, or until it is stopped. Collective.

    Returns:
        The exit code.

    Raises:
        ConfigError: what only the run's folder can show.
    """
    cfg = config.train
    phases = profiling.phases(config)
    control = Control(Requests(cfg.max_time_s), phases, cfg.nonfinite == "stop", cfg.precision == "float16")
    with folder.opened(config, world) as path:
        found, damaged = resume.find(config, world, path, facts)  # what is wrong here, all ranks say together
        with watchdog.watching(world, control.phases, cfg.step_timeout_s), control.requests.listening():
            return _run(config, world, parts, facts, path, control, found, damaged)


def _run(
    config: Config, world: World, parts: Parts, facts: Facts, path: Path, control: Control,
    found: Found | None, damaged: list[Damaged],
) -> int:  # fmt: skip
    at = found.manifest.step if found else 0
    with contextlib.closing(Tracker(path if world.is_main else None, at)) as tracker:
        tracker.say("\n".join([dist.rank_table(world), *parts.loaded]))
        for error in damaged:
            tracker.say(f"passed over a damaged checkpoint: {error}")
        if found:
            resume.load_model(found, parts.model)  # before it is sharded
        flops = profiling.flops_of_step(config, world, parts)
        backend = backends.create(config, world)
        model, optimizer = backend.prepare(parts.model, optim.factory(config.optim))
        tracker.say(f"backend {backends.chosen(config.backend.name, world.launcher)}, {parts.describe()}")
        progress = None
        if found:
            progress = resume.load_state(found, backend, world, config.train.seed)
            tracker.say(found.describe())
        checkpoints = Checkpoints(config, world, path, facts, backend, damaged)
        of = config, world, backend, model, optimizer, parts.feed, parts.test_feed, tracker
        after_step = profiling.profiled(config, world, path, control, tracker.say, flops, at, checkpoints.after_step)
        mistakes = Mistakes(config.train.loss, parts.test_feed, parts.data.classes, world)
        try:
            result = train(*of, after_step, control, progress, mistakes)
        except Stopped as stopped:
            checkpoints.close()
            tracker.stopped(stopped.why, stopped.step)
            return ending.STOPPED
        checkpoints.close()
        if not mistakes.seen:  # killed after its last step: no evaluation was left
            cfg, loss_of = config.train, loss_fn(config.train.loss)
            of = model, loss_of, parts.test_feed, cfg.eval_batch_size, world, parts.precision, control.phases
            evaluate(*of, mistakes)
        mistakes.write(path)
        weights.save_weights(tracker.folder, backend.weights())
        tracker.finish(config, world, result, checkpoints.stalls_s)
    return ending.OK
