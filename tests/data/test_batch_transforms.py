"""Transforms of batches: drawn for each sample, mixed within the global batch, the same on any ranks."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as torch_dist

from dist_train.config.load import load
from dist_train.config.tree import Config
from dist_train.data.batch_transforms import (
    BatchTransform,
    BatchTransforms,
    CutMix,
    MixUp,
    RandomCrop,
    RandomErasing,
    RandomHorizontalFlip,
)
from dist_train.data.feed import Feed
from dist_train.data.keyed import Draws
from dist_train.data.order import Plan, global_indices
from dist_train.data.sets import Columns, Data, Samples
from dist_train.errors import ConfigError
from dist_train.ranks.launcher import Launcher
from dist_train.run import assemble
from dist_train.run.check import check
from dist_train.tools.agreement import Trajectory, difference

from parity_cells import TOLERANCE, config, run_cells, run_single
from workers import run_ranks

CPU = torch.device("cpu")
N, CLASSES, GLOBAL = 41, 4, 16
ALL = [{"name": "RandomCrop", "size": 6, "padding": 1}, "RandomHorizontalFlip", {"name": "RandomErasing", "p": 0.7}]
ALL += [{"name": "MixUp", "alpha": 0.4}, {"name": "CutMix", "p": 0.6}]
CASES = {
    "RandomCrop": lambda: [RandomCrop(6, padding=2)],
    "RandomHorizontalFlip": lambda: [RandomHorizontalFlip()],
    "RandomErasing": lambda: [RandomErasing(p=0.8, value=[0.25])],
    "MixUp": lambda: [MixUp(0.5, classes=CLASSES)],
    "CutMix": lambda: [CutMix(p=0.7, classes=CLASSES)],
    "all": lambda: [RandomCrop(8, 1), MixUp(classes=CLASSES), RandomErasing(), CutMix(0.3, classes=CLASSES)],
}


class Doubled(torch.utils.data.Dataset):
    """The rows of a pair, read sample by sample."""

    def __init__(self, tree: Any):
        self.tree = tree

    def __len__(self) -> int:
        return len(self.tree[0])

    def __getitem__(self, i: int) -> Any:
        return self.tree[0][i], int(self.tree[1][i])


class Twice(BatchTransform):
    """A user's own."""

    def __init__(self, by: float = 2.0):
        self.by = by

    def __call__(self, inputs: torch.Tensor, targets: torch.Tensor, draws: Draws) -> tuple:
        return inputs * self.by, targets


