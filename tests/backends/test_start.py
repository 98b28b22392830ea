"""fsdp2 without a whole copy of the model on any rank: the same weights, in the memory of a rank's part of them."""

import dataclasses
from functools import cache
from pathlib import Path

import pytest
import token_cells
import torch
from start_cells import hashes, memory_of, off_by_one, several, weights_of
from token_cells import config as token_config
from torch import nn

from dist_train.backends.start import Start
from dist_train.checkpoint import manifest
from dist_train.config.load import load
from dist_train.config.tree import BackendConfig, Config
from dist_train.errors import ConfigError
from dist_train.models.deferred import record
from dist_train.ranks.launcher import Launcher
from dist_train.run import assemble
from dist_train.run.check import check

import zoo_cells
from parity_cells import ALONE, TOLERANCE
from resume_cells import run_once, run_series, saving
from workers import PARENT, Workers, run_ranks
from zygote import Run

pytestmark = pytest.mark.filterwarnings("ignore")  # of what is deprecated in libraries

SHARDED = BackendConfig(name="fsdp2", start="sharded")
KINDS = ("Tied", "Scalars", "ChannelsLast", "Complex", "Empty", "Buffers", "BatchNorm2d", "Lazy")


def sharded(cell: Config, **more) -> Config:
    return dataclasses.replace(cell, backend=dataclasses.replace(SHARDED, **more))


def decoder(tied: bool = True, **args) -> Config:
    cell = token_config(tied=tied)
    return dataclasses.replace(cell, model=dataclasses.replace(cell.model, args=cell.model.args | args))


CELLS = {"decoder": decoder(), "untied": decoder(False)} | {kind: zoo_cells.config(kind) for kind in KINDS}


@cache
def expected(name: str) -> dict[str, str]:
    """Hashes of the whole model in one process."""
    model = assemble.build(CELLS[name], ALONE.device).model
    return hashes(dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers()]))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_same_weights_on_any_number_of_ranks(ranks: int):
    names = [*CELLS] if ranks == 3 else ["decoder", "Tied", "Scalars"]
    cells = [(sharded(CELLS[name]), None) for name in names]
    cells.append((sharded(CELLS["decoder"], offload=True), None))
    names.append("decoder")
    for by_rank in run_ranks(several, ranks, cells):
        for name, (found, said, starts_sharded) in zip(names, by_rank, strict=True):
            assert starts_sharded and found == expected(name), (name, said)


