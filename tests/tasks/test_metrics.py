"""Metrics are what scikit-learn and torchmetrics say, for any cut of the samples into batches and ranks."""

import math
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import sklearn.metrics as sk
import torch
import torchmetrics
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dist_train.errors import ConfigError, OwnCodeError
from dist_train.ranks import dist
from dist_train.tasks import METRICS, metric_items
from dist_train.tasks.chosen_metrics import Metrics, make
from dist_train.tasks.exact import exact_sum, exact_sum_of_squares, total, total_of_squares
from dist_train.tasks.metrics import Metric
from dist_train.tasks.number_metrics import R2

from workers import run_ranks

N, CLASSES, IGNORED = 61, 5, 255
FACTS = {"classes": CLASSES, "ignore_index": IGNORED}
Pair = tuple[Tensor, Tensor]


def data_of(kind: str, n: int = N, dtype: torch.dtype = torch.float32) -> Pair:
    """Outputs and targets. One class is never true, another never predicted, and a third neither."""
    g = torch.Generator().manual_seed(4)
    if kind == "multi_label":
        targets = (torch.rand(n, CLASSES, generator=g) < 0.4).float()
        outputs = torch.randn(n, CLASSES, generator=g) + 3 * targets - 1.5
        targets[:, 1], outputs[:, 2], outputs[:, 3], targets[:, 3] = 0, -1, -1, 0
    elif kind == "regression":
        outputs = torch.randn(n, 3, generator=g)
        targets = outputs + 0.5 * torch.randn(n, 3, generator=g)
    else:
        more = (6, 4) if kind == "segmentation" else ()
        outputs = torch.randn(n, CLASSES, *more, generator=g)
        targets = torch.randint(0, CLASSES, (n, *more), generator=g)
        outputs += 2 * torch.nn.functional.one_hot(targets, CLASSES).movedim(-1, 1)  # mostly right
        targets[targets == 1], outputs[:, 2] = 0, -9
        targets[targets == 3], outputs[:, 3] = 0, -9
        if kind == "segmentation":
            targets[torch.rand(targets.shape, generator=g) < 0.2] = IGNORED
    return outputs.to(dtype), targets.to(dtype) if targets.is_floating_point() else targets


def ours(kind: str) -> list[str]:
    return [name.replace("top_k", "top_2") for name in METRICS[kind]]


def as_totals(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() for name, value in sums.items()}


def added(some: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: sum(one[name] for one in some) for name in some[0]}


def values(metrics: Metrics, outputs: Tensor, targets: Tensor) -> dict[str, float]:
    return metrics.values(as_totals(metrics.sums(outputs, targets)))


# -- against others ----------------------------------------------------------------------------------------------------