def pictures(dim: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    return torch.rand(N, dim, 8, 8, generator=draw), torch.arange(N) % CLASSES


def feed_of(each: list[BatchTransform], files: bool = False, tree: Any = None) -> Feed:
    tree = tree or pictures()
    split = Samples(Doubled(tree)) if files else Columns(tree)
    data = Data(split, classes=tuple("abcd"))
    return Feed(split, data, CPU, torch.float64, False, False, 0, 0, transforms=BatchTransforms(each, 7))


def epoch_of(feed: Feed, world_size: int, micro: int | None, epoch: int = 2) -> dict[int, tuple]:
    """By sample, what it is in an epoch."""
    found = {}
    for rank in range(world_size):
        for batch in feed.steps(Plan(N, 0, GLOBAL, micro, False, rank, world_size), epoch):
            assert len(batch.ids) == len(batch.tree[0]) == len(batch.tree[1])
            if batch.size:
                assert len(batch) == len(batch.ids)
                found |= {int(i): (x, y) for i, x, y in zip(batch.ids, *batch.tree, strict=True)}
    assert sorted(found) == list(range(N))
    return found


def same(one: dict[int, tuple], other: dict[int, tuple]) -> bool:
    return all(torch.equal(one[i][0], other[i][0]) and torch.equal(one[i][1], other[i][1]) for i in one)


# -- by sample -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_a_sample_is_the_same_on_any_ranks_and_micro_batches(name: str):
    whole = epoch_of(feed_of(CASES[name]()), 1, None)
    for files in (False, True):
        feed = feed_of(CASES[name](), files)
        for world_size, micro in ((1, 3), (2, None), (3, 2), (5, 1), (20, None)):
            assert same(whole, epoch_of(feed, world_size, micro)), (files, world_size, micro)
    assert not same(whole, epoch_of(feed_of(CASES[name]()), 1, None, epoch=3))
    plain = epoch_of(feed_of([]), 1, None)
    assert not any(same({i: whole[i]}, {i: plain[i]}) for i in range(8)) or name in ("RandomHorizontalFlip", "CutMix")


def test_draws_by_rank_are_caught(monkeypatch: pytest.MonkeyPatch):
    """The planted fault: places within a rank's batch in place of samples."""
    init = Draws.__init__
    whole = epoch_of(feed_of(CASES["RandomErasing"]()), 1, None)

    def by_place(self: Draws, seed: int, epoch: int, place: int, samples: np.ndarray) -> None:
        init(self, seed, epoch, place, np.arange(len(samples)))

    monkeypatch.setattr(Draws, "__init__", by_place)
    faulty = feed_of(CASES["RandomErasing"]())
    assert not same(epoch_of(faulty, 1, None), epoch_of(faulty, 2, None))
    assert not same(whole, epoch_of(faulty, 1, None))


def test_partners_within_a_rank_are_caught(monkeypatch: pytest.MonkeyPatch):
    """The other planted fault: as v2 does, each sample mixed with another of its own process."""
    indices = Plan.indices

    def of_the_rank(self: Plan, epoch: int, first: int = 0, before: int = 0):
        return (np.concatenate([batch[-before:], batch]) for batch in indices(self, epoch, first))

    feed = feed_of(CASES["MixUp"]())
    whole = epoch_of(feed, 1, None)
    monkeypatch.setattr(Plan, "indices", of_the_rank)
    assert same(whole, epoch_of(feed, 1, None)) and not same(whole, epoch_of(feed, 2, None))


def test_a_partner_is_the_sample_before_in_the_global_batch():
    tree = torch.arange(N, dtype=torch.float32).view(N, 1, 1, 1).expand(N, 1, 2, 2), torch.arange(N) % CLASSES
    found = epoch_of(feed_of([MixUp(classes=CLASSES)], tree=tree), 3, 2)
    for step in range(3):
        order = global_indices(N, 0, 2, step, GLOBAL)
        for own, other in zip(order.tolist(), np.roll(order, 1).tolist(), strict=True):
            x, y = found[own]
            share = (float(x[0, 0, 0]) - other) / (own - other)
            assert 0 <= share <= 1
            expected = torch.zeros(CLASSES, dtype=torch.float64)
            expected[own % CLASSES] += share
            expected[other % CLASSES] += 1 - share
            torch.testing.assert_close(y, expected)


def test_each_transform_is_what_it_says():
    inputs, targets = (tensor.double() if tensor.is_floating_point() else tensor for tensor in pictures())
    draws = lambda n=N: Draws(1, 2, 0, np.arange(n))  # noqa: E731
    flipped, _ = RandomHorizontalFlip(0.5)(inputs, targets, draws())
    turned = [not torch.equal(a, b) for a, b in zip(flipped, inputs, strict=True)]
    assert 10 < sum(turned) < 31
    assert all(torch.equal(a, b.flip(-1) if t else b) for a, b, t in zip(flipped, inputs, turned, strict=True))

    cropped, _ = RandomCrop([4, 5])(inputs, targets, draws())
    windows = inputs.unfold(2, 4, 1).unfold(3, 5, 1)[:, 0]  # [n, 5, 4, 4, 5]
    found = (windows == cropped[:, 0, None, None]).flatten(3).all(3)
    assert found.flatten(1).sum(1).tolist() == [1] * N and len(found.nonzero()[:, 1:].unique(dim=0)) > 12

    erased, _ = RandomErasing(1.0, value=-1.0)(inputs, targets, draws())
    area = (erased == -1).flatten(1).sum(1) / 64
    assert torch.equal(erased[erased != -1], inputs[erased != -1]) and area.min() > 0 and area.max() < 0.45

    cut, labels = CutMix(classes=CLASSES)(inputs, targets, draws(N - 1))
    own = (cut == inputs[1:]).flatten(1).double().mean(1)
    assert ((cut == inputs[1:]) | (cut == inputs[:-1])).all() and 0.3 < own.mean() < 0.9
    torch.testing.assert_close(labels[torch.arange(N - 1), targets[1:]], own)
    for transform in (MixUp(p=0.0, classes=CLASSES), CutMix(p=0.0, classes=CLASSES)):
        kept, labels = transform(inputs, targets, draws(N - 1))
        assert (
            torch.equal(kept, inputs[1:]) and torch.equal(labels.argmax(1), targets[1:]) and labels.max(1)[0].min() == 1
        )


def test_a_mask_goes_with_its_picture():
    inputs = torch.arange(64.0).view(1, 1, 8, 8).expand(N, 1, 8, 8)
    masks = inputs[:, 0].long()
    for transform in (RandomHorizontalFlip(), RandomCrop(5, 2)):
        x, y = transform(inputs, masks, Draws(0, 0, 0, np.arange(N)))
        assert torch.equal(x[:, 0].long(), y) and y.dtype == torch.int64 and len(y.unique(dim=0)) > 1


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_draws_have_their_distribution(alpha: float):
    draws = Draws(0, 0, 0, np.arange(20_000))
    uniform, beta, normal = draws.uniform(2), draws.beta(alpha), draws.normal()[:, 0]
    assert uniform.min() > 0 and uniform.max() < 1 and beta.min() >= 0 and beta.max() <= 1
    assert np.abs(uniform.mean(0) - 0.5).max() < 0.01 and abs(np.corrcoef(uniform.T)[0, 1]) < 0.03
    assert abs(beta.mean() - 0.5) < 0.02 and abs(beta.var() - 1 / (4 * (2 * alpha + 1))) < 0.005
    assert abs(normal.mean()) < 0.03 and abs(normal.std() - 1) < 0.03
    assert not np.isin(uniform, Draws(0, 0, 1, np.arange(20_000)).uniform(2)).any()


# -- runs ------------------------------------------------------------------------------------------------------------


def cell(backend: str, micro: int | None = None) -> Config:
    base = config(backend, micro_batch_size=micro)
    return dataclasses.replace(base, data=dataclasses.replace(base.data, batch_transforms=ALL))


@functools.cache
def alone() -> Trajectory:
    return run_single(cell("single"))


def test_parity_of_micro_batches():
    assert difference(run_single(cell("single", 5)), alone()).worst < TOLERANCE["float32"]
    assert difference(run_single(config("single")), alone()).worst > 1e-3


@pytest.mark.parametrize("world_size", [2, 3])
def test_parity(world_size: int):
    cells = [cell("ddp"), cell("ddp", 5), cell("fsdp2", 5)]
    for run in run_ranks(run_cells, world_size, cells)[0]:
        assert difference(run, alone()).worst < TOLERANCE["float32"]


def by_rank(cells: list[Config]) -> list:
    """In a worker: runs whose draws depend on the rank."""
    init = Draws.__init__

    def planted(self: Draws, seed: int, epoch: int, place: int, samples: np.ndarray) -> None:
        init(self, seed + torch_dist.get_rank(), epoch, place, samples)

    Draws.__init__ = planted
    try:
        return run_cells(cells)
    finally:
        Draws.__init__ = init


def test_parity_catches_draws_by_rank():
    (run,) = run_ranks(by_rank, 2, [cell("ddp")])[0]
    assert difference(run, alone()).worst > 100 * TOLERANCE["float32"]


# -- the config ------------------------------------------------------------------------------------------------------


def refused(build: Callable[[Config], Any], *argv: str) -> str:
    with pytest.raises(ConfigError) as error:
        build(load(["--train.device", "cpu", *argv]))
    return error.value.lines[0]


def checked(config: Config) -> None:
    check(config, Launcher("none", world_size=1, local_world_size=1), writes=False)


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["[MixUpp]"], "got unknown name 'MixUpp', expected one of MixUp, CutMix"),
        (["[{name: MixUp, beta: 1}]"], "got beta of MixUp, which does not have it; it takes alpha, p; leave it out"),
        (["[{name: Normalize, mean: [0.5], std: [1]}]"], "got Normalize, which would leave out what is tested on"),
        (["[3]"], "got 3, expected a name, or one with arguments such as {name: RandomCrop, size: 28}"),
        (["[MixUp]", "--task.loss", "nll"], "got MixUp with task.loss nll, which takes no vectors"),
        (
            ["[CutMix]", "--task.args.ignore_index", "1"],
            "got CutMix with task.args.ignore_index, which takes no vectors",
        ),
        (["[MixUp]", "--compile.scope", "step"], "got them with compile.scope step"),
    ],
    ids=["name", "argument", "normalize", "entry", "nll", "ignored", "step"],
)
def test_refused_before_torch(argv: list[str], line: str):
    got = refused(checked, "--data.batch_transforms", *argv)
    assert got.startswith(f"data.batch_transforms: {line}"), got


