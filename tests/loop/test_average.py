"""Parameter groups and averaged weights: the same under every backend and on any number of ranks, also when a run is
cut off and goes on under another."""

import dataclasses
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from dist_train.checkpoint import manifest, resume
from dist_train.config.tree import Config, OptimConfig
from dist_train.run import assemble

from optim_cells import ADAMW, STEPS, Outcome, config, refused, run, run_all
from parity_cells import ALONE, BACKENDS, TOLERANCE
from workers import run_ranks

TRAINED = ("inner.weight", "norm.weight", "wide_norm.weight", "first.weight", "again.bias", "head.weight")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("average")


@pytest.fixture(scope="module")
def reference(place: Path):
    """A function from a cell of one process to what it leaves, each run once."""

    @cache
    def of(precision: str = "float32", model: str = "Mixed", nonfinite: str = "stop") -> Outcome:
        cell = config("single", precision=precision, model=model, nonfinite=nonfinite)
        return run(cell, place / f"single-{precision}-{model}")

    return of


def apart(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    """The largest relative distance of two tensors of one name; infinite where the names differ."""
    if a.keys() != b.keys():
        return float("inf")
    return max(float(np.linalg.norm(a[n] - b[n]) / max(np.linalg.norm(b[n]), 1e-3)) for n in a)


def distance(found: Outcome, expected: Outcome) -> float:
    """Between two runs: weights, averages and what evaluations of these gave."""
    unused = {"unused.weight", "unused.bias"}  # ZeRO does not train them, and so keeps no average
    averages = [{n: v for n, v in o.averages.items() if n not in unused} for o in (found, expected)]
    pairs = [(found.model, expected.model), (averages[0], averages[1]), (found.left, expected.left)]
    losses = [abs(found.evaluations[step] - value) / value for step, value in expected.evaluations.items()]
    return max(*(apart(*pair) for pair in pairs), *losses)


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def changed(optim: OptimConfig = ADAMW, **keys) -> OptimConfig:
    return dataclasses.replace(optim, **keys)


# -- one process -------------------------------------------------------------------------------------------------------


def test_the_average_is_that_of_the_weights_after_each_step(reference, place: Path):
    ends = [run(config(optim=changed(ema_eval=False)), place / "steps", cut_after=step) for step in range(1, STEPS)]
    average = ends[1].model  # it starts after the second step
    assert not ends[0].averages and same(ends[1].averages, {n: average[n] for n in ends[1].averages})
    for end in ends[2:]:
        average = {name: 0.7 * value + 0.3 * end.model[name] for name, value in average.items()}
        assert apart(end.averages, {name: average[name] for name in end.averages}) < 1e-6
    assert "frozen.weight" not in average.keys() & ends[-1].averages.keys() and set(TRAINED) <= ends[-1].averages.keys()
    assert same(ends[-1].model, run(config(), place / "steps-used", cut_after=STEPS - 1).model)


def test_evaluation_and_the_weights_that_are_left_are_those_of_the_average(reference, place: Path):
    plain = run(config(optim=changed(ema=None, ema_start=0)), place / "plain")
    unused = run(config(optim=changed(ema_eval=False)), place / "unused")
    used = reference()
    assert same(plain.model, used.model) and not plain.averages
    assert same(plain.left, plain.model) and same(unused.left, plain.left) and unused.evaluations == plain.evaluations
    assert same(used.left, used.model | used.averages | {"again.weight": used.averages["first.weight"]})
    assert used.evaluations[2] == plain.evaluations[2] and used.evaluations[12] != plain.evaluations[12]
    assert not same(used.averages, {name: used.model[name] for name in used.averages})


# -- several ranks -----------------------------------------------------------------------------------------------------


def cells(backends: tuple[str, ...], place: Path, **keys) -> list[tuple[Config, Path, None]]:
    return [(config(name, **keys), place / name.replace(":", ""), None) for name in backends]


def agree(backends: tuple[str, ...], ranks: int, expected: Outcome, place: Path, **keys) -> None:
    found = run_ranks(run_all, ranks, cells(backends, place, **keys))[0]
    for name, outcome in zip(backends, found, strict=True):
        assert distance(outcome, expected) < TOLERANCE[keys.get("precision", "float32")], name


SOME = {1: ("fsdp2", "deepspeed:3"), 2: BACKENDS, 3: ("fsdp2", "deepspeed:1", "deepspeed:3")}


@pytest.mark.parametrize("ranks", SOME)
def test_the_same_as_in_one_process(ranks: int, reference, tmp_path: Path):
    agree(SOME[ranks], ranks, reference(), tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("ranks", [1, 3])
def test_the_same_as_in_one_process_in_full(ranks: int, reference, tmp_path: Path):
    agree(BACKENDS, ranks, reference(), tmp_path)


def test_the_same_in_float64(reference, tmp_path: Path):
    agree(("ddp", "fsdp2", "accelerate"), 2, reference("float64"), tmp_path, precision="float64")


def test_a_step_that_is_left_out_leaves_the_average(reference, tmp_path: Path):
    keys = {"model": "Breaking", "nonfinite": "skip"}
    agree(("ddp", "fsdp2", "deepspeed:0", "deepspeed:2", "deepspeed:3"), 2, reference(**keys), tmp_path, **keys)
    before, after = (run(config(**keys), tmp_path / f"until-{step}", cut_after=step) for step in (4, 5))
    assert same(before.model, after.model) and same(before.averages, after.averages)


@pytest.mark.parametrize("backend", ["fsdp2", "deepspeed:2", "deepspeed:3"])
def test_an_evaluation_with_the_average_leaves_the_bits_of_the_weights(backend: str, tmp_path: Path):
    pair = [(config(backend, changed(ema_eval=used)), tmp_path / f"{used}", None) for used in (True, False)]
    used, unused = run_ranks(run_all, 2, pair)[0]
    assert same(used.model, unused.model) and same(used.averages, unused.averages)
    assert used.evaluations != unused.evaluations


# -- resumed -----------------------------------------------------------------------------------------------------------

# Where each is cut off; the last goes on to the end.
CHAIN = (("single", 0, 1), ("fsdp2", 2, 3), ("deepspeed:2", 3, 5), ("ddp", 2, 6), ("deepspeed:3", 2, 8))
CHAIN += (("accelerate", 3, 9), ("deepspeed:1", 2, 10), ("fsdp2", 3, None))


def test_it_goes_on_under_other_backends(reference, tmp_path: Path):
    for backend, ranks, cut_after in CHAIN:
        of = [(config(backend), tmp_path / "run", cut_after)]
        end = (run_ranks(run_all, ranks, of)[0] if ranks else run_all(of))[0]
        assert not end.lines
    assert distance(end, reference()) < TOLERANCE["float32"]


@pytest.mark.parametrize(
    "backend", ["ddp", "fsdp2", "deepspeed:2", pytest.param("deepspeed:3", marks=pytest.mark.full)]
)
def test_the_same_ranks_give_the_same_bits(backend: str, tmp_path: Path):
    cell = config(backend)
    alone, _, resumed = run_ranks(
        run_all, 2, [(cell, tmp_path / "alone", None), (cell, tmp_path / "cut", 5), (cell, tmp_path / "cut", None)]
    )[0]
    assert same(alone.model, resumed.model) and same(alone.averages, resumed.averages)
    assert same(alone.left, resumed.left) and resumed.evaluations.items() <= alone.evaluations.items()


def test_a_run_that_was_cut_off_after_its_last_step_leaves_the_average(reference, tmp_path: Path):
    """It takes no step more, only an evaluation."""
    names = ("fsdp2", "deepspeed:1", "deepspeed:3")
    runs = [(config(name), tmp_path / name.replace(":", ""), cut) for name in names for cut in (STEPS, None)]
    for outcome in run_ranks(run_all, 2, runs)[0][1::2]:
        assert apart(outcome.left, reference().left) < TOLERANCE["float32"]


def test_an_average_that_begins_or_ends_at_a_resume_is_said(tmp_path: Path):
    off = config(optim=changed(ema=None, ema_start=0))
    run(off, tmp_path, cut_after=4)
    begun = run(config(), tmp_path, cut_after=5)
    assert begun.lines == ["optim.ema: the checkpoint has no averaged weights, so they start at the weights of step 4"]
    ended = run(off, tmp_path)
    assert ended.lines == ["optim.ema: the checkpoint's averaged weights are not used, as optim.ema is null"]
    assert not ended.averages


def test_another_decay_or_group_is_refused_unless_allowed(tmp_path: Path):
    run(config(), tmp_path, cut_after=4)
    said = refused(config(optim=changed(ema=0.9, groups=[])), tmp_path)
    assert "optim.ema: got 0.9, expected 0.7 as in" in said and "optim.groups: got [], expected [{'match'" in said
    assert "--checkpoint.allow '[optim.groups" in said


def test_a_run_goes_on_from_a_checkpoint_of_before_these_keys(tmp_path: Path):
    plain = config(optim=OptimConfig())
    run(plain, tmp_path, cut_after=4)
    folder, what = manifest.listed(tmp_path)[0][0]
    keys = ("name", "lr", "weight_decay", "momentum", "args", "schedule", "warmup_steps", "lr_final")
    old = what.config | {"optim": {key: what.config["optim"][key] for key in keys}}
    parts = assemble.build(plain, ALONE.device)
    found = resume.Found(folder, dataclasses.replace(what, config=old))
    assert not resume.differences(found, plain, resume.facts_of(parts.model, parts.data))


# -- planted faults ----------------------------------------------------------------------------------------------------


def planted(fault: str) -> str:
    return f"optim_cells:{fault}"


@pytest.mark.parametrize("fault", ["AnothersShard", "NotGatheredAgain"])
def test_a_fault_of_shards_is_seen(fault: str, reference, tmp_path: Path):
    found = run_ranks(run_all, 2, cells((planted(fault),), tmp_path))[0][0]
    assert distance(found, reference()) > 100 * TOLERANCE["float32"]


def test_rates_of_groups_that_are_lost_at_a_resume_are_seen(reference, tmp_path: Path):
    run(config(), tmp_path, cut_after=6)
    assert distance(run(config(planted("RatesLost")), tmp_path), reference()) > 100 * TOLERANCE["float32"]


def test_an_average_that_takes_a_left_out_step_in_is_seen(reference, tmp_path: Path):
    keys = {"model": "Breaking", "nonfinite": "skip"}
    found = run(config(planted("TakesAll"), **keys), tmp_path)
    assert apart(found.averages, reference(**keys).averages) > 100 * TOLERANCE["float32"]
