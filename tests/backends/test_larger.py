"""Models larger than a device: meshes, recomputation and a start without a whole copy, together, give the result of one
process."""

import itertools
import json
import math
from pathlib import Path

import pytest
import tensor_cells

from dist_train.tools.agreement import difference

import parity_cells
from language_models import LINES
from workers import run_ranks
from zygote import Run, Zygote

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


def test_a_run_starts_without_a_whole_copy_on_a_mesh(zygote: Zygote, tmp_path: Path):
    """What the task keeps of the first look, at a model without values, is not used afterwards."""
    (tmp_path / "corpus.txt").write_text(LINES * 20)
    told = ["--data.name=text", f"--data.root={tmp_path}", "--data.args={files: corpus.txt, block: 16}"]
    told += ["--model.name=decoder", "--model.args={layers: 2, width: 16, heads: 4, mlp_width: 24}"]
    told += ["--task.name=language_modelling", "--train.max_steps=3", "--train.global_batch_size=6"]
    told += ["--train.device=cpu", "--train.threads=1"]
    sharded = ["--backend.name=fsdp2", "--backend.mesh={shard: 2, tensor: 2}", "--backend.start=sharded"]
    found = []
    for name, more, ranks in (("alone", [], 1), ("mesh", [*sharded, "--backend.recompute=blocks"], 4)):
        (ended,) = zygote.run(Run([*told, *more, f"--run.dir={tmp_path / name}"], ranks))
        assert "built whole" not in ended.check().out[0]
        found.append(json.loads((tmp_path / name / "summary.json").read_text())["eval/loss"])
    assert found[1] == pytest.approx(found[0], rel=1e-5)
