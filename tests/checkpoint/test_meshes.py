"""One checkpoint for all meshes: a run goes on under any backend, on any mesh of ranks, from what another has saved."""

import dataclasses
import shutil
from pathlib import Path

import pytest

from mesh_cells import Outcome, config, far, run, run_all
from parity_cells import TOLERANCE
from workers import run_ranks

# Backend, mesh and ranks; 0 is one process without a group.
PLACES = {
    "single": ("single", {}, 0),
    "hybrid": ("fsdp2", {"replicate": 2, "shard": 2}, 4),
    "ddp": ("ddp", {}, 4),
    "shard x tensor": ("fsdp2", {"shard": 2, "tensor": 2}, 4),
    "ZeRO 3": ("deepspeed:3", {}, 2),
    "tensor": ("fsdp2", {"tensor": 2}, 2),
    "ZeRO 1": ("deepspeed:1", {}, 3),
    "replicate x tensor": ("fsdp2", {"replicate": 2, "tensor": 2}, 4),
    "fsdp2": ("fsdp2", {}, 4),
    "ZeRO 2": ("deepspeed:2", {}, 2),
}
CHAIN = ("single", "hybrid", "ZeRO 3", "shard x tensor", "ddp", "tensor", "ZeRO 1", "replicate x tensor", "fsdp2")
CUT = 5  # in the middle of an epoch


def at(place: str, *runs: tuple) -> list[Outcome]:
    """What runs at a place leave on rank 0: each with a folder, what it is cut off after, and more of its config."""
    backend, mesh, ranks = PLACES[place]
    cells = [(config(mesh, backend=backend, **more), folder, cut, cp) for folder, cut, more, cp in map(_filled, runs)]
    return run_ranks(run_all, ranks, cells, timeout_s=400)[0] if ranks else run_all(cells)


def _filled(given: tuple) -> tuple:
    return given + (None, {}, {})[len(given) - 1 :]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return run(config(), tmp_path_factory.mktemp("undisturbed"))


def test_a_run_moves_from_mesh_to_mesh(undisturbed: Outcome, tmp_path: Path):
    for steps, place in enumerate(CHAIN, 1):
        (end,) = at(place, (tmp_path / "run", steps if place != CHAIN[-1] else None))
        assert not end.lines
    assert [line["step"] for line in end.metrics if "train/loss" in line] == list(range(1, 10))
    distance, name = far(end, undisturbed)
    assert distance < TOLERANCE["float32"], (name, distance)


@pytest.mark.parametrize("place", ["hybrid", "shard x tensor", pytest.param("tensor", marks=pytest.mark.full)])
def test_the_same_bits_on_the_same_mesh(place: str, tmp_path: Path):
    """Saved while training goes on."""
    beside = {"asynchronous": True}
    runs = [(tmp_path / name, cut, {}, beside) for name, cut in (("alone", None), ("cut", CUT), ("cut", None))]
    alone, _, resumed = at(place, *runs)
    assert far(resumed, alone)[0] == 0 and resumed.metrics == alone.metrics


def test_what_torch_draws_is_the_same_on_tensor_peers_after_a_move(tmp_path: Path):
    """As many ranks, but others share samples out: their random states are not those of the checkpoint. Ranks that
    drew otherwise would be told in the first step, where gradients are compared."""
    drawn = {"draws": "torch"}
    at("fsdp2", (tmp_path / "run", CUT, drawn))
    (end,) = at("shard x tensor", (tmp_path / "run", None, drawn))
    assert len([line for line in end.metrics if "train/loss" in line]) == 9


@pytest.mark.full
@pytest.mark.parametrize("source", PLACES)
def test_from_anywhere_to_anywhere(source: str, undisturbed: Outcome, tmp_path: Path):
    at(source, (tmp_path / "saved", CUT))
    for place in PLACES:
        shutil.copytree(tmp_path / "saved", tmp_path / place)
        (end,) = at(place, (tmp_path / place, None))
        distance, name = far(used(end), used(undisturbed))
        assert distance < TOLERANCE["float32"], (place, name, distance)


def used(outcome: Outcome) -> Outcome:
    """Without averages of what no step uses, which ZeRO does not keep."""
    state = {name: value for name, value in outcome.state.items() if not name.startswith("ema.unused.")}
    return dataclasses.replace(outcome, state=state)
