"""The configs of the parity matrix, and what the workers run: apart from the tests, so that both can import it."""

import dataclasses
from functools import cache

import torch
import torch.distributed as torch_dist

from dist_train.backends import mesh
from dist_train.config.tree import BackendConfig, Config, DataConfig, ModelConfig, OptimConfig, TrackConfig, TrainConfig
from dist_train.ranks import dist
from dist_train.ranks.dist import World
from dist_train.tools.agreement import Trajectory
from dist_train.tools.trajectory import trajectory

TOLERANCE = {"float32": 1e-5, "float64": 1e-9}
STEPS = 24
BACKENDS = ("ddp", "fsdp2", "accelerate", "deepspeed:0", "deepspeed:1", "deepspeed:2", "deepspeed:3")
# Small enough that training does not amplify the last bit.
OPTIMIZERS = {
    "SGD": OptimConfig(name="SGD", lr=0.003, momentum=0.9),
    "AdamW": OptimConfig(name="AdamW", lr=1e-3),
    "linear": OptimConfig(name="SGD", lr=0.003, momentum=0.9, schedule="linear", warmup_steps=3),
}


def config(
    backend: str = "single",
    optimizer: str = "SGD",
    micro_batch_size: int | None = None,
    clips: bool = False,
    precision: str = "float32",
) -> Config:
    """Three steps an epoch, the last with 3 samples: ragged, and with empty shares on 4 ranks."""
    name, _, stage = backend.partition(":")
    return Config(
        data=DataConfig(name="synthetic", args={"n": 131, "n_test": 101, "shape": (1, 6, 6), "noise": 0.7}),
        # One weight above the 100,000 elements below which ZeRO 3 leaves a weight whole.
        # No kink, at which rounding would decide whether a unit is on: a constant tolerance holds on every processor.
        model=ModelConfig(hidden=[320, 320] if name == "deepspeed" else [50, 30], activation="Tanh"),
        optim=OPTIMIZERS[optimizer],
        train=TrainConfig(
            epochs=STEPS,
            max_steps=STEPS,
            global_batch_size=64,
            micro_batch_size=micro_batch_size,
            grad_clip=0.2 if clips else None,  # below every norm that is seen
            precision=precision,
            device="cpu",
            eval_every_epochs=None,
        ),
        backend=BackendConfig(name=name, zero_stage=int(stage) if stage else None),
        track=TrackConfig(every_steps=1),
    )


ALONE = World(0, 1, 0, 1, torch.device("cpu"), "none")


def this_world() -> World:
    """The worker's place; that of a process alone without a group."""
    if not torch_dist.is_initialized():
        return ALONE
    rank, size = torch_dist.get_rank(), torch_dist.get_world_size()
    return World(rank, size, rank, size, torch.device("cpu"), "torchrun")


@cache
def data_group(tensor: int) -> torch_dist.ProcessGroup | None:
    """In a worker: see dist.data_group."""
    return dist.data_group(dataclasses.replace(this_world(), tensor=tensor))


def world_of(config: Config) -> World:
    """In a worker: its place on the config's mesh, as a run that joins takes it."""
    world = this_world()
    tensor = mesh.of(config, world.size).tensor
    if torch_dist.is_initialized():
        dist._data = data_group(tensor)
    return dataclasses.replace(world, tensor=tensor)


def run_cells(cells: list[Config]) -> list[Trajectory]:
    """In a worker: each config's run."""
    return [trajectory(cell, world_of(cell)) for cell in cells]


def run_single(cell: Config) -> Trajectory:
    """The same run in one process without a group."""
    return trajectory(cell, ALONE)
