"""What a first look at a model tells, and that it leaves no trace."""

import dataclasses
import random
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dist_train.backends.probe import Findings, probe
from dist_train.config.load import load
from dist_train.errors import ConfigError
from dist_train.run import assemble
from dist_train.run.look import check_shares

X, Y = torch.randn(2, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 2])
DIGITS = ["--train.device", "cpu", "--data.name", "digits"]


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.out = nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.out(self.body(x).relu())


class Unused(Base):
    def __init__(self):
        super().__init__()
        self.other, self.frozen = nn.Linear(6, 3), nn.Linear(2, 2).requires_grad_(False)


class Written(Base):
    def forward(self, x):
        with torch.no_grad():
            self.body.weight.clamp_(-0.1, 0.1)
        return super().forward(x)


class WrittenThroughData(Base):
    def forward(self, x):
        self.out.weight.data[0, 0] += 1e-3
        return super().forward(x)


class Remembers(Base):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("constant", torch.ones(3))

    def forward(self, x):
        self.calls = self.calls + 1  # another tensor, not a write
        return self.out(self.norm(self.body(x))) * self.constant


class Embeds(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.out = nn.Embedding(5, 3, sparse=True), nn.Linear(3, 3)

    def forward(self, x):
        return self.out(self.table((x[:, 0] > 0).long()))


class DropsALayer(Base):
    def forward(self, x):
        return super().forward(x) if torch.rand(()) > -1 else self.out(x[:, :6])


class DropsByPython(Base):
    def forward(self, x):
        return super().forward(x) if random.random() > -1 else self.out(x[:, :6])


class DropsByNumpy(Base):
    def forward(self, x):
        return super().forward(x) if np.random.rand() > -1 else self.out(x[:, :6])


class DropsUnits(Base):
    def forward(self, x):
        return super().forward(F.dropout(x, 0.5))


ON_HOST = ("a generator of random or NumPy",)


def found(model: nn.Module) -> Findings:
    return probe(model, lambda: F.cross_entropy(model(X), Y))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Base, Findings()),
        (DropsUnits, Findings(draws=("bernoulli_",))),
        (Unused, Findings(unused=("other.weight", "other.bias"))),
        (Written, Findings(written=("body.weight",))),
        (WrittenThroughData, Findings(written=("out.weight",))),
        (
            Remembers,
            Findings(buffers=("calls", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked")),
        ),
        (Embeds, Findings(sparse=("table.weight",))),
        (DropsALayer, Findings(varies=True, draws=("rand",))),
        (DropsByPython, Findings(varies=True, draws=ON_HOST)),
        (DropsByNumpy, Findings(varies=True, draws=ON_HOST)),
    ],
)
def test_what_a_first_look_tells(kind: type[nn.Module], expected: Findings):
    got = found(kind())
    names = tuple(draw.partition(" (test_probe.py:")[0] for draw in got.draws)
    assert dataclasses.replace(got, draws=names) == expected


def test_a_first_look_leaves_no_trace():
    model = Remembers()
    model.register_buffer("scratch", torch.zeros(2), persistent=False)
    others = DropsUnits(), DropsByPython(), DropsByNumpy()
    places = dict(model.named_buffers())
    values = {name: value.clone() for name, value in model.state_dict().items()}
    drawn = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    for each in (model, *others):
        found(each)
    assert all(value is places[name] for name, value in model.named_buffers())
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), drawn[0]) and random.getstate() == drawn[1]
    assert np.array_equal(np.random.get_state()[1], drawn[2])


def test_a_model_that_is_only_evaluated_takes_no_gradients():
    model = Unused()
    taken = []
    model.out.weight.register_hook(taken.append)
    assert probe(model, lambda: F.cross_entropy(model(X), Y), trains=False) == Findings()
    assert not taken


# -- as a run does it --------------------------------------------------------------------------------------------------


