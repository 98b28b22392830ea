"""Models that DeepSpeed's flat buffers and shards would get wrong: the same as one process, or refused by name."""

import dataclasses
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dist_train import backends
from dist_train.backends.deepspeed import engine_config
from dist_train.backends.fit import check_model, check_sparse
from dist_train.backends.probe import Findings
from dist_train.config.tree import Config, ModelConfig, OptimConfig
from dist_train.errors import ConfigError
from dist_train.loop import optim
from dist_train.run import assemble
from dist_train.tools.agreement import Trajectory, difference

from parity_cells import ALONE, TOLERANCE, config, run_cells, run_single, this_world
from resume_cells import run_series, saving
from workers import RankError, run_ranks

STAGES = (0, 1, 2, 3)
MODELS = (
    *("Frozen", "PartlyFrozen", "TiedFrozen", "Tied", "Unused", "Odd", "Shapes", "Tiny", "ChannelsLast", "Normed"),
    *("Empty", "Checkpointed", "NormedByHook"),
)
REFUSED = {(3, "Empty")}


def cell(model: str, backend: str = "single", steps: int = 5, micro: int | None = None, **args) -> Config:
    """A few steps with strong decay, so that a weight which is decayed and should not be is seen."""
    made = config(backend, micro_batch_size=micro)
    decaying = OptimConfig(name="AdamW", lr=0.01, weight_decay=0.5)
    return dataclasses.replace(
        made,
        model=ModelConfig(name=f"zero_models:{model}", args=args),
        optim=decaying,
        train=dataclasses.replace(made.train, max_steps=steps),
    )


@cache
def alone(model: str) -> Trajectory:
    return run_single(cell(model))


ON_FOUR = [pytest.param(stage, 4, marks=pytest.mark.full) for stage in (2, 3)]


@pytest.mark.parametrize(("stage", "ranks"), [*((stage, 2) for stage in STAGES), *ON_FOUR])
def test_the_same_as_single(stage: int, ranks: int):
    names = [name for name in MODELS if (stage, name) not in REFUSED]
    runs = run_ranks(run_cells, ranks, [cell(name, f"deepspeed:{stage}") for name in names], timeout_s=240)[0]
    worst = {name: difference(run, alone(name)).worst for name, run in zip(names, runs, strict=True)}
    assert all(value < TOLERANCE["float32"] for value in worst.values()), worst


def test_the_parts_that_are_looked_at_are_there():
    """Else nothing above would be partitioned, frozen or left out."""
    shapes = {name: assemble.build(cell(name), torch.device("cpu")) for name in ("Frozen", "Unused", "ChannelsLast")}
    frozen = [p for p in shapes["Frozen"].model.parameters() if not p.requires_grad]
    assert max(p.numel() for p in frozen) > 100_000
    assert shapes["Unused"].findings.unused == ("other.weight", "other.bias")
    assert not shapes["ChannelsLast"].model[2].weight.is_contiguous()


# -- saved under one backend, resumed under another --------------------------------------------------------------------

CHAINED = ("Frozen", "PartlyFrozen", "TiedFrozen", "ChannelsLast", "Odd")
# Each is cut off, and goes on under the next: backend, ranks, last step of its own.
CHAINS = {
    "up": (CHAINED, [("single", 0, 7), ("deepspeed:3", 2, 13), ("deepspeed:2", 4, 18), ("ddp", 2, None)]),
    "down": (CHAINED, [("ddp", 2, 7), ("deepspeed:1", 2, 13), ("deepspeed:3", 4, 18), ("single", 0, None)]),
    "through": (
        ("Unused", "Shapes", "Tiny"),
        [("single", 0, 7), ("deepspeed:3", 2, 13), ("deepspeed:1", 4, 18), ("deepspeed:0", 2, None)],
    ),
}


@pytest.mark.parametrize(
    "chain", ["through", *(pytest.param(c, marks=pytest.mark.full) for c in CHAINS if c != "through")]
)
def test_goes_on_under_another_backend(chain: str, tmp_path: Path):
    names, places = CHAINS[chain]
    for backend, ranks, cut in places:
        runs = [(saving(cell(name, backend, 20), tmp_path / name), cut) for name in names]
        outcomes = (run_ranks(run_series, ranks, runs, timeout_s=240) if ranks else [run_series(runs)])[0]
    runs = [run_single(cell(name, steps=20)) for name in names]
    undisturbed = [run.weights | run.buffers for run in runs]
    for name, outcome, weights in zip(names, outcomes, undisturbed, strict=True):
        assert outcome.weights.keys() == weights.keys()
        for key, expected in weights.items():
            distance = np.linalg.norm(outcome.weights[key] - expected) / (np.linalg.norm(expected) or 1)
            assert distance < TOLERANCE["float32"], f"{name}: {key} {distance:.1e}"


