"""The final weights of a run."""

import os
from pathlib import Path

import torch

from dist_train.errors import ConfigError

WEIGHTS = "weights.pt"


def save_weights(folder: Path | None, state: dict[str, torch.Tensor]) -> None:
    """Writes the weights by the model's own names; whole or absent. `folder` is None on ranks that do not write."""
    if folder is not None:
        beside = folder / f".{WEIGHTS}.{os.getpid()}"
        torch.save(state, beside)
        beside.replace(folder / WEIGHTS)


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a finished run, on the CPU. Nothing in the file is executed. Raises ConfigError."""
    path = folder / WEIGHTS
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ConfigError(
            f"run.dir: got {folder}, expected the folder of a finished run, with {WEIGHTS} and config.yaml in it"
        ) from None
    except Exception as error:  # torch.load has no error of its own for a damaged file
        raise ConfigError(f"run.dir: got {path}, which is damaged: {str(error).splitlines()[0]}") from error