class Digits(nn.Module):
    """Outputs as told."""

    def __init__(self, input_shape, classes, kind="right"):
        super().__init__()
        self.kind, self.layer = kind, nn.Linear(64, classes)

    def forward(self, x):
        logits = self.layer(x.flatten(1))
        return {
            "right": logits,
            "dict": {"scores": logits},
            "pair": (logits, logits),
            "few": logits[:, :7],
            "wide": torch.cat([logits, logits], 1),
            "flat": logits.flatten(),
            "whole": logits.long(),
        }[self.kind]


class LazyDigits(nn.Sequential):
    def __init__(self, input_shape, classes):
        super().__init__(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(classes))


class KeepsText(Digits):
    def get_extra_state(self):
        return {"words": ["a"]}

    def set_extra_state(self, state):
        pass


class Clamped(Digits):
    def forward(self, x):
        self.layer.weight.data.clamp_(-0.05, 0.05)
        return super().forward(x)


def built(model: str, *argv: str) -> assemble.Parts:
    return assemble.build(load([*DIGITS, "--model.name", f"{__name__}:{model}", *argv]), torch.device("cpu"))


@pytest.mark.parametrize(("kind", "got"), [("dict", "dict"), ("pair", "tuple")])
def test_outputs_that_are_no_tensor_are_refused(kind: str, got: str):
    with pytest.raises(ConfigError, match=f"^model: got outputs of type {got}, expected a tensor, or one as logits"):
        built("Digits", "--model.args.kind", kind)


@pytest.mark.parametrize(
    ("kind", "got"),
    [
        ("few", r"torch.float32 \[2, 7\]"),
        ("flat", r"torch.float32 \[20\]"),
        ("whole", r"torch.int64 \[2, 10\]"),
    ],
)
def test_outputs_of_another_shape_are_refused(kind: str, got: str):
    with pytest.raises(ConfigError, match=rf"^model: got outputs (of )?{got}, expected a float tensor \[2, 10\]"):
        built("Digits", "--model.args.kind", kind)


def test_more_outputs_than_classes_are_no_mistake_but_for_vectors():
    built("Digits", "--model.args.kind", "wide")
    with pytest.raises(ConfigError, match=r"\[2, 20\]"):
        built("Digits", "--model.args.kind", "wide", "--task.loss", "mse", "--data.one_hot", "true")


def test_lazy_modules_get_the_same_weights_each_time():
    first, second = built("LazyDigits").model.state_dict(), built("LazyDigits").model.state_dict()
    assert first["0.weight"].shape == (4, 1, 3, 3) and first["3.weight"].shape == (10, 144)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert not first["1.running_mean"].any() and int(first["1.num_batches_tracked"]) == 0
    assert built("LazyDigits").model.training


def test_state_that_is_no_tensor_is_refused():
    with pytest.raises(ConfigError, match="^model: got dict as _extra_state in its state, expected tensors alone"):
        built("KeepsText")


def test_a_model_that_writes_its_weights_starts_from_its_initial_ones():
    parts = built("Clamped")
    assert parts.findings.written == ("layer.weight",)
    assert parts.model.layer.weight.abs().max() > 0.1


class OwnForward(nn.BatchNorm1d):
    """Of which nobody knows what it does with its samples."""

    def forward(self, x):
        return super().forward(x)


class BatchNormed(nn.Sequential):
    kind = nn.BatchNorm1d

    def __init__(self, input_shape, classes):
        super().__init__(nn.Flatten(), nn.Linear(64, 6), self.kind(6), nn.Linear(6, classes))


class OwnNormed(BatchNormed):
    kind = OwnForward


class Folded(BatchNormed):
    """Two rows of each sample."""

    def forward(self, x):
        return self[3](self[2](self[1](x.flatten(1)).repeat(2, 1))[: len(x)])


GROUPS_OF_8 = "--model.batch_statistics.group=8"


