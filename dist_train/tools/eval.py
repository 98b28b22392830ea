"""python -m dist_train eval --run.dir DIR [--section.key value ...]: evaluates a finished run's model.

The config is the run's own, with what the command line gives on top, under any launcher.
"""

import json
from pathlib import Path

from dist_train.check import check, run_folder
from dist_train.config import load
from dist_train.errors import ConfigError
from dist_train.launcher import Launcher


def run(argv: list[str], launcher: Launcher) -> int:
    """Prints `eval/loss` and `eval/accuracy` as a line of JSON."""
    given = load(argv)
    folder = run_folder(given)
    if folder is None:
        raise ConfigError("run.dir: got nothing, expected the folder of a finished run; write eval --run.dir DIR")
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"run.dir: got {folder}, expected the folder of a finished run, with config.yaml in it")
    config = load(["--config", str(folder / "config.yaml"), *argv])
    check(config, launcher, writes=False)

    from dist_train import assemble, backends, dist, optim, weights
    from dist_train.losses import loss_fn
    from dist_train.train import evaluate

    device = dist.resolve_device(config.train.device, launcher.local_rank)
    dist.set_threads(config.train.threads, launcher.local_world_size)
    parts = assemble.build(config, device)
    state = weights.load_weights(Path(folder))
    try:
        parts.model.load_state_dict(state)
    except RuntimeError as error:
        raise ConfigError(
            f"model: got another model than the one in {folder}: {' '.join(str(error).split())}"
        ) from None
    with dist.joined(launcher, device) as world:
        model, _ = backends.create(config, world).prepare(parts.model, optim.factory(config.optim))
        metrics = evaluate(
            model, loss_fn(config.train.loss), parts.test_feed, config.train.eval_batch_size, world, parts.precision
        )
        if world.is_main:
            print(json.dumps(metrics))
    return 0
