"""Activations that are computed again give the same bits under every backend, and less of them is kept."""

import contextlib
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from recompute_cells import KINDS, MODELS, again, decoder, kept_bytes, normed, run_cells, small, transformer

from dist_train.backends import recompute
from dist_train.config.load import load
from dist_train.config.tree import Config
from dist_train.errors import ConfigError
from dist_train.models.draw_places import Now
from dist_train.ranks.launcher import Launcher
from dist_train.run import assemble
from dist_train.run.check import check
from dist_train.tools.agreement import Trajectory, difference
from dist_train.tools.trajectory import trajectory

from parity_cells import ALONE, BACKENDS
from workers import run_ranks
from zygote import Run, Zygote


def same(one: Trajectory, other: Trajectory) -> bool:
    """All bits of losses, gradient norms, weights by name, and buffers."""
    assert len(one.losses) == len(other.losses) > 1
    assert one.weights.keys() == other.weights.keys() and one.buffers.keys() == other.buffers.keys()
    for mine, theirs in (one.weights, other.weights), (one.buffers, other.buffers):
        if not all(np.array_equal(mine[name], theirs[name]) for name in mine):
            return False
    return one.losses == other.losses and one.grad_norms == other.grad_norms


def runs(cells: list[Config], ranks: int = 2) -> list[Trajectory]:
    if cells[0].backend.name == "single":
        return [trajectory(cell, ALONE) for cell in cells]
    return run_ranks(run_cells, ranks, cells, timeout_s=400)[0]


def differing(cell: Config, kinds: tuple = KINDS[1:], mode: str = "off") -> list[str]:
    """Those kinds that do not give the bits of none."""
    first, *others = runs([again(cell, kind, mode) for kind in ("none", *kinds)])
    assert first.losses[0] != first.losses[-1]
    return [str(kind) for kind, other in zip(kinds, others, strict=True) if not same(first, other)]


EVERY_DAY = [("single", name) for name in MODELS]
EVERY_DAY += [("ddp", "normed"), ("fsdp2", "decoder"), ("fsdp2", "normed"), ("deepspeed:3", "in place")]
EVERY_DAY += [("deepspeed:3", "decoder"), ("deepspeed:3", "normed")]
REST = [(backend, name) for backend in BACKENDS for name in MODELS if (backend, name) not in EVERY_DAY]


@pytest.mark.parametrize(("backend", "model"), [*EVERY_DAY, *(pytest.param(*c, marks=pytest.mark.full) for c in REST)])
def test_the_same_bits(backend: str, model: str):
    assert differing(MODELS[model](backend)) == []


@pytest.mark.parametrize("backend", ["single", *(pytest.param(b, marks=pytest.mark.full) for b in BACKENDS)])
def test_statistics_of_groups(backend: str):
    assert differing(normed(backend, group=4)) == []


@pytest.mark.parametrize("backend", ["single", *(pytest.param(b, marks=pytest.mark.full) for b in BACKENDS)])
def test_draws_of_torchs_own(backend: str):
    """Its generator stands, when a block is computed again, where it stood."""
    assert differing(decoder(backend, draws="torch")) == []
    assert differing(transformer(backend, draws="torch")) == []


@pytest.mark.parametrize("precision", ["bfloat16", pytest.param("float16", marks=pytest.mark.full)])
def test_other_formats(precision: str):
    assert differing(decoder("fsdp2", precision=precision)) == []


def test_ordered_sums_have_the_bits_of_one_process():
    """On three ranks, computed again, those of one process that keeps all."""
    cells = [MODELS["mlp"](backend, threads=1) for backend in ("single", "ddp", "fsdp2")]
    one, *others = (dataclasses.replace(c, backend=dataclasses.replace(c.backend, reduce="ordered")) for c in cells)
    (expected,) = runs([one])
    for cell in others:
        (found,) = runs([again(cell, "blocks")], ranks=3)
        assert same(found, expected)


# -- faults ------------------------------------------------------------------------------------------------------------


def counts_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws go on from the newest place, so that what is computed again has other masks."""
    monkeypatch.setattr(Now, "from_", lambda now, mark: contextlib.nullcontext())
    monkeypatch.setattr(Now, "_heard", lambda now: len(now.past) - 1)


def updates_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers are changed by what is computed again."""
    inner = recompute._wrap
    monkeypatch.setattr(recompute, "_wrap", lambda layer, places, *rest: inner(layer, [], *rest))


