"""A run that is cut off and resumed is the run that was not: same bits on the same ranks, same samples on any."""

import dataclasses
import json
import shutil
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F

from dist_train.backends import precision
from dist_train.backends.initial import Initial
from dist_train.backends.shards import shards_of
from dist_train.checkpoint import manifest, storage
from dist_train.config.lookup import torch_optimizers
from dist_train.config.tree import CheckpointConfig, CompileConfig, Config, ModelConfig, OptimConfig, RunConfig
from dist_train.data.order import Plan
from dist_train.loop import meter
from dist_train.loop.evaluate import Evaluation
from dist_train.loop.optim import OURS
from dist_train.loop.rules import UNFIT_OPTIMIZERS
from dist_train.loop.schedule import lr_at
from dist_train.models.draws import Draws
from dist_train.run import assemble

from parity_cells import ALONE, BACKENDS, TOLERANCE, config
from resume_cells import Outcome, refusal_of, run_series, saving
from workers import run_ranks

# Backend and ranks; 0 is one process without a group.
TOPOLOGIES = [
    *(("single", 0), ("ddp", 2), ("ddp", 4), ("fsdp2", 2), ("accelerate", 2)),
    *((f"deepspeed:{stage}", 2) for stage in (1, 2, 3)),
]
CUT = 13  # the last checkpoint before it is that of step 10, in the middle of an epoch


def _long(backend: str, ranks: int):
    return pytest.param(backend, ranks, marks=pytest.mark.full)


def go(ranks: int, runs: list[tuple[Config, int | None]]) -> list[list[Outcome]]:
    """The outcomes of the runs, by rank."""
    return run_ranks(run_series, ranks, runs, timeout_s=300) if ranks else [run_series(runs)]


def cut_and_resumed(cell: Config, folder: Path, **checkpoint) -> list[tuple[Config, int | None]]:
    """A run that is not disturbed, the same cut off, and the cut one resumed."""
    alone, cut = saving(cell, folder / "alone", **checkpoint), saving(cell, folder / "cut", **checkpoint)
    return [(alone, None), (cut, CUT), (cut, None)]


def same_bits(a: Outcome, b: Outcome) -> bool:
    return a.metrics == b.metrics and all(np.array_equal(a.weights[name], b.weights[name]) for name in a.weights)


FOUR = [_long(backend, 4) for backend in ("ddp", "accelerate", "fsdp2", "deepspeed:2")]
TWO = [topology for topology in TOPOLOGIES if topology != ("ddp", 4)]


@pytest.mark.parametrize(("backend", "ranks"), [*TWO, ("deepspeed:0", 2), *FOUR])
def test_the_same_bits_on_the_same_ranks(backend: str, ranks: int, tmp_path: Path):
    """With micro-batches, saved while training goes on."""
    cell = config(backend, "AdamW", 8)
    alone, _, resumed = go(ranks, cut_and_resumed(cell, tmp_path, asynchronous=True))[0]
    assert alone.weights and same_bits(alone, resumed)


SYNCHRONOUS = [t if t in (("ddp", 2), ("fsdp2", 2), ("deepspeed:3", 2)) else _long(*t) for t in TWO]


@pytest.mark.parametrize(("backend", "ranks"), [*SYNCHRONOUS, _long("deepspeed:0", 2), *FOUR])
def test_the_same_bits_of_sgd_saved_between_steps(backend: str, ranks: int, tmp_path: Path):
    alone, _, resumed = go(ranks, cut_and_resumed(config(backend, "SGD"), tmp_path, asynchronous=False))[0]
    assert alone.weights and same_bits(alone, resumed)


def with_dropout(cell: Config) -> Config:
    return dataclasses.replace(cell, model=dataclasses.replace(cell.model, dropout=0.3))


def with_torchs_draws(cell: Config) -> Config:
    return dataclasses.replace(with_dropout(cell), train=dataclasses.replace(cell.train, draws="torch"))


@pytest.mark.parametrize(
    ("backend", "ranks"),
    [("ddp", 2), *(_long(*t) for t in (("single", 0), ("fsdp2", 2), ("deepspeed:3", 2)))],
)
def test_the_same_bits_with_dropout_and_compiled(backend: str, ranks: int, tmp_path: Path):
    cell = dataclasses.replace(with_dropout(config(backend, "AdamW")), compile=CompileConfig(mode="default"))
    alone, _, resumed = go(ranks, cut_and_resumed(cell, tmp_path))[0]
    assert same_bits(alone, resumed)


