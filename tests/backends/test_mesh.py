"""Meshes under fsdp2: copies of the model, shards of it and split layers, in any combination, give what one process
gives."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest

import mesh_cells
from mesh_cells import Outcome, config, run, run_all
from workers import run_ranks

FOUR = [
    {"replicate": 2, "shard": 2}, {"replicate": 4}, {"shard": 2, "tensor": 2}, {"replicate": 2, "tensor": 2},
    {"tensor": 4},
]  # fmt: skip
EIGHT = [
    {"replicate": 2, "shard": 4}, {"replicate": 4, "shard": -1}, {"shard": 4, "tensor": 2},
    {"replicate": 2, "shard": 2, "tensor": 2}, {"shard": 2, "tensor": 4},
]  # fmt: skip


def distance(found: Outcome, expected: Outcome) -> float:
    """The largest relative difference of a tensor that is saved or left, of a loss, norm or metric; infinite where one
    has what the other has not."""
    tensors = [
        ({k: v for k, v in one.state.items() if not k.startswith("random.")}, one.left) for one in (found, expected)
    ]
    far = 0.0
    for mine, other in zip(*tensors, strict=True):
        if mine.keys() != other.keys():
            return float("inf")
        far = max(far, *(np.linalg.norm(mine[k] - other[k]) / (np.linalg.norm(other[k]) + 1e-30) for k in other), 0.0)
    for mine, other in zip(found.metrics, expected.metrics, strict=True):
        assert mine.keys() == other.keys()
        far = max(
            far,
            *(
                abs(mine[k] - other[k]) / (abs(other[k]) + 1e-30)
                for k in other
                if k.startswith(("train/loss", "train/grad_norm", "eval/"))
            ),
            0.0,
        )
    return far


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory):
    """What one process leaves, by optimizer and precision."""

    @cache
    def of(optim: str, precision: str) -> Outcome:
        cell = config(None, getattr(mesh_cells, optim), precision=precision)
        return run(cell, tmp_path_factory.mktemp("alone") / "run")

    return of


@pytest.mark.parametrize("optim", ["ADAMW", "MUON"])
def test_the_same_as_in_one_process(optim: str, alone, tmp_path: Path):
    import time

    for i, mesh in enumerate(FOUR):
        t = time.time()
        (found,) = run_ranks(run_all, 4, [(config(mesh, getattr(mesh_cells, optim)), tmp_path / str(i))])[0]
        print(mesh, distance(found, alone(optim, "float32")), time.time() - t)
