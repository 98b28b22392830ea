"""What a run's folder is called by, and files that are whole or absent."""

import os
from pathlib import Path

from dist_train.errors import ConfigError

METRICS = "metrics.jsonl"
# Folders within a run's that hold no runs.
NOT_RUNS = {"checkpoints", "profile", "tensorboard", "wandb"}


def is_run(folder: Path) -> bool:
    """Whether a run wrote, or begins to write, in this folder."""
    return (folder / METRICS).is_file() or ((folder / "config.yaml").is_file() and (folder / ".lock").is_file())


def runs_below(folder: Path) -> list[Path]:
    """Folders of runs: the folder itself, and those at any depth in it. What cannot be read is passed over."""
    found = []
    for place, names, _ in os.walk(folder):
        if is_run(Path(place)):
            found.append(Path(place))
        names[:] = sorted(name for name in names if name not in NOT_RUNS and not name.startswith("."))
    return found


def write(path: Path, content: bytes, option: str) -> None:
    """A file that is whole or absent. Raises ConfigError, which names the option that gave the path."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            beside.write_bytes(content)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{option}: got {path}, which cannot be written ({error.strerror}), expected a file in a folder of your "
            f"own, on a disk with space; for example {option} /tmp/{path.name}"
        ) from error
