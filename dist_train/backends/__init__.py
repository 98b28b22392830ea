"""Backends by name. A row names a class that fulfils `base.Backend`; its module, and with it the library that
it needs, is imported when it is chosen. To add one: write the class in a file here and add its row; what it asks of
the config stands in `rules.py`."""

from typing import TYPE_CHECKING

from dist_train.config.lookup import load

if TYPE_CHECKING:
    from dist_train.backends.base import Backend
    from dist_train.backends.probe import Findings
    from dist_train.backends.start import Start
    from dist_train.config.tree import Config
    from dist_train.ranks.dist import World

BACKENDS = {
    "single": "dist_train.backends.single:Single",
    "ddp": "dist_train.backends.ddp:DDP",
    "fsdp2": "dist_train.backends.fsdp2:FSDP2",
    "accelerate": "dist_train.backends.accelerate:Accelerate",
    "deepspeed": "dist_train.backends.deepspeed:DeepSpeed",
}

# The package that a backend needs beside torch; our extra has the same name.
LIBRARIES = {"accelerate": "accelerate", "deepspeed": "deepspeed"}

# What `backend.name: auto` takes under each starter (the names are those of launcher.STARTERS).
AUTO = {
    "none": "single",
    "torchrun": "ddp",
    "env": "ddp",
    "srun": "ddp",
    "mpirun": "ddp",
    "mpiexec": "ddp",
    "accelerate": "accelerate",
    "deepspeed": "deepspeed",
}


def chosen(name: str, starter: str) -> str:
    """The backend's name, with `auto` settled by who started the process."""
    return AUTO[starter] if name == "auto" else name


def create(
    config: "Config", world: "World", findings: "Findings | None" = None, start: "Start | None" = None
) -> "Backend":
    """The backend of a run, in a process whose group has started.

    Args:
        config: of the run.
        world: this rank's place.
        findings: what a first forward and backward of the model showed; None where nothing is trained.
        start: gives the model its weights once it is sharded; None where it has them.

    Raises:
        ConfigError: this model cannot be trained under it.
    """
    # Here, as they import torch, and the names above are wanted before it.
    from dist_train.backends import fit, probe

    name = chosen(config.backend.name, world.launcher)
    findings = findings or probe.NOTHING
    fit.check_model(name, findings)
    fit.check_sparse(config, name, world.device, findings)
    backend = load(BACKENDS, name, "backend.name")(config, world, findings)
    backend.start = start
    return backend