@pytest.mark.parametrize(
    ("argv", "ranks", "what"),
    [
        ([], 64, None),  # one sample for a rank
        (["--train.global_batch_size=479"], 1, "1 samples with a single one at once.*--train.drop_last true"),
        (["--train.micro_batch_size=16"], 4, None),  # a rank's share is no larger
        (
            ["--train.micro_batch_size=16"],
            2,
            "^model.batch_statistics: got nothing with train.micro_batch_size 16 in steps of 64 samples on 2 ranks, "
            r"but a norm over the batch \(2\) would need all of them at once, expected groups of them; write "
            "--model.batch_statistics.group 16, or leave train.micro_batch_size out$",
        ),
        (
            ["--train.micro_batch_size=16", "--model.batch_statistics=global"],
            1,
            "^model.batch_statistics: got global wi",
        ),
        (["--train.micro_batch_size=16", GROUPS_OF_8], 2, None),
        (["--train.global_batch_size=57", GROUPS_OF_8], 2, "57 samples on 2 ranks with a single one at once"),
        (["--train.micro_batch_size=16", "--backend.reduce=ordered"], 4, "^backend.reduce: got ordered, but a norm"),
        (["--train.micro_batch_size=16", "--backend.reduce=ordered", GROUPS_OF_8], 4, None),
        (["--compile.mode=default", "--compile.fullgraph=true"], 1, None),
        (["--compile.mode=default", "--compile.fullgraph=true"], 2, "^compile.fullgraph: got true, but the statistics"),
        (["--compile.mode=default", "--compile.fullgraph=true", GROUPS_OF_8], 2, None),
        (["--model.frozen=[2.*]", "--train.micro_batch_size=16"], 1, None),
        (
            ["--model.frozen=[2.*]", GROUPS_OF_8],
            1,
            "got {'group': 8}, but the model has no BatchNorm that is in training",
        ),
    ],
)
def test_norms_that_cannot_have_their_statistics_are_refused(argv: list[str], ranks: int, what: str | None):
    with pytest.raises(ConfigError, match=what) if what else nullcontext():
        check_shares(load([*DIGITS, *argv]), built("BatchNormed", *argv).findings, 1438, ranks)


def test_groups_are_of_samples():
    built("Folded")
    with pytest.raises(
        ConfigError, match="batch_statistics: got {'group': 8}, but 2 is called with 4 rows for 2 samples"
    ):
        built("Folded", GROUPS_OF_8)


@pytest.mark.parametrize(
    ("batch", "micro", "drops", "ranks", "what"),
    [
        (64, None, False, 4, None),  # 1,438 samples: 22 batches and one of 30
        (64, None, False, 16, "30 samples on 16 ranks.*--train.drop_last true"),
        (64, None, True, 16, None),
        (64, None, False, 40, "64 samples on 40 ranks.*--train.global_batch_size"),
        (64, None, False, 64, "64 samples on 64 ranks.*larger --train.global_batch_size"),
        (64, 1, False, 1, "64 samples with a single one.*--train.micro_batch_size"),
        (479, None, False, 1, "1 samples with"),  # 3 batches and one of 1
        (479, None, True, 1, None),
    ],
)
def test_a_share_of_one_sample_is_refused_where_the_model_takes_none(batch, micro, drops, ranks, what):
    argv = [f"--train.global_batch_size={batch}", f"--train.drop_last={str(drops).lower()}"]
    argv += [f"--train.micro_batch_size={micro}"] if micro else []
    parts, config = built("OwnNormed", *argv), load([*DIGITS, *argv])
    assert parts.findings.needs_two and int(parts.model[2].num_batches_tracked) == 0
    assert parts.findings.norms == () and parts.findings.by_samples == ("2.running_mean", "2.running_var")
    with pytest.raises(ConfigError, match=what) if what else nullcontext():
        check_shares(config, parts.findings, 1438, ranks)
    check_shares(config, built("Digits", *argv).findings, 1438, ranks)
