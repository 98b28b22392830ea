"""A rank of a benchmark: python -m dist_train.bench.worker FOLDER NAME, under torchrun or alone.

The folder has the config and the leader's socket. NAME is ours, which holds its references beside it, or a reference
that takes its first steps alone.
"""

import sys
from pathlib import Path

from dist_train.backends import mesh
from dist_train.bench.references import references
from dist_train.bench.slices import CONFIG, OURS, SOCKET, WARM_STEPS
from dist_train.bench.turns import Held, Turns, alone
from dist_train.checkpoint import resume
from dist_train.config.load import load
from dist_train.config.paths import written
from dist_train.errors import ConfigError
from dist_train.ranks import dist, ending
from dist_train.ranks.launcher import Launcher, detect
from dist_train.run import assemble, session


def main(folder: Path, name: str, launcher: Launcher) -> None:
    """Takes turns until the leader says that it is over."""
    config = load(["--config", written(str(folder / CONFIG))])
    device = dist.resolve_device(config.train.device, launcher.local_rank)
    dist.set_threads(config.train.threads, launcher.local_world_size)
    parts = assemble.build(config, device)
    with dist.joined(launcher, device, tensor=mesh.of(config, launcher.world_size).tensor) as world:
        turns = Turns(str(folder / SOCKET), world.rank, device)
        if name != OURS:
            alone(references(config, world, parts, WARM_STEPS)[name], turns)
            return
        phases = Held(turns, references(config, world, parts))
        session.run(config, world, parts, resume.facts_of(parts.model, parts.data), phases=phases)


if __name__ == "__main__":
    launcher, code = Launcher(), ending.OK
    try:
        launcher = detect()
        main(Path(sys.argv[1]), sys.argv[2], launcher)
    except ConfigError as error:
        code = ending.refuse(error, launcher)
    except BaseException as error:
        code = ending.fail(error, launcher)
    ending.leave(code)
