"""A run, as the commands that read one take it from the command line."""

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dist_train.config.load import load
from dist_train.config.paths import written
from dist_train.config.tree import BackendConfig, Config, run_folder
from dist_train.config.values import unknown
from dist_train.errors import ConfigError
from dist_train.ranks.launcher import Launcher

if TYPE_CHECKING:
    from dist_train.checkpoint.places import Folder
    from dist_train.data.sets import Data


def finished(argv: list[str], command: str) -> tuple[Path, Config]:
    """The folder that `--run.dir` names, and the run's own config with what the command line gives on top.

    The run's weights are all that its model needs, so the file that it started from may be gone: model.init_from is
    taken out. Raises ConfigError.
    """
    folder, config = recorded(argv, command, "a finished run")
    given = load(argv, f"python -m dist_train {command}")
    if given.model.init_from is not None:
        raise ConfigError(
            f"model.init_from: got {given.model.init_from}, but {command} takes the weights of the run; leave it out"
        )
    own = dataclasses.replace(config.model, init_from=None, init_strict=False)
    return folder, dataclasses.replace(config, model=own)


def source_of(which: str, folder: Path, config: Config, data: "Data | None" = None) -> "Folder":
    """The run's folder for its final weights, or its best checkpoint's. Raises ConfigError.

    Args:
        which: final or best.
        folder: of the run.
        config: of the run.
        data: what is known of the data set; None reads it.
    """
    if which not in ("final", "best"):
        raise ConfigError(unknown("--which", which, ["final", "best"], "choice"))
    if which == "final":
        return folder
    from dist_train.checkpoint import manifest, places
    from dist_train.run import assemble

    data = data or assemble.read_data(config.data, config.data.download)
    place = places.of_config(config, folder) or folder
    found = assemble.best(config, assemble.make_task(config, data), data).of(manifest.listed(place)[0])
    if found is None:
        raise ConfigError(
            f"--which: got best, but {folder} has no checkpoint that was evaluated; expected final, or a run with "
            f"--checkpoint.every_epochs 1 --checkpoint.keep_best 1"
        )
    return found[0]


def recorded(argv: list[str], command: str, kind: str = "a run") -> tuple[Path, Config]:
    """The same of any run, with all that its config says. Raises ConfigError.

    Args:
        argv: the command line.
        command: whose it is.
        kind: of the run that is expected.
    """
    folder = run_folder(load(argv, f"python -m dist_train {command}"))
    if folder is None:
        raise ConfigError(f"run.dir: got nothing, expected the folder of {kind}; write {command} --run.dir DIR")
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"run.dir: got {folder}, expected the folder of {kind}, with config.yaml in it")
    return folder, load(["--config", written(str(folder / "config.yaml")), *argv])


def alone(config: Config, argv: list[str], command: str, launcher: Launcher) -> Config:
    """The same for backend `single` where the command was started alone and the run was not, which a line says. A
    backend that the command line names stays.

    Args:
        config: of the run, with what the command line gives on top.
        argv: the command line.
        command: whose it is.
        launcher: who started it.
    """
    backend, single = config.backend, BackendConfig("single", reduce=config.backend.reduce)
    named = load(argv, f"python -m dist_train {command}").backend.name != "auto"
    fits = backend.name in ("auto", "single") and dataclasses.replace(backend, name="single") == single
    if launcher.name != "none" or named or fits:
        return config
    print(f"{command}: backend single, as it was started alone; the run had {backend.name}", file=sys.stderr)
    return dataclasses.replace(config, backend=single)