def shares_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer is given the very memory that is kept."""
    monkeypatch.setattr(recompute.Copies, "__torch_dispatch__", lambda self, f, types, args=(), kw=None: f(*args, **kw))


@pytest.mark.parametrize(
    ("model", "plant", "seen"),
    [
        ("decoder", counts_on, ["blocks", "selective"]),
        ("normed", updates_twice, ["blocks", "selective"]),
        ("in place", shares_memory, ["selective"]),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_fault_is_seen(model: str, plant, seen: list[str], monkeypatch: pytest.MonkeyPatch):
    plant(monkeypatch)
    assert differing(MODELS[model]()) == seen


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["decoder", "vit", "normed"])
def test_less_is_kept(model: str):
    none, blocks, selective = (kept_bytes(again(MODELS[model](), kind)) for kind in KINDS)
    assert blocks < selective < none
    assert blocks < 0.5 * none and selective < 0.75 * none, (none, blocks, selective)


# -- with the rest -----------------------------------------------------------------------------------------------------

ARGV = (
    *("--data.name", "synthetic", "--data.args", "{n: 42, n_test: 9, shape: [1, 6, 6], classes: 5}"),
    *("--model.name", "recompute_cells:Normed", "--train.global_batch_size", "8", "--train.epochs", "1"),
    *("--train.device", "cpu", "--train.threads", "1", "--track.every_steps", "1", "--checkpoint.every_steps", "3"),
)


def test_replay(zygote: Zygote, tmp_path: Path):
    """Of a run that computes again what it was, and what one was that keeps all."""
    found = []
    for kind in KINDS[:2]:
        folder, out = tmp_path / kind, tmp_path / f"{kind}.json"
        zygote.run(Run([*ARGV, "--backend.recompute", kind, "--run.dir", str(folder)]))[0].check()
        zygote.run(Run(["replay", "--run.dir", str(folder), "--step", "5", "--json", str(out)]))[0].check()
        found.append(json.loads(out.read_text())["steps"])
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--backend.recompute=some"], "got 'some', expected none, blocks, selective, or {budget: SHARE}"),
        (["--backend.recompute.budget=2"], "got {'budget': 2}, expected {budget: SHARE} with a share from 0 to 1"),
        (["--backend.recompute={}"], "got {}, expected {budget: SHARE}"),
        (["--backend.recompute.budget=0.5"], "but it is the compiler that keeps to a budget; write --compile.mode"),
        (["--backend.recompute=blocks", "--compile.scope=step"], "got blocks with compile.scope step, whose graph"),
    ],
)  # fmt: skip
def test_refused(argv: list[str], line: str):
    with pytest.raises(ConfigError) as refused:
        check(load(argv), Launcher())
    assert str(refused.value).startswith("backend.recompute: ") and line in str(refused.value)


def test_a_model_without_blocks_is_refused():
    """And that of the defaults, whose layers keep no more than what they are called with."""
    with pytest.raises(ConfigError, match=r"the model has no blocks that keep more .* \(it has Sequential\)"):
        assemble.build(load(["--backend.recompute=blocks"]), torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"the model has none in \['Linear'\] that keep more"):
        assemble.build(load(["--backend.recompute=selective", "--model.blocks=[Linear]"]), torch.device("cpu"))


# -- compiled ----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler's own, which it means to hide
@pytest.mark.parametrize("backend", ["single", *(pytest.param(b, marks=pytest.mark.full) for b in BACKENDS)])
def test_compiled(backend: str):
    assert differing(small(backend), mode="default") == []


@pytest.mark.full
@pytest.mark.parametrize("backend", ["single", "ddp", "fsdp2", "deepspeed:3"])
def test_compiled_in_pieces(backend: str):
    """Statistics that are exchanged break a block's graph, whose pieces then are what is computed again."""
    assert differing(normed(backend, max_steps=2), mode="default") == []


@pytest.mark.full
def test_a_budget():
    cells = [again(small(), kind, "default") for kind in ("none", {"budget": 0.3})]
    assert kept_bytes(cells[1]) < 0.75 * kept_bytes(cells[0])
    one, other = runs(cells)
    assert difference(one, other).worst < 1e-5