@pytest.mark.parametrize(
    ("entry", "line"),
    [
        ("{name: MixUp, alpha: 0}", "got alpha 0 of MixUp, expected a number above 0"),
        ("{name: CutMix, p: 2}", "got p 2 of CutMix, expected a number from 0 to 1"),
        ("{name: RandomErasing, scale: [0.5, 0.1]}", "got scale [0.5, 0.1] of RandomErasing, expected two numbers"),
        ("{name: RandomErasing, value: random}", "got value 'random' of RandomErasing, expected a number"),
        ("{name: RandomErasing, value: [1, 2]}", "got value [1.0, 2.0] of RandomErasing, expected one of 1 channels"),
        ("{name: RandomCrop, size: 0}", "got size 0 of RandomCrop, expected an integer above 0"),
        ("{name: RandomCrop, size: 20, padding: 4}", "got size [20, 20] of RandomCrop, expected at most [16, 16]"),
        ("test_batch_transforms:N", "got test_batch_transforms:N"),
        ("test_batch_transforms:Doubled", "got"),
    ],
)
def test_refused_before_any_rank_is_joined(entry: str, line: str):
    def built(config: Config) -> None:
        checked(config)
        assemble.build(config, CPU)

    got = refused(built, "--data.batch_transforms", f"[{entry}]")
    assert got.startswith(f"data.batch_transforms: {line}"), got


def test_samples_that_are_no_pairs():
    with pytest.raises(ConfigError, match="expected pairs of two tensors"):
        split = Columns({"x": torch.zeros(4, 1, 2, 2)})
        Feed(split, Data(split), CPU, torch.float32, False, False, transforms=BatchTransforms([Twice()], 0))
    flat = Columns((torch.zeros(4, 5), torch.zeros(4)))
    for transform, line in ((MixUp(), "class numbers"), (RandomErasing(), "expected pictures")):
        feed = Feed(flat, Data(flat), CPU, torch.float32, False, False, transforms=BatchTransforms([transform], 0))
        with pytest.raises(ConfigError, match=line):
            feed.of(np.arange(3))


def test_ones_own():
    argv = ["--data.batch_transforms", "[{name: test_batch_transforms:Twice, by: 3.0}]", "--train.device", "cpu"]
    plain, mine = (assemble.build(load(some), CPU).feed.of(np.arange(4)) for some in (argv[2:], argv))
    assert torch.equal(mine.tree[0], plain.tree[0] * 3) and torch.equal(mine.tree[1], plain.tree[1])
