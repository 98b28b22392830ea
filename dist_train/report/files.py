"""What a run's folder is known by."""

import os
from pathlib import Path

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
