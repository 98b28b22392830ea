"""Meshes under fsdp2: copies of the model, shards of it and split layers, in any combination, give what one process
gives."""

import dataclasses
import itertools
import json
import re
from functools import cache
from pathlib import Path

import pytest

from dist_train.backends.mesh import DIMENSIONS, Mesh, problems
from dist_train.backends.mesh import of as mesh_of
from dist_train.ranks.dist import GROUP_TIMEOUT_S, PATIENCE_DAYS
from dist_train.ranks.launcher import Launcher
from dist_train.report.read import read

import mesh_cells
from mesh_cells import ADAMW, Outcome, config, far, grouped, refused, run, run_all, timeouts, with_fault, written
from parity_cells import TOLERANCE
from workers import run_ranks
from zygote import Ended, Run, Zygote

FOUR = [
    {"replicate": 2, "shard": 2}, {"replicate": 4}, {"shard": 2, "tensor": 2}, {"replicate": 2, "tensor": 2},
    {"tensor": 4},
]  # fmt: skip
EIGHT = [
    {"replicate": 2, "shard": 4}, {"replicate": 4, "shard": -1}, {"shard": 4, "tensor": 2},
    {"replicate": 2, "shard": 2, "tensor": 2}, {"shard": 2, "tensor": 4},
]  # fmt: skip


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory):
    """What one process leaves, by optimizer; with micro-batches or without."""

    @cache
    def of(optim: str, groups: bool = False, precision: str = "float32") -> Outcome:
        cell = config(None, getattr(mesh_cells, optim), precision=precision)
        return run(grouped(cell) if groups else cell, tmp_path_factory.mktemp("alone") / "run")

    return of


def agree(meshes: list[dict[str, int]], ranks: int, optim: str, expected: Outcome, folder: Path, **more) -> None:
    """Runs on these meshes leave what one process leaves."""
    groups, precision = more.get("groups", False), more.get("precision", "float32")
    cells = [config(mesh, getattr(mesh_cells, optim), precision=precision) for mesh in meshes]
    runs = [(grouped(cell) if groups else cell, folder / str(i)) for i, cell in enumerate(cells)]
    for mesh, found in zip(meshes, run_ranks(run_all, ranks, runs, timeout_s=400)[0], strict=True):
        distance, name = far(found, expected)
        assert distance < TOLERANCE[precision], (mesh, name, distance)


@pytest.mark.parametrize("optim", ["ADAMW", "MUON"])
def test_the_same_as_in_one_process(optim: str, alone, tmp_path: Path):
    """Weights, norms, clipping, averages, batch statistics, dropout, evaluation and the optimizer's state, in shares
    that differ and are empty."""
    agree(FOUR if optim == "ADAMW" else FOUR[:3], 4, optim, alone(optim), tmp_path)


def test_the_same_with_micro_batches(alone, tmp_path: Path):
    agree([FOUR[0], FOUR[2]], 4, "ADAMW", alone("ADAMW", True), tmp_path, groups=True)


def test_the_same_in_float64(alone, tmp_path: Path):
    agree([FOUR[2]], 4, "MUON", alone("MUON", precision="float64"), tmp_path, precision="float64")


@pytest.mark.parametrize("mesh", [FOUR[2], pytest.param(FOUR[3], marks=pytest.mark.full)])
def test_an_audit_of_split_layers_finds_nothing(mesh: dict[str, int], alone, tmp_path: Path):
    (found,) = run_ranks(run_all, 4, [(config(mesh, audit_every_steps=3), tmp_path)])[0]
    assert found.lines == ["audited 3 steps: something was found in none"]
    assert far(found, alone("ADAMW"))[0] < TOLERANCE["float32"]


@pytest.mark.full
@pytest.mark.parametrize("optim", ["ADAMW", "MUON"])
def test_the_same_on_eight(optim: str, alone, tmp_path: Path):
    agree(EIGHT, 8, optim, alone(optim), tmp_path)
    agree(EIGHT, 8, optim, alone(optim, precision="float64"), tmp_path / "exact", precision="float64")
    agree(EIGHT[2:4], 8, optim, alone(optim, True), tmp_path / "pieces", groups=True)


@pytest.mark.parametrize(
    ("fault", "optim", "mesh"),
    [
        ("counts_copies", "ADAMW", FOUR[0]),
        ("sums_over_peers", "ADAMW", FOUR[2]),
        ("shares_by_rank", "ADAMW", FOUR[2]),
        ("computes_parts", "MUON", FOUR[2]),
    ],
)
def test_planted_faults_are_seen(fault: str, optim: str, mesh: dict[str, int], alone, tmp_path: Path):
    found = run_ranks(with_fault, 4, fault, config(mesh, getattr(mesh_cells, optim)), tmp_path)[0]
    assert far(found, alone(optim))[0] > 100 * TOLERANCE["float32"]


