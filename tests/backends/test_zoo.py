"""Models of many kinds under every backend: each trains as in one process, or is refused by a line before a start."""

import dataclasses
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from dist_train.backends.buffers import Buffers
from dist_train.backends.ddp import DDP
from dist_train.backends.fsdp2 import FSDP2
from dist_train.backends.probe import NOTHING
from dist_train.config.tree import Config, OptimConfig
from dist_train.models.statistics import Statistics
from dist_train.tools.agreement import Difference, difference

from parity_cells import BACKENDS, TOLERANCE
from workers import run_ranks
from zoo_cells import ADAMW, GLOBAL_BATCH, SAVED_AT, Outcome, config, go_on_elsewhere, run_cells
from zoo_libraries import LIBRARIES

pytestmark = pytest.mark.filterwarnings("ignore")  # of what is deprecated, and tested all the same

SGD = OptimConfig(name="SGD", lr=4.0)  # updates that are large beside the rounding of weights, though clipped
MOMENTUM = OptimConfig(name="SGD", lr=0.1, momentum=0.9)
ADAGRAD = OptimConfig(name="Adagrad", lr=0.02)
DEEPSPEED = tuple(name for name in BACKENDS if name.startswith("deepspeed"))
SEVERAL = tuple(BACKENDS)


@dataclasses.dataclass(frozen=True)
class Row:
    """What holds of a kind of model.

    Args:
        title: for people.
        kinds: classes of zoo.py.
        refused: backends that refuse it, and the line with which they do.
        optimizer: with which it is trained.
        statistics: it computes with statistics of what a rank sees at once, and remembers them: the same as one process
            whose micro-batches are the ranks' shares, but for what it remembers.
        resumed: it is tried to resume its runs.
    """

    title: str
    kinds: tuple[str, ...]
    refused: dict[str, str] = dataclasses.field(default_factory=dict)
    optimizer: OptimConfig = ADAMW
    statistics: bool = False
    resumed: bool = False


def by(backends: tuple[str, ...], line: str) -> dict[str, str]:
    return dict.fromkeys(backends, line)


TABLE = (
    Row("BatchNorm, of all samples of a step", ("BatchNorm1d", "BatchNorm2d"), resumed=True),
    Row("BatchNorm, of groups of samples", ("BatchNormGroups",), resumed=True),
    Row("other layers that keep statistics", ("InstanceNormStats", "Counts"), statistics=True, resumed=True),
    Row("norms over a batch that are frozen in eval", ("FrozenNorm",)),
    Row("LayerNorm, RMSNorm, GroupNorm", ("SampleNorms",)),
    Row("buffers that stay as they are, also unsaved ones; extra state", ("Buffers", "ExtraState"), resumed=True),
    Row(
        "spectral and weight norm, as a parametrization and as a hook",
        ("SpectralNorm", "SpectralNormHook", "WeightNorm", "WeightNormHook"),
        resumed=True,
    ),
    Row("Embedding, EmbeddingBag", ("Embedding", "EmbeddingBag")),
    Row(
        "embeddings with sparse gradients, under SGD or Adagrad",
        ("SparseEmbedding",),
        refused=by(
            ("fsdp2", *DEEPSPEED),
            r"model: got sparse gradients \(table.weight\) under .*; give the embedding dense ones with sparse=False",
        ),
        optimizer=ADAGRAD,
        resumed=True,
    ),
    Row(
        "embeddings with `max_norm`",
        ("MaxNorm",),
        refused=by(
            SEVERAL, r"model: got a forward that changes weights in place \(table.weight\), .* without torchrun"
        ),
    ),
    Row("LSTM, GRU", ("Recurrent",)),
    Row("attention, transformer layers", ("Attention",)),
    Row("convolutions, also depthwise and transposed", ("Convolutions",)),
    Row("weights that are not contiguous, as of `channels_last`", ("ChannelsLast",), resumed=True),
    Row("tied weights, also across blocks", ("Tied",), resumed=True),
    Row("frozen weights", ("FrozenBackbone", "FrozenBias"), resumed=True),
    Row("weights that no step uses", ("UnusedHead",), resumed=True),
    Row("scalar weights", ("Scalars",), resumed=True),
    Row(
        "weights without elements",
        ("Empty",),
        refused=by(("deepspeed:3",), r"model: got weights of no elements \(prompt\)"),
        resumed=True,
    ),
    Row(
        "complex weights and buffers",
        ("Complex",),
        refused=by(DEEPSPEED[1:], r"model: got weights in complex64 \(filter\), expected float32 alone under ZeRO"),
        resumed=True,
    ),
    Row("lazy modules", ("Lazy",)),
    Row("a model that is one layer; weights in lists and dictionaries", ("Bare", "Lists")),
    Row("autograd functions of your own", ("OwnFunction",)),
    Row("activation checkpointing, reentrant or not", ("Recomputed",)),
    Row("a forward that changes its input in place", ("InPlace",)),
    Row("torchvision's ResNet-18 with frozen norms, and its vision transformer", ("ResNet18", "VisionTransformer")),
    Row(
        "an encoder or a decoder of transformers, also with its activation checkpointing",
        ("Bert", "BertRecomputed", "Llama"),
    ),
    Row("one with frozen layers, or with adapters of PEFT (LoRA)", ("BertFrozen", "BertLora"), resumed=True),
)
ROWS = {kind: row for row in TABLE for kind in row.kinds}


