"""A run, as the commands that read one take it from the command line."""

import dataclasses
from pathlib import Path

from dist_train.config.load import load
from dist_train.config.paths import written
from dist_train.config.tree import Config, run_folder
from dist_train.errors import ConfigError


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
