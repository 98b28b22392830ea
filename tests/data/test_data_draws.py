"""What a data set draws at random: a function of seed, epoch and sample, also from generators that it keeps itself."""

import random
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, Subset

from dist_train.config.load import load
from dist_train.data.feed import Feed
from dist_train.data.generators import held, seeder
from dist_train.data.sets import Data, FromFiles

import user_data
from parity_cells import run_single

KINDS = {
    "numpy": lambda: np.random.default_rng(0),
    "mt19937": lambda: np.random.Generator(np.random.MT19937(0)),
    "state": lambda: np.random.RandomState(0),
    "python": lambda: random.Random(0),
    "torch": lambda: torch.Generator().manual_seed(0),
}


def feed_of(dataset: Dataset, workers: int = 0, draws: bool = True) -> Feed:
    split = FromFiles(dataset, draws=draws)
    data = Data(split, split, (2,), ("a", "b"))
    return Feed(split, data, torch.device("cpu"), torch.float64, False, False, workers, seed=5)


def drawn(feed: Feed, order: list[int], epoch: int = 0) -> dict[int, tuple[float, ...]]:
    """What the samples are, read in this order, three at a time."""
    batches = [np.array(order[i : i + 3]) for i in range(0, len(order), 3)]
    rows = torch.cat([inputs for inputs, _ in feed(batches, epoch)]).tolist()
    return {index: tuple(row) for index, row in zip(order, rows, strict=True)}


@pytest.mark.parametrize("kind", [*KINDS, "all"])
def test_own_generators_are_seeded_for_each_sample(kind: str):
    made = [make() for name, make in KINDS.items() if kind in (name, "all")]
    dataset = user_data.Noise([*made, *(made if kind == "all" else [])])
    there, back = list(range(20)), list(range(19, -1, -1))
    first = drawn(feed_of(dataset), there)
    assert len({row[0] for row in first.values()}) == 20
    assert drawn(feed_of(dataset), back) == first  # not by what was read before
    other = drawn(feed_of(dataset), there, epoch=1)
    assert not {row[0] for row in other.values()} & {row[0] for row in first.values()}
    if kind in ("numpy", "all"):  # a worker's are as good as ours
        assert drawn(feed_of(dataset, workers=2), back) == first


def test_two_generators_of_a_data_set_do_not_draw_alike():
    rows = drawn(feed_of(user_data.Noise([np.random.default_rng(0), np.random.default_rng(0)])), list(range(20)))
    assert all(abs(a - b) > 1e-9 for a, b in rows.values())


class Holder:
    __slots__ = ("generator",)

    def __init__(self, generator: np.random.Generator):
        self.generator = generator


class Shared:
    generator = np.random.default_rng(1)


GLOBAL = np.random.default_rng(2)


def of_a_global(image: float) -> float:
    return sum(image + GLOBAL.random() for _ in range(1))


def closure(generator: np.random.Generator):
    return lambda image: image + generator.random()


def test_where_generators_are_found():
    one = np.random.default_rng(0)
    for place in (
        [one], (1, [{"a": one}]), Holder(one), partial(max, key=one), partial(one.random), closure(one),
        torch.nn.Sequential(torch.nn.Identity(), user_data.Module(one)), Subset([Holder(one)], [0]),
    ):  # fmt: skip
        assert held(place) == held(user_data.Noise([], place)) == [one], place
    assert held(Shared()) == [Shared.generator] and held(of_a_global) == [GLOBAL]
    assert held(user_data.Noise([one, one], one)) == [one]
    assert held([["name"] * 200, "x"] * 100_000) == []  # soon
    around: list = [one]
    around.append(around)
    assert held(around) == [one]


def test_a_data_set_without_generators_of_its_own_pays_nothing(monkeypatch: pytest.MonkeyPatch):
    looked = []
    monkeypatch.setattr("dist_train.data.reader.held", lambda root: looked.append(root) or [])
    feed = feed_of(user_data.Noise([]))
    assert len(looked) == 1
    for epoch in range(3):
        drawn(feed, list(range(20)), epoch)
    assert len(looked) == 1 and feed.reader.seeders == []


class Others(np.random.PCG64):
    """A generator of another library, whose state cannot be set."""

    state = property(lambda self: {})


def test_generators_that_cannot_be_seeded():
    assert seeder(random.SystemRandom()) is None
    assert seeder(np.random.RandomState(np.random.PCG64(0))) is None
    assert seeder(np.random.Generator(Others(0))) is None and seeder(Others(0)) is None


@pytest.mark.parametrize(
    ("generator", "draws", "says"),
    [
        (
            random.SystemRandom(),
            True,
            "^data.name: Noise draws from SystemRandom, which cannot be seeded for each",
        ),
        (user_data.Hidden(), True, "^data.name: Noise gives another sample 0 when it is read again, which cannot be"),
        (
            np.random.default_rng(0),
            False,
            "^data.name: sample 0 of Noise differs when it is read again, but draws=",
        ),
    ],
)
def test_what_cannot_be_seeded_is_warned_of(generator, draws: bool, says: str):
    with pytest.warns(UserWarning, match=says):
        feed_of(user_data.Noise([generator]), draws=draws)


def test_a_data_set_that_repeats_is_not_warned_of():
    """Warnings are errors in these tests."""
    feed_of(user_data.Noise([np.random.default_rng(0)]))
    feed_of(user_data.Noise([]), draws=False)
    feed_of(user_data.Noise([float("nan")]), draws=False)


def test_a_run_draws_anew_in_every_epoch():
    argv = ["--data.name", "user_data:noise", "--train.epochs", "3", "--train.global_batch_size", "8"]
    argv += ["--model.hidden", "[]", "--train.device", "cpu", "--track.every_steps", "1", "--optim.lr", "0"]
    argv += ["--optim.name", "SGD", "--train.eval_every_epochs", "null", "--train.precision", "float64"]
    user_data.DRAWN.clear()
    run_single(load(argv))
    counts = {draw: user_data.DRAWN.count(draw) for draw in user_data.DRAWN}
    assert len(counts) == 24 * 3  # also among those that are read to look at them, and the evaluation's