# -- no gradient -------------------------------------------------------------------------------------------------------

AT = (4,)  # forwards in training; the first is that of the look at the model, so this is step 3


def test_stage_0_leaves_what_gets_no_gradient_as_it_is():
    """On all ranks, also with micro-batches; and on one of them, whose samples then take another way."""
    args = [{"at": AT}, {"at": (4, 5), "micro": 16}, {"at": AT, "ranks": (1,)}]
    runs = run_ranks(run_cells, 2, [cell("Dropping", "deepspeed:0", **given) for given in args])[0]
    args[1]["micro"] = 32
    for given, run in zip(args, runs, strict=True):
        found = difference(run, run_single(cell("Dropping", **given)))
        assert found.worst < TOLERANCE["float32"], f"{given}: {found}"
        assert difference(run, run_single(cell("Dropping"))).worst > 1e-3  # it makes a difference


def refusals(function, *args) -> str:
    """In a worker: what is said against it. All ranks say it, so the group goes on."""
    try:
        function(*args)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_gets_no_gradient_is_named(stage: int):
    said = run_ranks(refusals, 2, run_cells, [cell("Dropping", f"deepspeed:{stage}", at=AT)])
    assert all(f"got no gradient of layers.1.weight in step 3, which ZeRO {stage} takes" in line for line in said)


def test_a_rank_that_uses_other_weights_is_named():
    """It says so before it sums gradients with the others."""
    with pytest.raises(RankError, match="rank 1 of 2 raised[^$]*got no gradient of layers.1.weight in step 3"):
        run_ranks(run_cells, 2, [cell("Dropping", "deepspeed:2", at=AT, ranks=(1,))])


def look_apart() -> None:
    """In a worker: the ranks have seen other parameters in use."""
    world = this_world()
    unused = ("layers.1.weight",) if world.rank else ()
    backend = backends.create(cell("Dropping", "deepspeed:2"), world, Findings(unused=unused))
    backend.prepare(assemble.build(cell("Dropping"), world.device).model, optim.factory(OptimConfig()))


def test_ranks_that_saw_other_weights_in_use_are_refused():
    assert all(
        "got no gradient of layers.1.weight on some ranks" in line for line in run_ranks(refusals, 2, look_apart)
    )


def test_a_weight_that_is_used_only_later_is_named():
    said = run_ranks(refusals, 2, run_cells, [cell("Dropping", "deepspeed:2", at=(1,))])[0]
    assert "got a gradient of layers.1.weight in step 1, but none when" in said


def test_steps_after_a_resume_are_counted_as_such(tmp_path: Path):
    """The forward that leaves a layer out is the fourth of the second start."""
    made = saving(cell("Dropping", "deepspeed:1", 20), tmp_path, allow=["model.args"])
    dropping = dataclasses.replace(made, model=ModelConfig(name="zero_models:Dropping", args={"at": AT}))
    said = run_ranks(refusals, 2, run_series, [(made, 6), (dropping, None)])[0]
    assert "in step 3 since the run was resumed" in said


# -- a step that is left out -------------------------------------------------------------------------------------------


def skip(backend: str, bad: float) -> tuple[bool, list[float], dict[str, np.ndarray]]:
    """In a worker: three steps, of which the second has a gradient that is not finite and leaves no trace; whether it
    left none, the norms, and the weights."""
    world, made = this_world() if backend != "single" else ALONE, cell("Counting", backend)
    made = dataclasses.replace(made, train=dataclasses.replace(made.train, nonfinite="skip"))
    parts = assemble.build(made, world.device)
    backend = backends.create(made, world, parts.findings)
    model, _ = backend.prepare(parts.model, optim.factory(made.optim))
    norms, states = [], []
    for step in range(3):
        for micro in range(2):
            x = torch.linspace(-1, 1, 36).reshape(1, 1, 6, 6) * (micro + 1)
            with backend.accumulate(last=micro == 1):
                factor = bad if step == 1 and micro == 0 and world.rank == world.size - 1 else 1 / world.size
                backend.backward((model(x).square() * factor).sum())
        norms.append(float(backend.step(None, measure=True)))
        boxes = {name: [part.clone() for _, part in s.boxes] for name, s in backend.state().items()}
        states.append(boxes)
    before, after = states[0], states[1]
    kept = before.keys() == after.keys() and all(
        torch.equal(a, b) for name in before for a, b in zip(before[name], after[name], strict=True)
    )
    return kept, norms, {name: value.numpy() for name, value in backend.weights().items()}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("stage", STAGES)
def test_a_step_that_is_left_out_leaves_no_trace(stage: int, bad: float):
    _, norms, expected = skip("single", bad)
    for kept, got, _ in (results := run_ranks(skip, 2, f"deepspeed:{stage}", bad)):
        assert kept and not np.isfinite(got[1])
        assert [got[0], got[2]] == pytest.approx([norms[0], norms[2]], rel=TOLERANCE["float32"])
    for name, value in results[0][2].items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-6)


