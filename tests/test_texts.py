"""The promise for language models, on real text: packed and ragged documents, dropout, a loss of tokens, Muon, averaged
weights, clipping and accumulation all at once; the same under every backend, and after kills."""

import dataclasses
import re
import signal
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from text_cells import BLOCK, MIXED, config, evaluate, run_cells, run_packed_by_rank, write_corpus

from dist_train.backends.rules import STAGES
from dist_train.checkpoint import manifest
from dist_train.config.load import dump
from dist_train.config.tree import CheckpointConfig, RunConfig
from dist_train.tools.agreement import Trajectory, difference

from parity_cells import TOLERANCE, run_single
from user_runs import ALONE, STEPS, Place, numbers, trajectory
from workers import run_ranks
from zygote import LIBRARIES, Run, Zygote

# Backend, ranks, accumulation.
FEW = [("ddp", 3, 4), ("fsdp2", 2, 2), ("accelerate", 2, 1), ("deepspeed:3", 2, 4)]
PLACES = [("ddp", 2), ("ddp", 3), ("ddp", 4), ("fsdp2", 2), ("fsdp2", 4), ("accelerate", 2)]
PLACES += [(f"deepspeed:{stage}", 2) for stage in STAGES]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


def alike(found: Trajectory, wanted: Trajectory, tolerance: float) -> None:
    assert difference(found, wanted).worst < tolerance
    assert found.evaluation == pytest.approx(wanted.evaluation, rel=tolerance)


@pytest.fixture(scope="module")
def single(root: Path):
    """A function from steps and precision to what one process gets, without micro-batches."""
    return cache(lambda *of: run_single(config(root, "single", 1, 1, *of)))


@pytest.mark.parametrize(("backend", "ranks", "accumulation"), FEW)
def test_parity(backend: str, ranks: int, accumulation: int, root: Path, single):
    found = run_ranks(run_cells, ranks, [config(root, backend, ranks, accumulation)])[0]
    alike(found[0], single(24, "float32"), TOLERANCE["float32"])


@pytest.mark.full
@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize(("backend", "ranks"), PLACES)
def test_parity_of_200_steps(backend: str, ranks: int, accumulation: int, root: Path, single):
    for precision in ("float32", "float64") if not backend.startswith("deepspeed") else ("float32",):
        cell = config(root, backend, ranks, accumulation, 200, precision)
        (found,) = run_ranks(run_cells, ranks, [cell], timeout_s=600)[0]
        alike(found, single(200, precision), TOLERANCE[precision])


def test_packing_by_rank_is_seen(root: Path, single):
    (found,) = run_ranks(run_packed_by_rank, 2, config(root, "ddp", 2))[0]
    assert difference(found, single(24, "float32")).loss > 1e-3


# -- evaluation --------------------------------------------------------------------------------------------------------


def test_evaluation_is_exact_on_ranks_that_share_nothing_evenly(root: Path):
    """7 windows of 1 to 25 targets; and those of two sources."""
    few = {"test_files": "few.jsonl", "packing": "padded"}
    cells = [config(root, precision=precision, **few) for precision in TOLERANCE]
    cells.append(config(root, precision="float64", sources=MIXED))
    wanted = evaluate(cells)
    assert wanted[0].keys() == {"eval/loss", "eval/perplexity", "eval/bits_per_byte"}
    for ranks in (2, 3):
        for found, expected, rel in zip(run_ranks(evaluate, ranks, cells)[0], wanted, (1e-6, 1e-9, 1e-9), strict=True):
            assert found == pytest.approx(expected, rel=rel)
        averaged = run_ranks(evaluate, ranks, cells[1:2], "metrics_by_rank")[0][0]  # a fault
        assert averaged["eval/loss"] != pytest.approx(wanted[1]["eval/loss"], rel=1e-5)


# -- killed, and gone on elsewhere -------------------------------------------------------------------------------------

CHAINS = (
    (Place("ddp", 3), Place("fsdp2", 2), Place("deepspeed:2", 2), ALONE),
    (ALONE, Place("deepspeed:3", 2), Place("accelerate", 3), Place("fsdp2", 4)),
    (Place("accelerate", 2), Place("deepspeed:1", 3), Place("ddp", 4), Place("fsdp2", 3)),
    (Place("deepspeed:0", 2), ALONE, Place("fsdp2", 3), Place("deepspeed:3", 3)),
)


def started(root: Path, place: Place, folder: Path, plants: dict | None = None, hooks: tuple[str, ...] = ()) -> Run:
    """A run of a mixture of two sources, packed, that begins in the folder or goes on."""
    cell = config(root, place.backend, place.ranks, 2, STEPS, sources=MIXED)
    cell = dataclasses.replace(
        cell,
        run=RunConfig(str(folder)),
        train=dataclasses.replace(cell.train, hooks=list(hooks)),
        checkpoint=CheckpointConfig(every_steps=2),
    )
    file = folder.with_suffix(".yaml")
    file.write_text(dump(cell))
    return Run(["--config", str(file)], place.ranks, plants, kill_all=True, launched=place != ALONE, timeout_s=120)


@pytest.fixture(scope="module")
def runs():
    """The process that these runs are forked from."""
    process = Zygote(*LIBRARIES, "dist_train.tasks.language_modelling", "dist_train.models.decoder")
    yield process
    process.close()


@pytest.fixture(scope="module")
def undisturbed(runs: Zygote, root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trajectory, dict]:
    """One process's run, its folder first, and the weights that it starts from."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    runs.run(started(root, ALONE, folder, hooks=("user_hooks:Start",)))[0].check()
    start = numbers(folder / "start.pt")
    return folder, trajectory(folder, start), start


@pytest.mark.parametrize("chain", [CHAINS[0], *(pytest.param(chain, marks=pytest.mark.full) for chain in CHAINS[1:])])
def test_killed_three_times_and_gone_on_elsewhere(
    chain: tuple[Place, ...], runs: Zygote, root: Path, undisturbed: tuple[Path, Trajectory, dict], tmp_path: Path
):
    draw, folder = np.random.default_rng(CHAINS.index(chain)), tmp_path / "run"
    for i, place in enumerate(chain[:-1]):
        at, rank = int(draw.integers(5 * i + 4, 5 * i + 8)), int(draw.integers(place.ranks))
        plant = {rank: ("at_phase", "data", at, "kill")}
        (ended,) = runs.run(started(root, place, folder, plant))
        assert ended.codes[rank] == -signal.SIGKILL and 0 not in ended.codes, ended
        newest = max((m for _, m in manifest.listed(folder)[0]), key=lambda m: m.step)
        assert at - 4 < newest.step <= at and newest.backend == place.backend
    (ended,) = runs.run(started(root, chain[-1], folder))
    assert f"step {newest.step}, written by {newest.backend}" in ended.check().out[0]
    _, reference, start = undisturbed
    alike(trajectory(folder, start), reference, TOLERANCE["float32"])


def test_a_step_that_is_replayed_shows_its_text(runs: Zygote, undisturbed: tuple[Path, Trajectory, dict]):
    argv = ["replay", "--run.dir", str(undisturbed[0]), "--step", "17", "--samples", "2"]
    said = runs.run(Run(argv))[0].check().out[0]
    counted, worst = re.search(r"step 17: loss .*, 13 samples, (\d+) tokens\nsample .*\n\d+ +(.+)\n", said).groups()
    assert 13 * BLOCK * 0.8 < int(counted) <= 13 * BLOCK
    assert re.match(r"[\d.]+ +source [01], sample \d+, document \d+, tokens \d+ to \d+: '.", worst)
    assert "input_ids" not in worst and "as recorded" in said