def cell(kind: str, backend: str = "single", ranks: int = 2, alone: bool = False, **changed) -> Config:
    """A run; `alone` is its reference in one process.

    Args:
        kind: of model.
        backend: that trains it.
        ranks: that the run, or the one that is compared, has.
        alone: in one process.
        changed: what is not as in the row.
    """
    row = ROWS[kind]
    n = 24 if row.statistics else {2: 28}.get(ranks, 26)  # of steps that ranks share evenly; else the last is ragged
    size = GLOBAL_BATCH // ranks if row.statistics and alone else None
    given = {"n": n, "optimizer": row.optimizer, "micro_batch_size": size} | changed
    return config(kind, backend, **given)


@cache
def reference(kind: str, place: Path, ranks: int = 2) -> Outcome:
    (found,) = run_cells([(cell(kind, ranks=ranks, alone=True), ROWS[kind].resumed)], place / f"single-{kind}-{ranks}")
    assert found.run, found.refused or found.broke
    assert found.written and found.resumed is not False
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for all checkpoints here."""
    return tmp_path_factory.mktemp("zoo")


def outcomes(cell: Config, ranks: int, resumes: bool, place: Path) -> list[Outcome]:
    """By rank."""
    return [each for (each,) in run_ranks(run_cells, ranks, [(cell, resumes)], place, timeout_s=60)]


def far(kind: str, found: Outcome, expected: Outcome) -> Difference:
    """How far a run is from its reference, in what they should have in common."""
    runs = [found.run, expected.run]
    if ROWS[kind].statistics:
        # is by what they remember
        runs = [dataclasses.replace(run, buffers={}, evaluation={"eval/loss": 1.0}) for run in runs]
    return difference(*runs)


def differing(by_rank: list[Outcome]) -> set[str]:
    """Parameters and buffers that are not the same on all ranks."""
    first, *others = (each.held for each in by_rank)
    assert all(other.keys() == first.keys() for other in others)
    return {name for name in first if any(not np.array_equal(first[name], other[name]) for other in others)}


def hold(kind: str, backend: str, by_rank: list[Outcome], expected: Outcome) -> None:
    """Fails where a cell is not as the table says."""
    first = by_rank[0]
    assert not first.broke, first.broke
    line = ROWS[kind].refused.get(backend)
    if line is not None:
        assert all(re.match(line, each.refused) and "\n" not in each.refused for each in by_rank), first
        return
    assert not first.refused, first.refused
    found = far(kind, first, expected)
    assert found.worst < TOLERANCE["float32"], found
    assert not differing(by_rank)
    assert first.written, "the checkpoint and the weights of the end differ"
    assert first.resumed is not False, "a resumed run ends otherwise"


# Of all kinds: accelerate drives what ddp has, and ZeRO 2 lies between 1 and 3.
RARE = ("accelerate", "deepspeed:2")
# Kinds of which every day only what sees another side of a backend is tried.
ELSEWHERE = dict.fromkeys(LIBRARIES, ("deepspeed:0", "deepspeed:1"))
ELSEWHERE |= dict.fromkeys(
    ("ResNet18", "VisionTransformer", "BertRecomputed", "Llama", "BertFrozen"), ("accelerate", *DEEPSPEED[:3])
)
CELLS = [
    pytest.param(backend, kind, marks=pytest.mark.full if backend in ELSEWHERE.get(kind, RARE) else ())
    for backend in BACKENDS
    for kind in ROWS
]


@pytest.mark.parametrize(("backend", "kind"), CELLS)
def test_a_model_trains_as_in_one_process_or_is_refused(kind: str, backend: str, place: Path):
    by_rank = outcomes(cell(kind, backend), 2, ROWS[kind].resumed, place / f"{backend}-{kind}")
    hold(kind, backend, by_rank, reference(kind, place))


@pytest.mark.full
@pytest.mark.parametrize("kind", [kind for kind in ROWS if "fsdp2" not in ROWS[kind].refused])
def test_a_model_that_is_started_without_a_whole_copy(kind: str, place: Path):
    by_rank = outcomes(cell(kind, "fsdp2:sharded"), 2, ROWS[kind].resumed, place / f"sharded-{kind}")
    hold(kind, "fsdp2", by_rank, reference(kind, place))


@pytest.mark.parametrize("backend", ["ddp", "fsdp2"])
@pytest.mark.parametrize("ranks", [3, pytest.param(4, marks=pytest.mark.full)])
def test_uneven_and_empty_shares(ranks: int, backend: str, place: Path):
    """The last step of an epoch has two samples."""
    kinds = ("Scalars", "ChannelsLast", "Tied", "Embedding", "Recurrent", "Attention", "SampleNorms")
    kinds += ("BatchNorm2d", "BatchNormGroups")
    kinds += ("SparseEmbedding",) if backend == "ddp" else ("Empty",)
    if ranks == 3:
        kinds += ("BertLora",) if backend == "ddp" else ("Bert",)
    runs = [(cell(kind, backend, ranks), True) for kind in kinds]
    by_rank = run_ranks(run_cells, ranks, runs, place / f"{backend}-{ranks}", timeout_s=120)
    for kind, *each in zip(kinds, *by_rank, strict=True):
        hold(kind, backend, each, reference(kind, place, ranks))


@pytest.mark.full
@pytest.mark.parametrize("backend", BACKENDS)
def test_uneven_and_empty_shares_of_models_of_libraries(backend: str, place: Path):
    kinds = ("ResNet18", "VisionTransformer", "Bert", "BertLora", "Llama")
    runs = [(cell(kind, backend, 3), False) for kind in kinds]
    by_rank = run_ranks(run_cells, 3, runs, place / f"{backend}-3-libraries", timeout_s=120)
    for kind, *each in zip(kinds, *by_rank, strict=True):
        hold(kind, backend, each, reference(kind, place, 3))


@pytest.mark.parametrize(("first", "second"), [("fsdp2", "deepspeed:3"), ("deepspeed:2", "ddp")])
@pytest.mark.parametrize("kind", ["BertFrozen", "BertLora"])
def test_a_run_with_frozen_weights_goes_on_under_another_backend(kind: str, first: str, second: str, place: Path):
    cells = cell(kind, first), cell(kind, second)
    found = run_ranks(go_on_elsewhere, 2, *cells, place / f"{first}-{second}-{kind}", timeout_s=60)[0]
    assert not found.broke, found.broke
    expected = reference(kind, place).run
    rest = {"losses": expected.losses[SAVED_AT:], "grad_norms": expected.grad_norms[SAVED_AT:]}
    run = dataclasses.replace(found.run, update=expected.update)  # of the whole run, beside which weights are held
    assert difference(run, dataclasses.replace(expected, **rest)).worst < TOLERANCE["float32"]


# Settings that go another way through the step than those of the table.
SETTINGS = (
    *(
        (kind, {"micro_batch_size": 2, "clips": True, "optimizer": optimizer})
        for kind, optimizer in (
            *(("Scalars", MOMENTUM), ("Empty", MOMENTUM), ("Complex", MOMENTUM), ("ChannelsLast", ADAMW)),
            *(("SparseEmbedding", SGD), ("UnusedHead", MOMENTUM), ("FrozenBias", MOMENTUM)),
        )
    ),
    *((kind, {"clips": True, "precision": "float64"}) for kind in ("Scalars", "Empty", "Complex", "BatchNorm2d")),
    ("BatchNormGroups", {"micro_batch_size": 4, "clips": True}),
)


@pytest.mark.parametrize("backend", ["ddp", "fsdp2"])
def test_accumulated_clipped_and_with_momentum(backend: str, place: Path):
    settings = [each for each in SETTINGS if backend not in ROWS[each[0]].refused]
    runs = [(cell(kind, backend, **changed), True) for kind, changed in settings]
    by_rank = run_ranks(run_cells, 2, runs, place / f"{backend}-settings", timeout_s=120)
    whole = [(cell(kind, **changed | {"micro_batch_size": None}), True) for kind, changed in settings]
    references = run_cells(whole, place / f"{backend}-settings-single")
    for (kind, changed), alone, *each in zip(settings, references, *by_rank, strict=True):
        assert alone.run and alone.resumed, alone
        hold(kind, backend, each, alone)
        assert far(kind, each[0], alone).worst < TOLERANCE[changed.get("precision", "float32")]


SCALED = [(backend, kind) for backend in ("ddp", "fsdp2") for kind in ("Scalars", "Complex", "Empty")]


@pytest.mark.parametrize(("backend", "kind"), [*SCALED, ("ddp", "SparseEmbedding")])
def test_a_scaled_loss(backend: str, kind: str, place: Path):
    """float16 divides gradients of all kinds by the scale: what is left has the norm of float32, but for rounding."""
    by_rank = outcomes(cell(kind, backend, precision="float16"), 2, False, place / f"{backend}-{kind}-float16")
    assert not by_rank[0].broke, by_rank[0].broke
    assert by_rank[0].run.grad_norms == pytest.approx(reference(kind, place).run.grad_norms, rel=0.01)


@pytest.mark.parametrize("backend", ["ddp", "fsdp2", "deepspeed:3"])
def test_a_short_format_of_a_model_whose_outputs_are_no_tensor(backend: str, place: Path):
    """The logits within them are in float32 again before the loss: it is that of float32, but for the rounding within
    the model."""
    by_rank = outcomes(cell("Bert", backend, precision="bfloat16"), 2, False, place / f"{backend}-Bert-bfloat16")
    assert not by_rank[0].broke, by_rank[0].broke
    got, expected = by_rank[0].run, reference("Bert", place).run
    assert got.losses == pytest.approx(expected.losses, rel=0.01) and got.losses != expected.losses
    assert not differing(by_rank)


# -- planted faults ----------------------------------------------------------------------------------------------------


class BuffersOfEachRank(FSDP2):
    def prepare(self, model, optimizer_fn):
        prepared = super().prepare(model, optimizer_fn)
        self.buffers = Buffers(model, NOTHING, 1, skips=False, statistics=Statistics({}, []))
        return prepared


class StatisticsOfEachShare(DDP):
    def take(self, model, hooked=False):
        self.bare = model
        self.buffers = Buffers(model, self.findings, self.world.size, skips=False, statistics=Statistics({}, []))


class WholeWeightsNotExchanged(FSDP2):
    def _sum_whole(self):
        """Nothing."""


class OtherWeightsLeft(DDP):
    def weights(self):
        return {name: value * (1 + 1e-6) for name, value in super().weights().items()}


class MomentsForgotten(DDP):
    def load(self, saved, read):
        """Nothing."""


class NormOfShardsAlone(FSDP2):
    def _norm(self, parameters):
        return super()._norm([p for p in parameters if p.dim()])


class FrozenIsTrained(DDP):
    def prepare(self, model, optimizer_fn):
        return super().prepare(model.requires_grad_(True), optimizer_fn)


class NormsInTraining(DDP):
    def prepare(self, model, optimizer_fn):
        for module in model.modules():
            module.training = True
        return super().prepare(model, optimizer_fn)


FAULTS = (
    (BuffersOfEachRank, "Counts"),
    (StatisticsOfEachShare, "BatchNorm2d"),
    (WholeWeightsNotExchanged, "Scalars"),
    (OtherWeightsLeft, "Tied"),
    (MomentsForgotten, "Tied"),
    (NormOfShardsAlone, "Scalars"),
    (FrozenIsTrained, "BertLora"),
    (NormsInTraining, "FrozenNorm"),
)


@pytest.mark.parametrize(("fault", "kind"), FAULTS)
def test_a_planted_fault_is_caught(fault: type, kind: str, place: Path):
    by_rank = outcomes(cell(kind, f"{__name__}:{fault.__name__}"), 2, True, place / fault.__name__)
    assert by_rank[0].run, by_rank[0]
    with pytest.raises(AssertionError):
        hold(kind, "ddp", by_rank, reference(kind, place))


# -- docs --------------------------------------------------------------------------------------------------------------


def docs_table() -> str:
    """The table of docs/backends.md: a row for each of TABLE."""
    heads = ("`single`", "`ddp`, `accelerate`", "`fsdp2`", "`deepspeed` 0", "1, 2", "3")
    names = ("single", "ddp", "fsdp2", "deepspeed:0", "deepspeed:1", "deepspeed:3")
    lines = [f"| a model with | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    lines += [f"| {row.title} | {' | '.join('no' if n in row.refused else 'yes' for n in names)} |" for row in TABLE]
    return "\n".join(lines) + "\n"


def test_the_docs_have_this_table():
    for row in TABLE:  # whose columns stand for two backends each
        assert ("ddp" in row.refused) == ("accelerate" in row.refused)
        assert ("deepspeed:1" in row.refused) == ("deepspeed:2" in row.refused)
    page = Path(__file__).parents[2] / "docs" / "backends.md"
    assert docs_table() in page.read_text(encoding="utf-8")
