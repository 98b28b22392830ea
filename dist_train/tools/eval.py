"""python -m dist_train eval --run.dir DIR [--section.key value ...]: evaluates a finished run's model.

The config is the run's own, with what the command line gives on top, under any launcher; started alone, backend single
takes it.
"""

import json

from dist_train.backends import mesh
from dist_train.ranks.launcher import Launcher
from dist_train.run.check import check
from dist_train.tools.finished import alone, finished


def run(argv: list[str], launcher: Launcher) -> int:
    """Prints the metrics, `eval/loss` and others, as a line of JSON."""
    folder, config = finished(argv, "eval")
    config = alone(config, argv, "eval", launcher)
    check(config, launcher, writes=False)

    from dist_train import backends
    from dist_train.data.agree import agree
    from dist_train.loop import optim
    from dist_train.ranks import dist
    from dist_train.run import assemble

    device = dist.resolve_device(config.train.device, launcher.local_rank)
    dist.set_threads(config.train.threads, launcher.local_world_size)
    parts = assemble.build(config, device, trained=folder)
    with dist.joined(launcher, device, tensor=mesh.of(config, launcher.world_size).tensor) as world:
        agree(parts.data, parts.feeds, world)
        backend = backends.create(config, world, parts.findings)
        model, _ = backend.prepare(parts.model, optim.factory(config.optim))
        metrics = parts.evaluation(config, world).run(model)
        if world.is_main:
            print(json.dumps(metrics))
    return 0
