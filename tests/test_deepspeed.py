"""Models that DeepSpeed's flat buffers and shards would get wrong: the same as one process, or refused by name."""

import dataclasses
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dist_train import assemble, backends, optim
from dist_train.backends.deepspeed import engine_config
from dist_train.backends.fit import check_model
from dist_train.backends.probe import Findings
from dist_train.config import Config, ModelConfig, OptimConfig
from dist_train.dist import World
from dist_train.errors import ConfigError
from dist_train.tools.trajectory import Trajectory, difference

from parity_cells import ALONE, TOLERANCE, config, run_cells, run_single, this_world
from ranks import RankError, run_ranks
from resume_cells import run_series, saving

STAGES = (0, 1, 2, 3)
MODELS = (
    *("Frozen", "PartlyFrozen", "TiedFrozen", "Tied", "Unused", "Odd", "Shapes", "Tiny", "ChannelsLast", "Normed"),
    *("Empty", "Checkpointed", "NormedByHook"),
)
REFUSED = {(3, "Empty")}


def cell(model: str, backend: str = "single", steps: int = 5, micro: int | None = None, **args) -> Config:
    """A few steps with strong decay, so that a weight which is decayed and should not be is seen."""
    made = config(backend, micro_batch_size=micro)
    decaying = OptimConfig(name="AdamW", lr=0.01, weight_decay=0.5)
    return dataclasses.replace(
        made,
        model=ModelConfig(name=f"zero_models:{model}", args=args),
        optim=decaying,
        train=dataclasses.replace(made.train, max_steps=steps),
    )


@cache
def alone(model: str) -> Trajectory:
    return run_single(cell(model))


@pytest.mark.parametrize(("stage", "ranks"), [*((stage, 2) for stage in STAGES), (2, 4), (3, 4)])
def test_the_same_as_single(stage: int, ranks: int):
    names = [name for name in MODELS if (stage, name) not in REFUSED]
    runs = run_ranks(run_cells, ranks, [cell(name, f"deepspeed:{stage}") for name in names], timeout_s=240)[0]
    worst = {name: difference(run, alone(name)).worst for name, run in zip(names, runs, strict=True)}
    assert all(value < TOLERANCE["float32"] for value in worst.values()), worst
