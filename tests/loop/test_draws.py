"""What is drawn in training is the same at any world size, micro-batch size and backend, compiled or not, and when it
is computed again; see dist_train/models/draws.py."""

import dataclasses
import itertools
import math

import pytest
import torch
from draw_cells import Drawing, Small, cell
from torch import nn

from dist_train.config.tree import CompileConfig, Config
from dist_train.errors import ConfigError
from dist_train.models import draw_bits, draw_functions, draws
from dist_train.models.draws import Draws
from dist_train.run import assemble
from dist_train.tools.agreement import Trajectory, difference
from dist_train.tools.trajectory import depends_on_share, trajectory

from parity_cells import ALONE, BACKENDS, TOLERANCE, run_cells, run_single, this_world
from workers import run_ranks

SEEDS, STEPS, PLACES, SAMPLES, POSITIONS = 2, 12, 12, 24, 256
LIMIT = 5.0  # standard deviations: beyond it in 1 of 10**6 cases


# -- masks ------------------------------------------------------------------------------------------------------------


def masks(seed: int, p: float) -> torch.Tensor:
    """Whether each is kept: bool [steps, places, samples, positions]."""
    model = nn.Sequential()
    found = torch.empty(STEPS, PLACES, SAMPLES, POSITIONS, dtype=torch.bool)
    samples, x, drawing = torch.arange(SAMPLES), torch.ones(SAMPLES, POSITIONS), Draws(seed, 0, model)
    for step in range(STEPS):
        with drawing.of(samples, step):
            for place in range(PLACES):
                found[step, place] = nn.functional.dropout(x, p) > 0
    return found


def furthest(kept: torch.Tensor, p: float) -> float:
    """By how many standard deviations masks are from fair and independent ones: in their mean, in the means along each
    coordinate and each two, and in products of neighbours along each coordinate."""
    x = (kept.float() - (1 - p)) / math.sqrt(p * (1 - p))
    found = [x.sum() / math.sqrt(x.numel())]
    for dim in range(4):
        for apart in (1, 2, 3, 8):
            product = x.narrow(dim, 0, x.size(dim) - apart) * x.narrow(dim, apart, x.size(dim) - apart)
            found.append(product.sum() / math.sqrt(product.numel()))
    for stay in [*itertools.combinations(range(4), 1), *itertools.combinations(range(4), 2)]:
        sums = x.sum([dim for dim in range(4) if dim not in stay])
        sums = sums / math.sqrt(x.numel() / sums.numel())
        found.append((sums.square().sum() - sums.numel()) / math.sqrt(2 * sums.numel()))
    return max(abs(float(value)) for value in found)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_masks_are_fair_and_independent(p: float):
    kept = [masks(seed, p) for seed in range(SEEDS)]
    assert max(furthest(one, p) for one in kept) < LIMIT
    both = [(a ^ b).float().mean() for a, b in itertools.pairwise(kept)]  # of other seeds
    assert max(abs(float(x) - 2 * p * (1 - p)) for x in both) < LIMIT * 0.5 / math.sqrt(kept[0].numel())


def without_a_round(numbers: torch.Tensor, last: bool = False) -> torch.Tensor:
    return numbers.mul_(draw_bits.MIX[0])