SCHEDULES = {
    "constant": {},
    "linear": {"lr_final": 1e-4},
    "cosine": {"lr_final": 1e-4},
    "step": {"step_size": 5, "gamma": 0.5},
}


def rates_of_a_resumed_run(schedule: str, folder: Path) -> tuple[list[float], list[float]]:
    """The learning rates that were recorded, and those of a run that was not cut off."""
    optim = OptimConfig(name="SGD", lr=3e-3, schedule=schedule, warmup_steps=12, **SCHEDULES[schedule])
    cell = dataclasses.replace(config(), optim=optim)
    resumed = run_series(cut_and_resumed(cell, folder)[1:])[1]
    recorded = [line["train/lr"] for line in resumed.metrics if "train/lr" in line]
    return recorded, [lr_at(optim, step, 24) for step in range(24)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_learning_rate_goes_on_where_it_was(schedule: str, tmp_path: Path):
    recorded, expected = rates_of_a_resumed_run(schedule, tmp_path)
    assert recorded == expected


def test_a_learning_rate_that_counts_from_the_resume_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Meter(meter.Meter):
        def __init__(self, *of):
            super().__init__(*of)
            Meter.first = self.result.steps

    monkeypatch.setattr("dist_train.loop.work.Meter", Meter)
    monkeypatch.setattr(
        "dist_train.loop.train.lr_at", lambda optim, step, total: lr_at(optim, step - Meter.first, total)
    )
    recorded, expected = rates_of_a_resumed_run("linear", tmp_path)
    assert recorded[:10] == expected[:10] and recorded[10:] != expected[10:]


def test_the_same_bits_with_torchs_draws(tmp_path: Path):
    alone, _, resumed = go(2, cut_and_resumed(with_torchs_draws(config("ddp")), tmp_path))[0]
    assert same_bits(alone, resumed)


def drawn_elsewhere(folder: Path) -> float:
    """How far a run with dropout that goes on from 2 ranks on 3, in the middle of an epoch, ends from one that was left
    alone; relative, of its loss."""
    cells = {backend: with_dropout(config(backend)) for backend in ("single", "ddp", "fsdp2")}
    alone = run_series([(saving(cells["single"], folder / "alone"), None)])[0]
    go(2, [(saving(cells["fsdp2"], folder / "cut"), CUT)])
    resumed = go(3, [(saving(cells["ddp"], folder / "cut"), None)])[0][0]
    losses = [[line["train/loss"] for line in one.metrics if "train/loss" in line] for one in (alone, resumed)]
    assert len(losses[0]) == len(losses[1]) == 24
    return max(abs(a - b) / a for a, b in zip(*losses, strict=True))


def test_dropout_goes_on_exactly_at_another_world_size(tmp_path: Path):
    assert drawn_elsewhere(tmp_path) < TOLERANCE["float32"]


def since_the_resume(runs: list[tuple[Config, int | None]]) -> list[Outcome]:
    """In a worker: keys whose step counts from the start of the process."""
    with pytest.MonkeyPatch.context() as patch:
        keys = Draws.keys

        def counted(self, samples, step, *more):
            self.first = getattr(self, "first", step)
            return keys(self, samples, step - self.first, *more)

        patch.setattr(Draws, "keys", counted)
        return run_series(runs)


def test_a_step_that_counts_from_the_resume_is_seen(tmp_path: Path):
    alone, _, resumed = since_the_resume(cut_and_resumed(with_dropout(config()), tmp_path))
    losses = [[line["train/loss"] for line in one.metrics if "train/loss" in line] for one in (alone, resumed)]
    assert losses[0][:10] == losses[1][:10] and abs(losses[0][10] - losses[1][10]) > 1e-3


def test_a_lost_random_state_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    runs = cut_and_resumed(with_torchs_draws(config()), tmp_path)
    alone, _ = run_series(runs[:2])
    monkeypatch.setattr("dist_train.checkpoint.randomness.restore", lambda tensors, device: None)
    assert not same_bits(alone, run_series(runs[2:])[0])


def test_the_float16_scale_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(precision.LossScale, "GROWTH_STEPS", 4)
    alone, _, resumed = run_series(cut_and_resumed(config(precision="float16"), tmp_path))
    scale = manifest.listed(tmp_path / "alone")[0][0][1].loss_scale
    assert scale.factor > 2.0**16 and same_bits(alone, resumed)


# -- another backend, another world size -------------------------------------------------------------------------------


def cell_of(backend: str, optimizer: str) -> Config:
    """One model for all of the matrix; see parity_cells."""
    return dataclasses.replace(config(backend, optimizer), model=ModelConfig(hidden=[320, 320]))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders BACKEND-RANKS-OPTIMIZER of runs that were cut off."""
    folder = tmp_path_factory.mktemp("saved")
    for backend, ranks in TOPOLOGIES:
        cells = {optimizer: cell_of(backend, optimizer) for optimizer in ("SGD", "AdamW")}
        go(ranks, [(saving(cell, folder / f"{backend}-{ranks}-{name}"), CUT) for name, cell in cells.items()])
    return folder


@cache
def undisturbed(optimizer: str, folder: Path) -> Outcome:
    return run_series([(saving(cell_of("single", optimizer), folder / f"undisturbed-{optimizer}"), None)])[0]


def resumed_from_all(backend: str, ranks: int, saved: Path, folder: Path, every: int) -> None:
    """Resumes what the topologies saved with the one and the other optimizer, or every fourth of them: those of all
    topologies together have each of them."""
    runs, names = [], []
    for i, (other, other_ranks) in enumerate(TOPOLOGIES):
        for j, optimizer in enumerate(("SGD", "AdamW")):
            if (i + j + TOPOLOGIES.index((backend, ranks))) % every == 0:
                name = f"{other}-{other_ranks}-{optimizer}"
                shutil.copytree(saved / name, folder / name)
                runs.append((saving(cell_of(backend, optimizer), folder / name), None))
                names.append((name, optimizer))
    for (name, optimizer), outcome in zip(names, go(ranks, runs)[0], strict=True):
        reference = undisturbed(optimizer, saved)
        steps = [line["step"] for line in outcome.metrics if "train/loss" in line]
        assert steps == list(range(1, 25)), f"{name} under {backend}"
        for name_of, value in reference.weights.items():
            distance = np.linalg.norm(outcome.weights[name_of] - value) / np.linalg.norm(value)
            assert distance < TOLERANCE["float32"], f"{name} under {backend} on {ranks} ranks: {name_of} {distance:.1e}"
        for mine, line in zip(outcome.metrics, reference.metrics, strict=True):
            assert mine == pytest.approx(line, rel=TOLERANCE["float32"]), f"{name} under {backend}"


@pytest.mark.parametrize(
    ("backend", "ranks"),
    [_long(*t) if t in (("ddp", 4), ("deepspeed:1", 2), ("deepspeed:2", 2)) else t for t in TOPOLOGIES],
)
def test_another_backend_or_world_size(backend: str, ranks: int, saved: Path, tmp_path: Path):
    resumed_from_all(backend, ranks, saved, tmp_path, 4)


@pytest.mark.full
@pytest.mark.parametrize(("backend", "ranks"), TOPOLOGIES)
def test_another_backend_or_world_size_in_full(backend: str, ranks: int, saved: Path, tmp_path: Path):
    resumed_from_all(backend, ranks, saved, tmp_path, 1)


@pytest.mark.parametrize("fault", ["optim", "step"])
def test_the_matrix_sees_lost_state(fault: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Planted: the moments are not loaded; the schedule starts anew. Both end far from the reference."""
    if fault == "optim":
        monkeypatch.setattr("dist_train.backends.single.load_optimizer", lambda *args: [])
    else:
        monkeypatch.setattr("dist_train.data.order.Plan.indices", _from_the_start(monkeypatch))
    with pytest.raises(AssertionError):
        resumed_from_all("single", 0, saved, tmp_path, 4)


def _from_the_start(monkeypatch: pytest.MonkeyPatch):
    from dist_train.data.order import Plan

    indices = Plan.indices
    return lambda self, epoch, first_step=0, before=0: indices(self, epoch, 0, before)


def test_the_same_samples_at_every_step(tmp_path: Path):
    """Cut off twice, on 4, 2 and 1 ranks, with accumulation: the ledger is that of the undisturbed run."""
    reference = run_series([(saving(config(), tmp_path / "alone"), None)])[0].ledger
    assert [len(step) for step in reference[:4]] == [64, 64, 3, 64]
    ledger: list[set[int]] = []
    for backend, ranks, cut, pieces in (("ddp", 4, 8, 4), ("fsdp2", 2, 13, None), ("single", 0, None, 16)):
        cell = saving(config(backend, micro_batch_size=pieces), tmp_path / "moving")
        done = len(ledger) // 5 * 5  # what came after the checkpoint is trained again
        del ledger[done:]
        for step in steps_of([rank[0].ledger for rank in go(ranks, [(cell, cut)])], ranks or 1, pieces, done):
            ledger.append(step)
    assert [sorted(step) for step in ledger] == [sorted(step.tolist()) for step in reference]


def steps_of(ledgers: list[list[np.ndarray]], ranks: int, piece: int | None, first: int) -> list[set[int]]:
    """The samples of each step of a world, out of its micro-batches; each sample once."""
    steps, at = [], 0
    for step in range(first, 24):
        largest = -(-(3 if step % 3 == 2 else 64) // ranks)
        count = 1 if piece is None else -(-largest // piece)
        drawn = [int(i) for ledger in ledgers for batch in ledger[at : at + count] for i in batch]
        assert len(set(drawn)) == len(drawn)
        if drawn:
            steps.append(set(drawn))
        at += count
    return steps


# -- other arguments of the optimizer ----------------------------------------------------------------------------------

PLAIN, AMSGRAD = (OptimConfig(name="AdamW", lr=1e-3, args=args) for args in ({}, {"amsgrad": True}))
# Before and after the checkpoint; the state that begins then, and that which is left.
CHANGES = {
    "amsgrad": (PLAIN, {"args": {"amsgrad": True}}, ["max_exp_avg_sq"], []),
    "no amsgrad": (AMSGRAD, {"args": {}}, [], ["max_exp_avg_sq"]),
    "centered": (
        OptimConfig(name="RMSprop", lr=1e-3),
        {"momentum": 0.5, "args": {"centered": True}},
        ["momentum_buffer", "grad_avg"],
        [],
    ),
    "momentum": (OptimConfig(name="SGD", lr=3e-3), {"momentum": 0.9}, ["momentum_buffer"], []),
}
CHANGE = CheckpointConfig(every_steps=10, allow=["optim.args", "optim.momentum"])


def with_other_arguments(change: str, backend: str, ranks: int, folder: Path) -> Outcome:
    """A run whose optimizer gets other arguments at step 10, and what it says of the state."""
    before, after, *_ = CHANGES[change]
    runs = []
    for optim in (before, dataclasses.replace(before, **after)):
        cell = dataclasses.replace(cell_of(backend, "AdamW"), optim=optim, run=RunConfig(dir=str(folder)))
        runs.append((dataclasses.replace(cell, checkpoint=CHANGE), CUT if optim is before else None))
    outcome = go(ranks, runs)[0][-1]
    begun = [
        f"optimizer state {key} starts at its initial value: the checkpoint has none" for key in CHANGES[change][2]
    ]
    left = [f"optimizer state {key} of the checkpoint is not used" for key in CHANGES[change][3]]
    assert outcome.state_lines == [*begun, *left]
    return outcome


def by_torch_alone(change: str, folder: Path) -> dict[str, torch.Tensor]:
    """The same by a loop over torch's own optimizers: the second gets what both have of the first one's state, and for
    the rest what it makes itself."""
    before, after, *_ = CHANGES[change]
    cell = cell_of("single", "AdamW")
    parts = assemble.build(cell, torch.device("cpu"))
    parameters = list(parts.model.parameters())
    plan = Plan.of(len(parts.data.train), cell, ALONE)
    first, second = (
        getattr(torch.optim, optim.name)(
            parameters, lr=optim.lr, **({"momentum": optim.momentum} if optim.momentum else {}), **optim.args
        )
        for optim in (before, dataclasses.replace(before, **after))
    )
    for step in range(24):
        if step == 10:
            for p in parameters:
                p.grad = torch.zeros_like(p)
            values = [p.detach().clone() for p in parameters]
            if first.state[parameters[0]].get("step") is not None:
                second.step()  # of zeros, so that all of its state is there
                with torch.no_grad():
                    for p, value in zip(parameters, values, strict=True):
                        p.copy_(value)
                        kept = second.state[p]
                        second.state[p] = kept | {k: v for k, v in first.state[p].items() if k in kept}
            first = second
        epoch, at = divmod(step, plan.steps_per_epoch)
        inputs, targets = next(parts.feed(plan.indices(epoch, at), epoch))
        first.zero_grad()
        F.cross_entropy(parts.model(inputs), targets).backward()
        first.step()
    return {name: value.detach() for name, value in parts.model.state_dict().items()}


@pytest.mark.parametrize("change", CHANGES)
def test_other_arguments_of_the_optimizer(change: str, tmp_path: Path):
    outcome = with_other_arguments(change, "single", 0, tmp_path)
    for name, value in by_torch_alone(change, tmp_path).items():
        assert outcome.weights[name] == pytest.approx(value.double().numpy(), rel=1e-5, abs=1e-7), name


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Outcome]:
    """By change, what one process makes of it. Each is made once."""
    return cache(lambda change: with_other_arguments(change, "single", 0, tmp_path_factory.mktemp("changed")))


# Every day one change under every backend, and all of them where state is sharded.
CHANGED = [
    pytest.param(backend, change, marks=() if daily and backend != "deepspeed:3" else pytest.mark.full)
    for backend in BACKENDS
    for change in ("amsgrad", "no amsgrad", "momentum")
    for daily in [change == "amsgrad" or backend in ("fsdp2", "deepspeed:1")]
]


@pytest.mark.parametrize(("backend", "change"), CHANGED)
def test_other_arguments_under_every_backend(backend: str, change: str, changed: Callable, tmp_path: Path):
    alone, outcome = changed(change), with_other_arguments(change, backend, 2, tmp_path)
    for name, value in alone.weights.items():
        distance = np.linalg.norm(outcome.weights[name] - value) / np.linalg.norm(value)
        assert distance < TOLERANCE["float32"], f"{change} under {backend}: {name} {distance:.1e}"


@pytest.mark.parametrize("name", sorted(torch_optimizers().keys() - UNFIT_OPTIMIZERS.keys() - OURS.keys()))
@pytest.mark.parametrize("shape", [(3, 4), (5,), ()])
def test_the_initial_state_is_the_optimizers_own(name: str, shape: tuple[int, ...]):
    arguments = {"Adagrad": {"initial_accumulator_value": 0.25}, "SGD": {"momentum": 0.9}}.get(name, {})
    arguments |= {"centered": True, "momentum": 0.5} if name == "RMSprop" else {}
    parameter = torch.nn.Parameter(torch.ones(shape))
    optimizer = getattr(torch.optim, name)([parameter], lr=0.5, **arguments)
    initial = Initial(optimizer, {}).of(parameter)
    values = {key: value.flatten()[0].item() for key, value in initial.items() if value.dim() and key != "row_var"}
    expected = {"Adagrad": {"sum": 0.25}, "Rprop": {"prev": 0.0, "step_size": 0.5}}
    assert name not in expected or not shape or values == expected[name]
    parameter.grad = torch.full(shape, 0.1)
    optimizer.step()
    made = optimizer.state[parameter]
    assert made.keys() == initial.keys()
    filled = {"step": made["step"]} if "step" in made else {}
    Initial(optimizer, {}).fill(parameter, filled)
    if filled and name != "Adafactor":
        assert {k: (v.shape, v.dtype) for k, v in filled.items()} == {k: (v.shape, v.dtype) for k, v in made.items()}


def test_weights_that_were_frozen(tmp_path: Path):
    """Their state begins when they are trained; of those that are frozen now it is kept."""
    frozen, free = (
        dataclasses.replace(
            config("single", "AdamW"),
            model=ModelConfig(name="resume_cells:Freezing", args={"frozen": frozen}),
            run=RunConfig(dir=str(tmp_path)),
            checkpoint=dataclasses.replace(CHANGE, allow=["model.args"]),
        )
        for frozen in (True, False)
    )
    _, outcome = run_series([(frozen, CUT), (free, None)])
    assert outcome.state_lines == [
        "optimizer state of first.weight, first.bias starts at its initial value: the checkpoint has none"
    ]
    assert "optim.first.weight.exp_avg" in storage.tensors(manifest.listed(tmp_path)[0][0][0])
    state = {"optim.first.weight.step": torch.zeros(())}
    storage.read(manifest.listed(tmp_path)[0][0][0], {name: shards_of(value) for name, value in state.items()})
    assert state["optim.first.weight.step"] == 14  # of 24, frozen for 10


def test_zero_counts_steps_once_for_all(tmp_path: Path):
    """Refused by one line on all ranks: a weight whose count would begin anew."""
    cells = [
        dataclasses.replace(
            config(backend, "AdamW"),
            model=ModelConfig(name="resume_cells:Freezing", args={"frozen": backend == "single"}),
            run=RunConfig(dir=str(tmp_path)),
            checkpoint=dataclasses.replace(CHANGE, allow=["model.args"]),
        )
        for backend in ("single", "deepspeed:2")
    ]
    run_series([(cells[0], CUT)])
    for line in run_ranks(refusal_of, 2, cells[1], timeout_s=300):
        assert "without optimizer state of first.weight, whose count of steps would begin anew" in line


# -- what is kept, and when --------------------------------------------------------------------------------------------


def test_what_is_kept(tmp_path: Path):
    cell = dataclasses.replace(config(), train=dataclasses.replace(config().train, eval_every_steps=4))
    run_series([(saving(cell, tmp_path, every_steps=4, keep_last=2, keep_best=1, best_metric="eval/loss"), None)])
    found, damaged = manifest.listed(tmp_path)
    assert not damaged and [m.sequence for _, m in found] == sorted((m.sequence for _, m in found), reverse=True)
    steps = [m.step for _, m in found]
    losses = {
        m["step"]: m["eval/loss"]
        for m in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
        if "eval/loss" in m
    }
    assert steps[:2] == [24, 20] and set(steps) == {24, 20, min(losses, key=losses.get)}


@pytest.mark.parametrize(("metric", "best"), [("eval/accuracy", [8, 16]), ("eval/loss", [8, 12])])
def test_the_best_stay_though_later_ones_are_worse(
    metric: str, best: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The two metrics do not agree, and neither the first nor the last checkpoint is the best."""
    metrics = iter([(0.5, 0.7), (0.9, 0.1), (0.6, 0.2), (0.8, 0.6), (0.4, 0.8), (0.3, 0.9)])
    evaluate = Evaluation.run

    def told(*args, **keys):
        return evaluate(*args, **keys) | dict(zip(("eval/accuracy", "eval/loss"), next(metrics), strict=True))

    monkeypatch.setattr(Evaluation, "run", told)
    cell = dataclasses.replace(config(), train=dataclasses.replace(config().train, eval_every_steps=4))
    run_series([(saving(cell, tmp_path, every_steps=4, keep_last=1, keep_best=2, best_metric=metric), None)])
    assert sorted(m.step for _, m in manifest.listed(tmp_path)[0]) == [*best, 24]
    best_of_all = manifest.Best(metric, metric == "eval/loss")
    assert best_of_all.of(manifest.listed(tmp_path)[0])[1].step == 8


def test_saving_by_epochs_and_by_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run_series([(saving(config(), tmp_path / "epochs", every_steps=None, every_epochs=2, keep_last=99), None)])
    assert [m.step for _, m in manifest.listed(tmp_path / "epochs")[0]] == [24, 18, 12, 6]
    monkeypatch.setattr("dist_train.loop.meter.AGREE_EVERY_S", 0.0)
    run_series([(saving(config(), tmp_path / "s", every_steps=None, every_s=1e-6, keep_last=99), None)])
    assert [m.step for _, m in manifest.listed(tmp_path / "s")[0]] == list(range(24, 0, -2))


def test_a_resumed_float_of_metrics_is_the_same(tmp_path: Path):
    """The mean of an interval that a checkpoint stands in the middle of."""
    cell = dataclasses.replace(config(), track=dataclasses.replace(config().track, every_steps=8))
    alone, _, resumed = run_series(cut_and_resumed(cell, tmp_path))
    assert [m["step"] for m in resumed.metrics if "train/loss" in m] == [8, 16, 24]
    for mine, line in zip(resumed.metrics, alone.metrics, strict=True):
        assert mine == pytest.approx(line, rel=1e-12)


def test_weights_are_those_of_the_format(tmp_path: Path):
    """Names and values as the model has them, read by torch alone."""
    outcome = run_series([(saving(config("single", "AdamW"), tmp_path), None)])[0]
    folder = manifest.listed(tmp_path)[0][0][0]

    read = {f"model.{name}": torch.zeros(value.shape) for name, value in outcome.weights.items()}
    read["optim.layers.1.weight.exp_avg"] = torch.zeros(50, 36)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a process alone is alone
        dcp.load(read, checkpoint_id=str(folder), no_dist=True)
    for name, value in outcome.weights.items():
        assert np.array_equal(read[f"model.{name}"].double().numpy(), value)
    assert read["optim.layers.1.weight.exp_avg"].abs().sum() > 0
