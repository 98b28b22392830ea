"""A run from its folder to its summary, in processes that have joined: start or resume, train, save."""

import contextlib

from dist_train import backends, dist, folder, optim, weights
from dist_train.assemble import Parts
from dist_train.checkpoint import resume, save
from dist_train.checkpoint.save import Facts
from dist_train.config import Config
from dist_train.dist import World
from dist_train.meter import Result
from dist_train.track import Tracker
from dist_train.train import train


def run(config: Config, world: World, parts: Parts, facts: Facts) -> Result:
    """Trains to the end of the config. Collective. Raises ConfigError for what only the run's folder can show."""
    with folder.opened(config, world) as path:
        found, damaged = resume.find(config, world, path, facts)
        at = found.manifest.step if found else 0
        with contextlib.closing(Tracker(path if world.is_main else None, at)) as tracker:
            tracker.say("\n".join([dist.rank_table(world), *parts.loaded]))
            for error in damaged:
                tracker.say(f"passed over a damaged checkpoint: {error}")
            if found:
                resume.load_model(found, parts.model)  # before it is sharded
            backend = backends.create(config, world)
            model, optimizer = backend.prepare(parts.model, optim.factory(config.optim))
            tracker.say(f"backend {backends.chosen(config.backend.name, world.launcher)}, {parts.describe()}")
            progress = None
            if found:
                progress = resume.load_state(found, backend, world, config.train.seed)
                tracker.say(found.describe())
            checkpoints = save.Checkpoints(config, world, path, facts, backend, damaged)
            feeds = parts.feed, parts.test_feed
            result = train(config, world, backend, model, optimizer, *feeds, tracker, checkpoints.after_step, progress)
            checkpoints.close()
            weights.save_weights(tracker.folder, backend.weights())
            tracker.finish(config, world, result, checkpoints.stalls_s)
    return result