BAD = {
    "a hash that only multiplies": ("draw_bits._stirred", without_a_round),
    "the step left out": ("draws.mixed_number", lambda number: 1),
    "the place left out": ("draw_places.ODD", 0),
    "the sample left out": (
        "draws.sample_keys", lambda step, samples: draw_bits.mixed(torch.full((len(samples) + 1,), step)),
    ),
    "the position left out": (
        "draw_bits._numbers", lambda length, first, device: torch.zeros(length, dtype=torch.int32, device=device),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_hash_is_seen(name: str, monkeypatch: pytest.MonkeyPatch):
    attribute, bad = BAD[name]
    monkeypatch.setattr(f"dist_train.models.{attribute}", bad)
    monkeypatch.setattr(draw_bits, "TABLES", {})
    assert furthest(masks(0, 0.5), 0.5) > LIMIT


def test_every_kind_of_dropout_keeps_the_mean():
    """And the second moment, where it is promised."""
    torch.manual_seed(0)
    x, of = torch.randn(64, 32, 6, 6), Draws(0, 0, nn.Sequential())
    images, channels, alpha, feature = (
        kind(0.3) for kind in (nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout)
    )
    with of.of(torch.arange(64), 7):
        a, b, c, d = images(x + 1), channels(x + 1), alpha(x), feature(x)
        e = nn.Dropout1d(0.3)(x.flatten(2)), nn.Dropout3d(0.3)(x.unsqueeze(2))
    assert abs(float(a.mean()) - 1) < 0.02 and abs(float(b.mean()) - 1) < 0.06
    assert abs(float(c.mean())) < 0.02 and abs(float(c.var()) - 1) < 0.02
    assert abs(float(d.mean())) < 0.1 and abs(float(d.var()) - 1) < 0.1
    for one in (b, *e):  # whole channels
        zeros = (one.flatten(2) == 0).float().mean(2)
        assert set(zeros.unique().tolist()) == {0.0, 1.0} and 0.2 < float(zeros.mean()) < 0.4


def test_a_padded_tensor_has_the_same_masks():
    """So that a micro-batch may be padded to its own longest sequence."""
    drop, of = nn.Dropout(0.5), Draws(0, 0, nn.Sequential())

    def dropped(length: int) -> torch.Tensor:
        with of.of(torch.arange(8), 1):
            return drop(torch.ones(8, 2, length, length))

    assert torch.equal(dropped(12)[..., :9, :9], dropped(9))


# -- a model ----------------------------------------------------------------------------------------------------------


def outputs(model: nn.Module, ids: torch.Tensor, step: int = 3, seed: int = 5, rank: int = 0) -> torch.Tensor:
    """What it gives for samples that are a function of their numbers."""
    x = torch.stack([torch.randn(1, 6, 6, generator=torch.Generator().manual_seed(int(i))) for i in ids])
    with Draws(seed, rank, model).of(ids, step):
        return model(x)


def looked_at(again: bool = False, kind: type[nn.Module] = Drawing) -> nn.Module:
    torch.manual_seed(0)
    model = kind((1, 6, 6), 10, **({"again": True} if again else {}))
    draws.frame(model, None, parts=False)
    with draws.looking(Draws(5, 0, model), torch.arange(2)):
        model(torch.zeros(2, 1, 6, 6))
    draws.settle(model)
    return model


def test_a_sample_has_its_masks_in_any_batch():
    """Of six samples too, as many as there are words: sequences come before batches in one of the layers."""
    model, ids = looked_at(), torch.randperm(100)[:14]
    whole = outputs(model, ids)
    pieces = [outputs(model, ids[a:b], rank=a) for a, b in ((0, 6), (6, 13), (13, 14))]
    assert torch.allclose(whole, torch.cat(pieces), atol=1e-5)
    for other in (outputs(model, ids, step=4), outputs(model, ids, seed=6), outputs(model, ids + 1000)):
        assert (whole - other).abs().mean() > 0.05


def test_a_second_pass_over_a_step_draws_anew():
    """As the discriminator's, after the generator's, in a loop of the user's own."""
    of, x = Draws(0, 0, nn.Sequential()), torch.ones(4, 100)
    with of.of(torch.arange(4), 1):
        first = nn.functional.dropout(x)
    with of.of(torch.arange(4), 1, again=1):
        assert not torch.equal(nn.functional.dropout(x), first)


def test_torchs_own_functions_come_back():
    names = ("dropout", "dropout2d", "alpha_dropout", "scaled_dot_product_attention", "multi_head_attention_forward")
    before = [getattr(nn.functional, name) for name in names]
    drawing = Draws(0, 0, looked_at())
    with pytest.raises(KeyError), drawing.of(torch.arange(4), 0):
        assert nn.functional.dropout is not before[0]
        raise KeyError
    assert [getattr(nn.functional, name) for name in names] == before


def test_what_is_computed_again_is_dropped_again():
    """torch.utils.checkpoint, in functions that use one dropout layer twice, of a block that is used twice."""
    ids = torch.arange(9)
    grads = []
    for again in (False, True):
        model = looked_at(again)
        with Draws(5, 0, model).of(ids, 3):
            model(torch.randn(9, 1, 6, 6, generator=torch.Generator().manual_seed(0))).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_count_that_goes_on_when_computed_again_is_seen(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(type(draws.now), "_heard", lambda now: len(now.past) - 1)
    with pytest.raises(AssertionError):
        test_what_is_computed_again_is_dropped_again()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler's own, which it means to hide
def test_compiled_as_it_is_and_layer_by_layer():
    """As DDP and FSDP2 do. Without a break, and all blocks are one graph."""
    ids = torch.randperm(100)[:14]
    whole, layers = looked_at(kind=Small), looked_at(kind=Small)
    expected = outputs(whole, ids)
    compiled(whole)
    assert torch.allclose(outputs(whole, ids), expected, atol=1e-5)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for block in layers.blocks:
        compiled(block)
    assert torch.allclose(outputs(layers, ids), expected, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1


def compiled(module: nn.Module) -> None:
    inner = module.forward
    module.forward = torch.compile(lambda x: inner(x), fullgraph=True)


# -- runs -------------------------------------------------------------------------------------------------------------

# A micro-batch of six samples is among these pieces.
CUTS = (None, 13, 4)
WORLDS = (1, 2, 3)
DIAGONAL = [(backend, 2 + i % 2, CUTS[i % 3]) for i, backend in enumerate(BACKENDS)]
REST = [cell for cell in itertools.product(BACKENDS, WORLDS, CUTS) if cell not in DIAGONAL]


def precisions(backend: str) -> list[str]:
    return ["float32"] if backend.startswith("deepspeed") else ["float32", "float64"]


@pytest.fixture(scope="module")
def alone() -> dict[str, Trajectory]:
    return {precision: run_single(cell(precision=precision)) for precision in TOLERANCE}


@pytest.mark.parametrize(
    ("backend", "ranks", "cut"), [*DIAGONAL, *(pytest.param(*each, marks=pytest.mark.full) for each in REST)]
)
def test_a_model_that_draws_agrees_everywhere(backend: str, ranks: int, cut: int | None, alone: dict[str, Trajectory]):
    kinds = precisions(backend)
    ran = run_ranks(run_cells, ranks, [cell(backend, cut, precision=precision) for precision in kinds])[0]
    for precision, one in zip(kinds, ran, strict=True):
        assert difference(one, alone[precision]).worst < TOLERANCE[precision], precision


def test_it_draws(alone: dict[str, Trajectory]):
    """Or the others would show nothing."""
    with_torch = run_single(cell(precision="float64", draws="torch"))
    assert difference(with_torch, alone["float64"]).worst > 0.01
    assert difference(run_single(cell(precision="float64", seed=0)), alone["float64"]).worst == 0.0


def by_ranks_own_numbers(self, samples, step, again, on_device):
    return draw_bits.sample_keys(draw_bits.mixed_number(step), torch.arange(len(samples)))


def by_micro_batch(self, samples, step, again, on_device):
    return draw_bits.sample_keys(draw_bits.mixed_number(int(samples.sum()) + step), samples)


FAULTS = {"the rank's own numbers": (by_ranks_own_numbers, 2, None), "the micro-batch": (by_micro_batch, 0, 13)}


def faulty(fault: str, made: Config) -> Trajectory:
    """In a worker: a run with keys that are made otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Draws, "keys", FAULTS[fault][0])
        return trajectory(made, this_world())


@pytest.mark.parametrize("fault", FAULTS)
def test_keys_of_something_else_are_seen(fault: str):
    _, ranks, cut = FAULTS[fault]
    whole = faulty(fault, cell())
    cut_up = cell("ddp" if ranks else "single", cut)
    ran = run_ranks(faulty, ranks, fault, cut_up)[0] if ranks else faulty(fault, cut_up)
    assert difference(ran, whole).worst > 0.01


@pytest.mark.full
@pytest.mark.parametrize(("name", "scope"), [("Small", "model"), ("Drawing", "model"), ("Drawing", "step")])
def test_a_compiled_run(name: str, scope: str):
    made = cell(name=name, precision="float64")
    compiled = dataclasses.replace(made, compile=CompileConfig("default", scope, fullgraph=True))
    assert difference(run_single(compiled), run_single(made)).worst < TOLERANCE["float64"]


@pytest.mark.parametrize("cut", CUTS)
def test_a_step_that_is_captured(cut: int | None, alone: dict[str, Trajectory]):
    """Its keys are made on the device, of a number of the step that only the device knows."""
    made = dataclasses.replace(cell(micro_batch_size=cut, precision="float64"), compile=CompileConfig(scope="step"))
    assert difference(run_single(made), alone["float64"]).worst < TOLERANCE["float64"]


# -- what is drawn otherwise -------------------------------------------------------------------------------------------


def test_what_draws_otherwise_is_named():
    def seen(name: str, **given) -> tuple[str, ...]:
        return assemble.build(cell(name=name, **given), torch.device("cpu")).findings.draws

    assert seen("Drawing") == ()
    (noise,) = seen("Noisy", args={"p": 0.5})
    assert noise.startswith("randn_like (draw_cells.py:")
    assert seen("Tossing") == ("a generator of random or NumPy",)
    drop = seen("Noisy", args={"p": 0.5}, draws="torch")[1]
    assert drop.startswith("bernoulli_ in drop (draw_cells.py:")


def test_parity_names_it():
    made = cell(name="Noisy")
    why = depends_on_share(made, ALONE, trajectory(made, ALONE), 1e-5)
    assert "draws by randn_like (draw_cells.py:" in why
    assert depends_on_share(cell(), ALONE, trajectory(cell(), ALONE), 1e-5) == ""


def test_a_tensor_without_samples_is_one_line():
    with (
        pytest.raises(
            ConfigError, match=r"train.draws: got dropout of a tensor \[7, 3\] in a batch of 4 samples \(.*:"
        ),
        Draws(0, 0, nn.Sequential()).of(torch.arange(4), 0),
    ):
        nn.functional.dropout(torch.ones(7, 3))


def test_what_all_samples_share_is_drawn_once_a_step():
    """A weight, and what has one row: the same in every micro-batch, and another at the next step."""
    weight, places, of = nn.Parameter(torch.ones(8, 300)), torch.ones(1, 300), Draws(0, 0, nn.Sequential())

    def drawn(ids: torch.Tensor, step: int) -> torch.Tensor:
        with of.of(ids, step):
            return torch.cat([nn.functional.dropout(weight), nn.functional.dropout(places)])

    one, again, later = drawn(torch.arange(8), 0), drawn(torch.arange(50, 60), 0), drawn(torch.arange(8), 1)
    assert torch.equal(one, again) and not torch.equal(one, later)


def test_attention_is_torchs_own_but_for_the_mask(monkeypatch: pytest.MonkeyPatch):
    """With all kinds of masks, fewer heads of keys, another scale, and queries that may look at nothing."""
    monkeypatch.setattr(draw_functions, "_kept", lambda x, shape, p, scale: torch.ones(shape))
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 4, 5, 8), torch.randn(3, 2, 7, 8), torch.randn(3, 2, 7, 8)
    allowed = torch.rand(3, 1, 5, 7) < 0.6
    allowed[0, 0, 0] = False
    same = torch.randn(3, 4, 5, 8)
    for given in (
        {"key": same, "value": same},
        {"key": same, "value": same, "is_causal": True, "scale": 0.3},
        {"key": k, "value": v, "attn_mask": allowed, "enable_gqa": True},
        {"key": k, "value": v, "attn_mask": torch.randn(5, 7), "enable_gqa": True, "is_causal": False},
    ):
        expected = nn.functional.scaled_dot_product_attention(q, **given)
        with Draws(0, 0, nn.Sequential()).of(torch.arange(3), 0):
            found = nn.functional.scaled_dot_product_attention(q, dropout_p=0.5, **given)
        assert torch.allclose(found, expected, atol=1e-5), given.keys()