def test_what_computes_with_split_values_is_refused(tmp_path: Path):
    """A scalar that no style names, of which each rank has a part of the gradient alone."""
    cell = config({"shard": 2, "tensor": 2}, model="Inside")
    for line in run_ranks(refused, 4, cell, tmp_path):
        got = (
            r"backend\.mesh\.tensor: got a gradient of temperature with norm \S+ on rank \d, and \S+ on rank \d, though"
        )
        assert re.match(got, line)


@pytest.mark.parametrize("mesh", [FOUR[2], {"tensor": 4}])
def test_an_own_optimizer_is_tried_with_parts_of_columns(mesh: dict[str, int], tmp_path: Path):
    own = dataclasses.replace(ADAMW, name="optim_cells:OfShards", args={}, groups=[], no_decay=False, weight_decay=0.0)
    (line,) = set(run_ranks(refused, 4, config(mesh, own), tmp_path))
    assert "updates parts of a weight otherwise than the whole of it, but fsdp2 has" in line


@pytest.mark.parametrize("mesh", [FOUR[0], FOUR[3]])
def test_what_ranks_have_copies_of_is_written_once(mesh: dict[str, int], tmp_path: Path):
    """And by turns: no rank writes much more than another. Each holds its part alone."""
    held, sizes = zip(*run_ranks(written, 4, mesh, tmp_path / "state"), strict=True)
    whole = 8 * (64 * 64 + 64)
    assert set(held) == {whole // mesh.get("shard", 1)}
    assert sum(sizes) < 1.5 * 4 * whole and max(sizes) < 1.5 * min(sizes)


def test_groups_of_a_mesh_wait_as_long_as_all_ranks():
    for before, meanwhile, after in run_ranks(timeouts, 4, {"shard": 2, "tensor": 2}):
        assert before == meanwhile == {PATIENCE_DAYS * 86400.0} and after == {GROUP_TIMEOUT_S}


# -- the command line --------------------------------------------------------------------------------------------------

ARGV = (
    *("--data.name", "synthetic", "--data.args", "{n: 42, n_test: 9, shape: [1, 6, 6], classes: 5}"),
    *("--model.hidden", "[9, 7]", "--train.global_batch_size", "8", "--train.epochs", "2", "--train.device", "cpu"),
    *("--train.threads", "1", "--track.every_steps", "1", "--backend.name", "fsdp2", "--backend.mesh"),
)
HYBRID, PEERS = "{replicate: 2, shard: 2}", "{shard: 2, tensor: 2}"


@pytest.fixture(scope="module")
def recorded(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """A run on a mesh, with checkpoints."""
    folder = tmp_path_factory.mktemp("mesh") / "run"
    argv = [*ARGV, HYBRID, "--checkpoint.every_steps", "4", "--checkpoint.keep_last", "9", "--run.dir", str(folder)]
    return folder, zygote.run(Run(argv, 4))[0].check()


def test_the_table_of_ranks_and_the_checkpoint_tell_of_the_mesh(recorded: tuple[Path, Ended], zygote: Zygote):
    folder, ended = recorded
    rows = [line.split() for line in ended.out[0].splitlines()]
    at = next(i for i, row in enumerate(rows) if "replicate" in row)
    head = rows[at][rows[at].index("rank", 2) :]
    assert head[:4] == ["rank", *DIMENSIONS]
    places = [row[-len(rows[at + 1]) :] for row in rows[at + 1 : at + 5]]
    found = [" ".join(row) for row in places]
    assert all(f" {r} {r // 2} {r % 2} 0 " in f" {line} " for r, line in enumerate(found)), found
    (shown,) = zygote.run(Run(["inspect", str(folder / "checkpoints" / "step-00000012")]))
    assert "fsdp2 on 4 ranks (replicate 2 x shard 2), " in shown.check().out[0]
    (event,) = read([folder])[0].events
    assert event.facts["mesh"] == "replicate 2 x shard 2"


@pytest.mark.parametrize(
    ("argv", "ranks"), [([], 1), (["--backend.mesh", PEERS], 4), (["--backend.name", "ddp", "--backend.mesh", "{}"], 2)]
)
def test_its_steps_are_taken_again(argv: list[str], ranks: int, recorded: tuple[Path, Ended], zygote: Zygote, tmp_path):
    folder, _ = recorded
    out = ["--json", str(tmp_path / "replay.json")]
    (ended,) = zygote.run(Run(["replay", "--run.dir", str(folder), "--step", "5", *out, *argv], ranks))
    said = ended.check().out[0]
    assert (
        re.search(r"as recorded: at most \S+ off in 1 lines", said) and "step-00000004" in said and "8 samples" in said
    )
    (evaluated,) = zygote.run(Run(["eval", "--run.dir", str(folder), *argv], ranks))
    last = [line for line in (folder / "metrics.jsonl").read_text().splitlines() if "eval/loss" in line][-1]
    assert json.loads(evaluated.check().out[0])["eval/loss"] == pytest.approx(json.loads(last)["eval/loss"], rel=1e-5)


AT = r"\(host .*?\)\)"
NAMED = {
    "hybrid, gradient": (HYBRID, rf"the gradient that rank 1 {AT} computed is wrong, as rank 2 and rank 3 agree on"),
    "peers, gradient": (PEERS, rf"the gradient that rank 1 {AT} computed is wrong, as rank 3 and rank 1 itself, when"),
    "hybrid, weight": (
        HYBRID,
        rf"the weights of rank 1 {AT} and rank 3 {AT} differ, and no copy is that of most: 1 of",
    ),
    "peers, weight": (PEERS, rf"the weights of rank 0 {AT} and rank 1 {AT} differ, and no copy is that of most: 1 of"),
}


@pytest.mark.parametrize("case", NAMED)
def test_an_audit_names_the_ranks(case: str, zygote: Zygote, tmp_path: Path):
    (mesh, line), fault = NAMED[case], f"flips_{case.split(', ')[1]}"
    argv = [*ARGV, mesh, "--train.audit_every_steps", "2", "--run.dir", str(tmp_path / "run")]
    (ended,) = zygote.run(Run(argv, 4, {1: (fault, 4)}, timeout_s=200.0))
    assert set(ended.codes) == {1}, ended
    (said,) = [text for errors in ended.err for text in errors.splitlines() if "audit of step" in text]
    assert re.match(f"dist_train: audit of step 4: {line}", said), said


# -- the layout, and what is refused -----------------------------------------------------------------------------------


def test_ranks_are_laid_out_with_the_tensor_dimension_innermost():
    mesh = Mesh(2, 3, 2)
    places = [mesh.place(rank) for rank in range(12)]
    assert places == list(itertools.product(range(2), range(3), range(2)))
    for rank, place in enumerate(places):
        for dims in itertools.chain.from_iterable(itertools.combinations(DIMENSIONS, n) for n in range(4)):
            others = [i for i, name in enumerate(DIMENSIONS) if name not in dims]
            expected = [other for other in range(12) if all(places[other][i] == place[i] for i in others)]
            assert list(mesh.alike(rank, dims)) == expected


@pytest.mark.parametrize(
    ("given", "sizes"),
    [({}, (1, 8, 1)), ({"tensor": 2, "shard": -1}, (1, 4, 2)), ({"replicate": -1, "shard": 4}, (2, 4, 1))],
)
def test_what_is_left(given: dict[str, int], sizes: tuple[int, ...]):
    assert mesh_of(config(given, backend="fsdp2"), 8).sizes == sizes


REFUSED = {
    "backend.mesh: got {shard: 2}, but backend ddp does not have it": ({"shard": 2}, "ddp", 8),
    "backend.mesh: got unknown key 'sharded', expected one of replicate, shard, tensor": ({"sharded": 2}, "fsdp2", 8),
    "backend.mesh.tensor: got 0, expected 1 or more": ({"tensor": 0}, "fsdp2", 8),
    "backend.mesh: got -1 for replicate and shard": ({"replicate": -1, "shard": -1}, "fsdp2", 8),
    "backend.mesh: got {replicate: 3, shard: -1} on 8 ranks": ({"replicate": 3, "shard": -1}, "fsdp2", 8),
    "backend.mesh: got {replicate: 2} on 8 ranks, expected sizes with that product, such as {replicate: 8}": (
        {"replicate": 2}, "fsdp2", 8,
    ),
    "backend.mesh.tensor: got 4 with 6 ranks on a node, expected ranks of one node": (
        {"shard": -1, "tensor": 4}, "fsdp2", 6,
    ),
}  # fmt: skip


@pytest.mark.parametrize("line", REFUSED)
def test_refused_by_name(line: str):
    given, backend, local = REFUSED[line]
    launcher = Launcher("torchrun", 0, 2 * local if local == 6 else 8, 0, local)
    found = list(problems(config(given, backend=backend), backend, launcher))
    assert [text for text in found if text.startswith(line)], found
