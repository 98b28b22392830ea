"""Models larger than a device: meshes, recomputation and a start without a whole copy, together, give the result of one
process."""

import itertools
import math

import pytest
import tensor_cells

from dist_train.tools.agreement import difference

import parity_cells
from workers import run_ranks

TOLERANCE = 1e-5
MESHES = (
    {"replicate": 2, "shard": 4},
    {"replicate": 4, "shard": 2},
    {"shard": 4, "tensor": 2},
    {"replicate": 2, "shard": 2, "tensor": 2},
    {"tensor": 4},
)
NAMES = ("heads", "vit", "mlp")  # a decoder whose heads four ranks may share, a vision transformer, an MLP
# An MLP has no blocks that keep more than what they are called with, and says so.
EVERY = [of for of in itertools.product(NAMES, ("none", "blocks", "selective")) if of[0] != "mlp" or of[1] == "none"]


def check(sizes: dict[str, int], runs: list[tuple[str, str, str]], timeout_s: float = 120) -> None:
    """That runs on a mesh, by the model's name, backend.recompute and backend.start, are those of one process."""
    cells = [tensor_cells.cell(name, sizes, recompute=recompute, start=start) for name, recompute, start in runs]
    found = run_ranks(tensor_cells.run_cells, math.prod(sizes.values()), cells, timeout_s=timeout_s)[0]
    assert not [run for run in found if isinstance(run, str)], found
    alone = {
        name: parity_cells.run_single(tensor_cells.cell(name)) for name in dict.fromkeys(name for name, *_ in runs)
    }
    off = {of: difference(run, alone[of[0]]).worst for of, run in zip(runs, found, strict=True)}
    assert max(off.values()) < TOLERANCE, off


def test_split_layers_are_computed_again():
    check({"shard": 2, "tensor": 2}, [("untied", "blocks", "sharded"), ("decoder", "selective", "whole")])


def test_copies_of_shards_are_computed_again():
    check({"replicate": 2, "shard": 2}, [("vit", "blocks", "sharded"), ("vit", "selective", "whole")])


@pytest.mark.full
@pytest.mark.parametrize("sizes", MESHES, ids=lambda sizes: " ".join(f"{name} {n}" for name, n in sizes.items()))
@pytest.mark.parametrize("start", ["whole", "sharded"])
def test_eight_ranks(sizes: dict[str, int], start: str):
    check(sizes, [(*of, start) for of in EVERY], timeout_s=900)