def test_a_planted_fault_is_caught():
    assert run_ranks(off_by_one, 2, sharded(CELLS["decoder"]))[0] != expected("decoder")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With weights of a decoder in several forms: in 1/ those of another seed, in 2/ the checkpoint of a run."""
    place = tmp_path_factory.mktemp("start")
    other = decoder()
    other = dataclasses.replace(other, train=dataclasses.replace(other.train, seed=5))
    weights = assemble.build(other, ALONE.device).model.state_dict()
    torch.save(weights, place / "all.pt")
    torch.save({name: value for name, value in weights.items() if "layers.1" not in name}, place / "some.pt")
    from safetensors.torch import save_file

    save_file({name: value.half() for name, value in weights.items()}, place / "half.safetensors")
    run_once(saving(decoder(), place / "run", every_steps=4), cut_after=4)
    return place


def of(path: Path, cell: Config) -> Config:
    return dataclasses.replace(cell, model=dataclasses.replace(cell.model, init_from=str(path)))


def test_weights_from_files_and_checkpoints(place: Path):
    cells = [of(place / name, decoder()) for name in ("all.pt", "some.pt", "half.safetensors", "run")]
    whole = [weights_of(cell) for cell in cells]
    (folder, _), *_ = manifest.listed(place / "run")[0]
    both = [(sharded(cell), None) for cell in cells] + [(sharded(decoder()), folder)]
    assert len({tuple(found.items()) for found, _, _ in whole}) == 4
    for by_rank in run_ranks(several, 2, both):
        for (found, said, starts_sharded), (bits, lines, _) in zip(by_rank, [*whole, whole[-1]], strict=True):
            assert starts_sharded and found == bits and (said == lines or not said)


def in_new_processes(*call) -> list:
    """See run_ranks: by two ranks that hold nothing of before."""
    workers = Workers(2)
    try:
        return workers.run(call[0], call[1:], timeout_s=120)
    finally:
        workers.close()


LARGE = decoder(layers=8, width=128, mlp_width=512)


@pytest.mark.parametrize("source", ["fresh", "file", "checkpoint"])
def test_the_memory_of_a_rank(source: str, tmp_path: Path):
    """Its part and about two layers, whatever the weights come from."""
    cell, folder, mapped, model = LARGE, None, None, assemble.build(LARGE, ALONE.device).model
    layer = sum(p.nbytes for p in model.model.layers[0].parameters())
    if source == "file":
        torch.save(model.state_dict(), tmp_path / "all.pt")
        cell, mapped = of(tmp_path / "all.pt", LARGE), (tmp_path / "all.pt").stat().st_size
    elif source == "checkpoint":
        run_once(saving(LARGE, tmp_path / "run", every_steps=1), cut_after=1)
        (folder, _), *_ = manifest.listed(tmp_path / "run")[0]
    for peak, part, whole in in_new_processes(memory_of, sharded(cell), folder, mapped):
        assert whole > 6 * layer and part <= 0.51 * whole
        assert part < peak <= part + 2 * layer, (peak, part, layer, whole)
    if source == "fresh":
        unsharded = dataclasses.replace(cell, backend=BackendConfig(name="fsdp2"))
        (peak, part, whole), _ = in_new_processes(memory_of, unsharded)
        assert peak > whole + part / 2, "a start with a whole copy is not seen"


def test_a_decoder_trains_as_in_one_process_and_is_resumed(tmp_path: Path):
    alone = token_cells.run_cells([decoder()])[0]
    cell = saving(sharded(decoder()), tmp_path / "run", every_steps=4)
    cut = dataclasses.replace(cell, run=dataclasses.replace(cell.run, dir=str(tmp_path / "cut")))
    whole, _, resumed = run_ranks(run_series, 2, [(cell, None), (cut, 5), (cut, None)])[0]
    for name, value in alone.weights.items():
        scale = max(1.0, abs(value).max())
        assert abs(whole.weights[name] - value).max() < TOLERANCE["float32"] * scale, name
    assert all((whole.weights[name] == resumed.weights[name]).all() for name in whole.weights)


def test_a_model_that_cannot_be_started_so_is_built_whole_and_that_is_said(tmp_path: Path):
    argv = [
        "--backend.name",
        "fsdp2",
        "--backend.start",
        "sharded",
        "--data.name",
        "synthetic",
        "--train.max_steps",
        "2",
    ]
    argv += ["--train.device", "cpu", "--data.args", "{n: 28, n_test: 5, shape: [2, 4, 4], classes: 3}"]
    for kind in ("Counts", "Kind"):
        argv += ["--run.dir", str(tmp_path / kind), "--model.name", f"zoo:{kind}"]
        done = PARENT.run(Run(argv, 2))[0].check()
        line = "model: it is built whole on every rank before it is sharded (backend.start): its forward does not run"
        assert (line in done.out[0]) is (kind == "Counts")


def test_a_part_is_filled_by_itself():
    """As where each part of a model has an optimizer of its own."""

    def make() -> nn.Module:
        torch.default_generator.manual_seed(0)
        return nn.ModuleDict({"one": nn.Linear(3, 3), "two": nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))})

    whole, (model, later) = make(), record(make)
    start, cpu = Start(later), torch.device("cpu")
    start.settle(cpu)
    kept = list(model["two"].parameters())
    start.fill(model["two"], cpu)
    assert all(p.is_meta for p in model["one"].parameters())
    assert hashes(model["two"].state_dict()) == hashes(whole["two"].state_dict())
    assert all(a is b for a, b in zip(kept, model["two"].parameters(), strict=True))


def test_it_is_for_fsdp2():
    config = load(["--backend.start", "sharded", "--backend.name", "ddp"])
    launcher = Launcher("torchrun", 0, 2, 0, 2)
    with pytest.raises(ConfigError, match=r"^backend.start: got sharded, but backend ddp takes a whole model"):
        check(config, launcher)


def test_small_models_are_built_whole_unless_it_is_asked_for():
    cell = dataclasses.replace(CELLS["decoder"], backend=BackendConfig(name="fsdp2"))
    assert assemble.build(cell, ALONE.device, defers=True).start is None