def of_classes(scores: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """What scikit-learn says of scores [n, classes]."""
    guessed = scores.argmax(1)
    both = {"y_true": true, "y_pred": guessed}
    out = {"accuracy": sk.accuracy_score(**both), "pixel_accuracy": sk.accuracy_score(**both)}
    out["balanced_accuracy"] = np.mean([(guessed == true)[true == c].mean() for c in np.unique(true)])
    out["top_2_accuracy"] = sk.top_k_accuracy_score(true, scores, k=2, labels=range(scores.shape[1]))
    for average, name in (("macro", ""), ("weighted", "/weighted")):
        more = {**both, "average": average, "zero_division": 0}
        out[f"precision{name}"] = sk.precision_score(**more)
        out[f"recall{name}"] = sk.recall_score(**more)
        out[f"f1{name}"] = sk.f1_score(**more)
    return out | {"mean_iou": sk.jaccard_score(**both, average="macro", zero_division=0), "dice": out["f1"]}


def of_labels(logits: np.ndarray, true: np.ndarray) -> dict[str, float]:
    both = {"y_true": true > 0, "y_pred": logits > 0}
    out = {"exact_match": sk.accuracy_score(**both)}
    for average, name in (("macro", ""), ("micro", "/micro")):
        more = {**both, "average": average, "zero_division": 0}
        out[f"precision{name}"] = sk.precision_score(**more)
        out[f"recall{name}"] = sk.recall_score(**more)
        out[f"f1{name}"] = sk.f1_score(**more)
    return out


def of_numbers(guessed: np.ndarray, true: np.ndarray) -> dict[str, float]:
    mse = sk.mean_squared_error(true, guessed)
    out = {"mae": sk.mean_absolute_error(true, guessed), "mse": mse, "rmse": math.sqrt(mse)}
    return out | {"r2": sk.r2_score(true, guessed)}


def sklearn_of(kind: str, outputs: Tensor, targets: Tensor) -> dict[str, float]:
    scores, true = outputs.double().numpy(), targets.numpy()
    if kind == "segmentation":
        scores, true = np.moveaxis(scores, 1, -1).reshape(-1, scores.shape[1]), true.flatten()
        scores, true = scores[true != IGNORED], true[true != IGNORED]
    how = {"multi_label": of_labels, "regression": of_numbers}.get(kind, of_classes)
    return how(scores, true.astype(np.float64) if kind == "regression" else true)


@pytest.mark.parametrize("kind", METRICS)
def test_each_metric_is_scikit_learns(kind: str):
    outputs, targets = data_of(kind)
    got = values(make(ours(kind), FACTS, kind), outputs, targets)
    expected = sklearn_of(kind, outputs, targets)
    assert got == pytest.approx({name: expected[name] for name in got}, rel=1e-12)
    assert {name.partition("/")[0] for name in got} == set(ours(kind)) and min(got.values()) > 0.1


def test_probabilities_stand_for_the_largest_class():
    outputs, targets = data_of("classification")
    metrics = make(ours("classification"), FACTS, "classification")
    soft = torch.nn.functional.one_hot(targets, CLASSES) * 0.6 + 0.08
    assert values(metrics, outputs, soft) == values(metrics, outputs, targets)


def test_numbers_are_one_or_several_a_sample():
    outputs, targets = data_of("regression", dtype=torch.float64)
    metrics = make(ours("regression"), {}, "regression")
    one = values(metrics, outputs[:, 0], targets[:, 0])
    assert one == pytest.approx(of_numbers(outputs[:, 0].numpy(), targets[:, 0].numpy()), rel=1e-12)
    assert one == values(metrics, outputs[:, :1], targets[:, 0]) == values(metrics, outputs[:, 0], targets[:, :1])
    assert metrics.lower_is_better == ("mae", "mse", "rmse")


def test_of_equal_outputs_the_first_class_is_taken_and_what_is_not_a_number_is_wrong():
    metrics = make(["accuracy", "top_2_accuracy"], {"classes": 4}, "classification")
    equal = values(metrics, torch.zeros(8, 4), torch.arange(8) % 4)
    assert equal == {"accuracy": 0.25, "top_2_accuracy": 0.5}
    outputs = torch.eye(4)
    outputs[1, 1] = outputs[2, 0] = float("nan")
    assert values(metrics, outputs, torch.arange(4))["top_2_accuracy"] == 0.75  # 0, 2 by its second place, 3


def test_nothing_to_divide_by_is_not_a_number():
    for kind in METRICS:
        outputs, targets = (one[:0] for one in data_of(kind))
        got = values(make(ours(kind), FACTS, kind), outputs, targets)
        left = {name for name, value in got.items() if not math.isnan(value)}
        assert left == ({name for name in got if "exact" not in name} if kind == "multi_label" else set())


TORCHMETRICS = {
    "classification": [
        {"name": "torchmetrics:Accuracy", "task": "multiclass"},
        {"name": "torchmetrics.classification:MulticlassF1Score", "as": "f1", "zero_division": 0},
        {"name": "torchmetrics.classification:MulticlassF1Score", "as": "each", "average": "none"},
        {"name": "torchmetrics.classification:MulticlassAUROC", "thresholds": 20, "ignore_index": None},
    ],
    "multi_label": [
        "torchmetrics.classification:MultilabelF1Score",
        {"name": "torchmetrics.classification:MultilabelAveragePrecision", "thresholds": 20},
    ],
    "segmentation": ["torchmetrics.classification:MulticlassJaccardIndex"],
    "regression": [
        {"name": "torchmetrics:R2Score", "multioutput": "raw_values"},
        "torchmetrics:MeanSquaredError",
        "torchmetrics:ExplainedVariance",
    ],
}


def by_themselves(kind: str, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """What torchmetrics' own objects say of the whole."""
    of = torchmetrics.classification
    scores = {"multi_label": outputs.sigmoid(), "regression": outputs}.get(kind, outputs.softmax(1))
    made = {
        "classification": {
            "Accuracy": of.MulticlassAccuracy(CLASSES, average="micro"),
            "f1": of.MulticlassF1Score(CLASSES),
            "each": of.MulticlassF1Score(CLASSES, average="none"),
            "MulticlassAUROC": of.MulticlassAUROC(CLASSES, thresholds=20),
        },
        "multi_label": {
            "MultilabelF1Score": of.MultilabelF1Score(CLASSES),
            "MultilabelAveragePrecision": of.MultilabelAveragePrecision(CLASSES, thresholds=20),
        },
        "segmentation": {"MulticlassJaccardIndex": of.MulticlassJaccardIndex(CLASSES, ignore_index=IGNORED)},
        "regression": {
            "R2Score": torchmetrics.R2Score(multioutput="raw_values"),
            "MeanSquaredError": torchmetrics.MeanSquaredError(),
            "ExplainedVariance": torchmetrics.ExplainedVariance(),
        },
    }[kind]
    out: dict[str, float] = {}
    for name, metric in made.items():
        metric.update(scores, targets if kind == "regression" else targets.long())
        result = metric.compute()
        several = {f"{name}/{i}": float(value) for i, value in enumerate(result)} if result.dim() else {}
        out |= several or {name: float(result)}
    return out


@pytest.mark.filterwarnings("ignore:No (negative|positive) samples")
@pytest.mark.parametrize("kind", TORCHMETRICS)
def test_metrics_of_torchmetrics_are_what_they_are_there(kind: str):
    outputs, targets = data_of(kind)
    metrics = make(TORCHMETRICS[kind], FACTS, kind)
    got = values(metrics, outputs, targets)
    assert got == pytest.approx(by_themselves(kind, outputs, targets), rel=1e-5)
    assert metrics.lower_is_better == (("MeanSquaredError",) if kind == "regression" else ())
    same = {"f1": "f1", "Accuracy": "accuracy", "MulticlassJaccardIndex": "mean_iou", "MeanSquaredError": "mse"}
    same |= {"MultilabelF1Score": "f1"}
    again = values(make(ours(kind), FACTS, kind), outputs, targets)
    shared = {name: again[same[name]] for name in got if name in same}
    assert shared == pytest.approx({name: got[name] for name in shared}, rel=1e-6) and shared


def test_logits_that_look_like_probabilities_are_logits():
    outputs, targets = torch.full((4, CLASSES), 0.2), torch.ones(4, CLASSES)
    plain = torchmetrics.classification.MultilabelF1Score(CLASSES)
    assert float(plain(outputs, targets.long())) == 0
    metrics = make(["torchmetrics.classification:MultilabelF1Score"], FACTS, "multi_label")
    assert values(metrics, outputs, targets) == {"MultilabelF1Score": 1.0}


# -- sums --------------------------------------------------------------------------------------------------------------


def every(kind: str) -> Metrics:
    return make([*ours(kind), *({**one, "as": f"tm{i}"} for i, one in enumerate(theirs(kind)))], FACTS, kind)


def theirs(kind: str) -> list[dict]:
    return [one if isinstance(one, dict) else {"name": one} for one in TORCHMETRICS[kind]]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Counts and digits are equal, and sums of floats but for the order of their addition."""
    return one.keys() == other.keys() and all(
        torch.equal(a, b) if not a.is_floating_point() else torch.allclose(a, b, rtol=1e-12, atol=1e-12)
        for a, b in ((one[name], other[name]) for name in one)
    )


WHOLE = {kind: every(kind).sums(*data_of(kind)) for kind in METRICS}


@pytest.mark.parametrize("kind", METRICS)
@settings(max_examples=8, deadline=None)
@given(cuts=st.lists(st.integers(0, N), max_size=5))
def test_any_cut_gives_equal_totals(kind: str, cuts: list[int]):
    metrics, (outputs, targets) = every(kind), data_of(kind)
    at = [0, *sorted(cuts), N]
    parts = [metrics.sums(outputs[a:b], targets[a:b]) for a, b in zip(at, at[1:], strict=False)]
    for part in parts:
        assert {name: value.shape for name, value in part.items()} == {k: v.shape for k, v in WHOLE[kind].items()}
    assert same(added(parts), WHOLE[kind])


@pytest.mark.parametrize("kind", METRICS)
def test_an_empty_batch_adds_nothing(kind: str):
    for first in (True, False):  # before and after a batch with samples
        metrics, (outputs, targets) = every(kind), data_of(kind)
        if not first:
            metrics.sums(outputs, targets)
        empty = metrics.sums(outputs[:0], targets[:0])
        assert same(added([empty, WHOLE[kind]]), WHOLE[kind]) and not any(value.any() for value in empty.values())


def shared_out(kind: str, planted: bool) -> dict[str, float]:
    """On a rank of two: the metrics of all samples, a quarter of which the first rank has."""
    mine = (slice(0, N // 4), slice(N // 4, N))[torch.distributed.get_rank()]
    outputs, targets = (one[mine] for one in data_of(kind))
    metrics = every(kind)
    sums = metrics.sums(outputs, targets)
    if planted:  # the mean over the ranks
        some = dist.gather(metrics.values(as_totals(sums)))
        return {name: sum(one[name] for one in some) / len(some) for name in some[0]}
    return metrics.values({name: dist.sum_(value).double() for name, value in sums.items()})


@pytest.mark.parametrize("kind", METRICS)
def test_ranks_agree_and_a_mean_over_ranks_is_seen(kind: str):
    whole = every(kind).values(as_totals(WHOLE[kind]))
    for got in run_ranks(shared_out, 2, kind, False):
        assert got == pytest.approx(whole, rel=1e-12)
    wrong = run_ranks(shared_out, 2, kind, True)[0]
    assert wrong.keys() == whole.keys()
    for name, value in whole.items():
        assert value == 0 or wrong[name] != pytest.approx(value, rel=1e-6), name  # 0: of a class that is not there


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", METRICS)
def test_sums_are_wider_than_float32(kind: str, dtype: torch.dtype):
    metrics, (outputs, targets) = every(kind), data_of(kind, dtype=dtype)
    for name, one in metrics.sums(outputs, targets).items():
        assert one.dtype in (torch.int64, torch.float64), name
    grown = {
        name: value + value * 2**24 if not value.is_floating_point() else value for name, value in WHOLE[kind].items()
    }
    for name, one in added([grown, WHOLE[kind]]).items():
        if not one.is_floating_point():
            assert torch.equal(one, WHOLE[kind][name] * (2**24 + 2)) and torch.equal(one.double().long(), one)


class Waits(Metric):
    def sums(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"x": outputs[outputs > 0].sum()}

    def values(self, sums: dict[str, Tensor]) -> dict[str, float]:
        return {}


@pytest.mark.parametrize("kind", METRICS)
def test_sums_do_not_wait_for_the_device(kind: str):
    """On a device without values, whatever asks for one fails."""
    outputs, targets = (one.to("meta") for one in data_of(kind))
    sums = make(ours(kind), FACTS, kind).sums(outputs, targets)
    assert all(value.device.type == "meta" for value in sums.values())
    with pytest.raises(OwnCodeError, match="NotImplementedError"):
        make([f"{__name__}:Waits"], {}, kind).sums(outputs, targets)


# -- R2 of numbers with a large mean -----------------------------------------------------------------------------------


class Naive(R2):
    """Sums of numbers and of their squares, in float64."""

    def sums(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        outputs, targets = outputs.double(), targets.double()
        residual = (outputs - targets).square().sum(0)
        return {
            "n": torch.tensor(len(targets)),
            "residual": residual,
            "y": targets.sum(0),
            "yy": targets.square().sum(0),
        }

    def values(self, sums: dict[str, Tensor]) -> dict[str, float]:
        return {"": float((1 - sums["residual"] / (sums["yy"] - sums["y"] ** 2 / sums["n"])).mean())}


@pytest.mark.parametrize(("mean", "dtype"), [(0, "float32"), (3e5, "float32"), (1e6, "float64"), (-1e10, "float64")])
def test_r2_of_numbers_with_a_large_mean(mean: float, dtype: str):
    outputs, targets = ((one.double() + mean).to(getattr(torch, dtype)) for one in data_of("regression", 500))
    expected = sk.r2_score(targets.double().numpy(), outputs.double().numpy())
    got = {}
    for metric in (R2(), Naive()):
        parts = [metric.sums(outputs[a:b], targets[a:b]) for a, b in ((0, 7), (7, 7), (7, 333), (333, 500))]
        got[type(metric)] = metric.values(as_totals(added(parts)))[""]
    assert got[R2] == pytest.approx(expected, rel=1e-9)
    assert mean == 0 or got[Naive] != pytest.approx(expected, rel=1e-9)


def test_r2_of_equal_targets_and_of_few():
    metric = R2()

    def of(outputs: list[float], targets: list[float]) -> float:
        return metric.values(as_totals(metric.sums(torch.tensor(outputs), torch.tensor(targets))))[""]

    assert of([0.1, 0.1, 0.1], [0.1, 0.1, 0.1]) == 1 and of([0.1, 0.1, 0.2], [0.1, 0.1, 0.1]) == 0
    assert math.isnan(of([1.0], [1.0])) and math.isnan(of([1.0, math.nan], [1.0, 2.0]))
    assert math.isnan(of([1.0, 2.0], [1.0, math.inf]))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=6), st.sampled_from(["float32", "float64"]))
def test_exact_sums_are_exact(numbers: list[float], dtype: str):
    column = torch.tensor(numbers, dtype=torch.float64).to(getattr(torch, dtype))
    column = torch.where(column.isfinite(), column, 1.0)[:, None].repeat(1, 2)
    of = [Fraction(number) for number in column[:, 0].tolist()]
    assert total(exact_sum(column)) == [sum(of)] * 2 == total(exact_sum(column).double())
    assert total_of_squares(exact_sum_of_squares(column)) == [sum(one * one for one in of)] * 2


# -- the list in the config --------------------------------------------------------------------------------------------


def refused(items: list, kind: str | None = "classification", facts: dict = FACTS) -> str:
    with pytest.raises(ConfigError) as raised:
        make(items, facts, kind)
    assert all(line.startswith("task.metrics: got ") for line in raised.value.lines)
    return str(raised.value)


@pytest.mark.parametrize(
    ("item", "kind", "said"),
    [
        ("acuracy", "classification", "expected one of accuracy, top_k_accuracy,.*did you mean accuracy?"),
        ("r2", "classification", "unknown metric 'r2', expected one of accuracy.*r2 is of the tasks regression"),
        ("f1", None, "expected one of torchmetrics:Class, or your own as module:Class"),
        ("top_k_accuracy", "classification", "the number in the name, such as top_5_accuracy"),
        ({"name": "top_2_accuracy", "k": 3}, "classification", "the number in the name"),
        ("top_5_accuracy", "classification", "top_5_accuracy, but there are 5 classes.*expected a number below 5"),
        ("top_0_accuracy", "classification", "unknown metric 'top_0_accuracy'"),
        (3, "classification", "got 3, expected a name such as accuracy, or {name: NAME"),
        ({"ignore_index": 3}, "classification", "expected a name such as accuracy"),
        ({"name": "f1", "as": "a/b"}, "classification", "'a/b' as the name of f1"),
        ({"name": "f1", "as": "loss"}, "classification", "and not loss"),
        (
            {"name": "f1", "average": "micro"},
            "classification",
            "average for f1, which does not have it; it takes ignore_i",
        ),
        ({"name": "mae", "k": 1}, "regression", "k for mae, which does not have it; it takes no arguments"),
        ({"name": "f1", "ignore_index": "a"}, "classification", "ignore_index: 'a' for f1, expected an integer"),
        ("torchmetrics:R2Scor", "regression", "did you mean torchmetrics:R2Score?"),
        ("torchmetrics:SpearmanCorrCoef", "regression", "of which preds, target is not a sum.*choose another"),
        ("torchmetrics:PearsonCorrCoef", "regression", "of which mean_x.*is not a sum"),
        ("torchmetrics.classification:MulticlassAUROC", "classification", "{name: .*MulticlassAUROC, thresholds: 100}"),
        ("torchmetrics.classification:MulticlassConfusionMatrix", "classification", "is more than a list of numbers"),
        ("torchmetrics:MinMaxMetric", "regression", "without base_metric, expected a value"),
        (
            {"name": "torchmetrics:R2Score", "x": 1},
            "regression",
            "is refused there: .*Unexpected keyword arguments: `x`",
        ),
        ("torchmetrics.utilities:dim_zero_sum", "regression", "without x, expected a value"),
        ("collections:Counter", "regression", "gives Counter, expected a dist_train Metric"),
        ("no_module:A", "regression", "there is no module 'no_module'"),
    ],
)
@pytest.mark.filterwarnings("ignore:Metric `.*` will save all")
def test_a_mistake_in_the_list_is_named(item, kind: str | None, said: str):
    assert re.search(said.replace("?", r"\?"), refused([item], kind)), refused([item], kind)


def test_all_mistakes_are_named_at_once():
    lines = refused(["accuracy", "f2", "accuracy", 3]).splitlines()
    assert len(lines) == 3 and "got two metrics accuracy" in lines[1] and "as: OTHER" in lines[1]


def test_a_missing_fact_is_named():
    item = "torchmetrics.classification:MulticlassF1Score"
    assert f"without num_classes, expected a value, as the data set does not tell it; write {{name: {item}" in refused(
        [item], facts={}
    )
    named = {"name": item, "num_classes": CLASSES}
    assert make([named], {"classes": 3, "size": 4}, "classification").names == ("MulticlassF1Score",)


def test_without_torchmetrics_the_extra_is_named():
    with patch.object(metric_items, "find_spec", lambda name: None):
        (line,) = metric_items.problems(["torchmetrics:R2Score", "mae"], "regression")
        assert "pip install 'dist-train[metrics]', or take one of mae, mse" in line
        assert not list(metric_items.problems(["mae"], "regression"))


@pytest.mark.parametrize(
    ("kind", "outputs", "targets", "said"),
    [
        ("regression", (4, 1), (4, 2), r"outputs of shape \[4, 1\] for targets of shape \[4, 2\]"),
        ("regression", (4, 4), (4,), r"outputs of shape \[4, 4\] for targets of shape \[4\]"),
        (
            "classification",
            (4, 1),
            (4,),
            r"outputs of shape \[4, 1\], expected \[samples, classes, ...\] with at least 2",
        ),
        ("classification", (4, 3), (4, 2), r"targets of shape \[4, 2\] for outputs .* class numbers of shape \[4\]"),
        ("multi_label", (4, 3), (4,), r"targets of shape \[4\] for outputs of shape \[4, 3\]"),
        ("segmentation", (4, 3, 2, 2), (4, 2, 3), r"class numbers of shape \[4, 2, 2\]"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(kind: str, outputs: tuple, targets: tuple, said: str):
    for item in [*METRICS[kind], theirs(kind)[0]]:
        name = "accuracy" if item == "top_k_accuracy" else item
        with pytest.raises(ConfigError, match=said):
            make([name], {"classes": 3}, kind).sums(torch.zeros(outputs), torch.zeros(targets))


def test_class_numbers_that_do_not_exist_are_an_error():
    for wrong in (CLASSES, -1):
        with pytest.raises((RuntimeError, IndexError)):
            make(["f1"], {}, "classification").sums(torch.zeros(2, CLASSES), torch.tensor([0, wrong]))
    metrics = make([theirs("classification")[1]], FACTS, "classification")
    with pytest.raises(ConfigError, match="MulticlassF1Score, whose update is refused there: "):
        metrics.sums(torch.zeros(2, CLASSES), torch.tensor([0, 9]))


OWN = """
import torch
import torchmetrics
from dist_train.tasks.metrics import Metric


class Mean(Metric):
    def __init__(self, classes, scale=1):
        self.by = scale / classes

    def sums(self, outputs, targets):
        return {"sum": outputs.double().sum()}

    def values(self, sums):
        return {"": float(sums["sum"] * self.by), "half": float(sums["sum"] * self.by / 2)}


class Fails(Mean):
    def sums(self, outputs, targets):
        return {"sum": outputs.nothing}


class Theirs(torchmetrics.MeanSquaredError):
    def update(self, outputs, targets):
        super().update(outputs.argmax(1).double(), targets.double())


class FromOne(torchmetrics.Metric):
    def __init__(self):
        super().__init__()
        self.add_state("count", torch.tensor(1), dist_reduce_fx="sum")

    def update(self, outputs, targets):
        self.count += len(outputs)

    def compute(self):
        return self.count
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "own_metrics_of_a_test.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield "own_metrics_of_a_test"


def test_ones_own(own: str):
    outputs, targets = data_of("classification", dtype=torch.float64)
    items = [f"{own}:Mean", {"name": f"{own}:Mean", "scale": 10, "as": "ten"}, f"{own}:Theirs"]
    got = values(make(items, FACTS, "classification"), outputs, targets)
    one = float(outputs.sum()) / CLASSES
    off = float((outputs.argmax(1) - targets).double().square().mean())
    assert got == pytest.approx(
        {"Mean": one, "Mean/half": one / 2, "ten": 10 * one, "ten/half": 5 * one, "Theirs": off}
    )
    with pytest.raises(OwnCodeError, match=r"own_metrics_of_a_test.py.*, line 20"):
        values(make([f"{own}:Fails"], FACTS, None), outputs, targets)


def test_a_state_that_starts_above_0_starts_once(own: str):
    outputs, targets = data_of("classification")
    metrics = make([f"{own}:FromOne"], {}, None)
    parts = [metrics.sums(outputs[some], targets[some]) for some in (slice(0, 9), slice(9, N), slice(N, N))]
    assert metrics.values(as_totals(added(parts))) == {"FromOne": N + 1}