# -- what is refused, and what is settled ------------------------------------------------------------------------------


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2, dtype=torch.float64)


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.filter = nn.Parameter(torch.ones(3, dtype=torch.complex64))


class TiedByMemory(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)
        self.b.weight.data = self.a.weight.data
        self.b.weight.requires_grad_(False)


class SeenByABuffer(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.register_buffer("first", self.weight.detach()[:1])


class OfNoElements(nn.Module):
    def __init__(self):
        super().__init__()
        self.none = nn.Parameter(torch.empty(0))


UNFIT = {
    Mixed: "got weights in float64 \\(b.weight, b.bias\\), expected float32 alone under ZeRO 3",
    Complex: "got weights in complex64 \\(filter\\)",
    TiedByMemory: "got a.weight and b.weight in the same memory",
    SeenByABuffer: "got (first and weight|weight and first) in the same memory",
    OfNoElements: "got weights of no elements \\(none\\)",
}


@pytest.mark.parametrize("model", UNFIT)
def test_what_flat_buffers_cannot_hold_is_refused(model: type):
    with pytest.raises(ConfigError, match=UNFIT[model]):
        check_model("deepspeed", Findings(), model(), 3)
    check_model("deepspeed", Findings(), model(), 0)


def test_sparse_gradients_are_refused():
    config = Config(optim=OptimConfig("SGD"))
    with pytest.raises(ConfigError, match=r"got sparse gradients \(weight\) under deepspeed"):
        check_sparse(config, "deepspeed", torch.device("cpu"), Findings(sparse=("weight",)))


def test_models_that_share_are_not_refused():
    lstm = nn.LSTM(4, 4)  # on a device, its weights are views of one buffer
    flat = torch.cat([p.detach().reshape(-1) for p in lstm.parameters()])
    for parameter, part in zip(lstm.parameters(), flat.split([p.numel() for p in lstm.parameters()]), strict=True):
        parameter.data = part.view(parameter.shape)
    check_model("deepspeed", Findings(), lstm, 3)
    tied = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    tied[1].weight = tied[0].weight
    check_model("deepspeed", Findings(), tied, 3)


def copies(stage: int) -> bool:
    """In a worker: whether the optimizer updates the model's own weights."""
    backend = backends.create(cell("Base", f"deepspeed:{stage}"), this_world())
    model = nn.Linear(400, 400)
    _, optimizer = backend.prepare(model, optim.factory(OptimConfig("SGD", momentum=0.9)))
    with backend.accumulate(last=True):
        backend.backward(backend.engine(torch.ones(2, 400)).square().mean())
    backend.step(None, measure=False)
    (flat,) = optimizer.state
    own = model.weight.ds_tensor if stage == 3 else model.weight
    return flat.untyped_storage().data_ptr() == own.untyped_storage().data_ptr()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_one_copy_of_the_weights_is_kept(stage: int):
    assert run_ranks(copies, 2, stage) == [True, True]


def settings(stage: int, weights: int, ranks: int) -> dict:
    world = dataclasses.replace(ALONE, size=ranks)
    return engine_config(cell("Base", f"deepspeed:{stage}"), weights, world)["zero_optimization"]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("weights", [1, 2485, 1 << 21, 101_000_003, 70_000_000_000])
def test_buckets_hold_a_small_model_and_little_of_a_large_one(weights: int, ranks: int):
    for stage in (1, 2, 3):
        sizes = {key: value for key, value in settings(stage, weights, ranks).items() if "bucket" in key}
        assert len(sizes) == 2
        for size in sizes.values():
            assert size % (2 * ranks) == 0
            assert size - 2 * ranks < min(weights, max(1 << 21, weights // 32)) <= size
    assert settings(3, weights, ranks)["stage3_max_reuse_distance"] <= size


def test_layers_go_after_forward():
    """Of a model that is not small, at stage 3: what is gathered in its forward is not kept for the backward."""
    kept = run_ranks(gathered, 2)
    assert kept[0] == kept[1] <= 14


def gathered() -> int:
    """In a worker: how many of 20 layers are whole after the third forward, when their order is known."""
    backend = backends.create(cell("Base", "deepspeed:3"), this_world())
    model = nn.Sequential(*(nn.Linear(600, 600) for _ in range(20)))
    called, _ = backend.prepare(model, optim.factory(OptimConfig("SGD", lr=1e-3)))
    for _ in range(3):
        with backend.accumulate(last=True):
            loss = called(torch.ones(2, 600)).square().mean()
            whole = sum(layer.weight.numel() > 0 for layer in model)
            backend.backward(loss)
        backend.step(None, measure=False)
    return whole
