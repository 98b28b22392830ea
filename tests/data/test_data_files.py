"""Data in files: batches through DataLoader workers, and images listed in a CSV."""

import functools
import io
import multiprocessing
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset

from dist_train.config.load import load
from dist_train.data.csv_images import csv_images
from dist_train.data.feed import Feed
from dist_train.data.image_files import read_image
from dist_train.data.order import Plan
from dist_train.data.sets import Data, FromFiles, InMemory
from dist_train.errors import ConfigError
from dist_train.run import assemble

import user_data
from data_files import made_images, mnist_png_root, real_data, write_images
from parity_cells import run_single
from user_data import Squares, squares
from zygote import Run, Zygote

CPU = torch.device("cpu")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A data.root with 40 small digits."""
    write_images(tmp_path, *made_images(40))
    return tmp_path


def feed_of(
    data: Data, workers: int = 0, seed: int = 0, dtype: torch.dtype = torch.float32, one_hot: bool = False
) -> Feed:
    return Feed(data.train, data, CPU, dtype, True, one_hot, workers, seed)


def rewrite(root: Path, *lines: str, name: str = "annotations.csv") -> None:
    (root / name).write_text("\n".join(["file,target", *lines]) + "\n", encoding="utf-8")


def refused(root: Path, **arguments) -> str:
    """The one line with which the data set, or its first sample, is refused."""
    with pytest.raises(ConfigError) as error:
        feed_of(csv_images(str(root), False, **arguments))
    (line,) = error.value.lines
    return line


def generators() -> tuple:
    """The state of the process's random generators."""
    return (
        random.getstate(),
        np.random.get_state()[1].tolist(),
        np.random.get_state()[2],
        torch.get_rng_state().tolist(),
    )


# -- batches ----------------------------------------------------------------------------------------------------------

BATCHES = [np.array([3, 1, 2]), np.array([], np.int64), np.array([30]), np.array([0, 1]), np.array([5, 5])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batches_are_the_files_with_and_without_workers(images: Path, dtype: torch.dtype):
    data = csv_images(str(images), False, mean=(0.25,), std=(0.5,))
    rows = data.train.dataset.rows
    alone, helped = (list(feed_of(data, workers, dtype=dtype, one_hot=True)(iter(BATCHES))) for workers in (0, 2))
    assert len(alone) == len(helped) == len(BATCHES)
    for batch, (inputs, targets), (same_inputs, same_targets) in zip(BATCHES, alone, helped, strict=True):
        assert torch.equal(inputs, same_inputs) and torch.equal(targets, same_targets)
        batch = batch if len(batch) else np.arange(2)  # of which none counts
        pixels = np.array([np.asarray(Image.open(images / rows[i].path)) for i in batch]).reshape(-1, 1, 28, 28)
        by_hand = (torch.from_numpy(pixels).to(torch.float64) / 255 - 0.25) / 0.5
        assert inputs.dtype == targets.dtype == dtype and inputs.shape == (len(batch), 1, 28, 28)
        assert torch.allclose(inputs.double(), by_hand, rtol=0, atol=1e-6)
        assert torch.equal(targets, torch.eye(10, dtype=dtype)[[int(rows[i].label) for i in batch]])


def test_floats_are_not_divided_by_255(images: Path):
    data = csv_images(str(images), False, transform="user_data:TO_FLOAT")
    inputs, _ = next(feed_of(data)([np.arange(20)]))
    assert inputs.shape == (20, 1, 14, 14) and 0.5 < float(inputs.max()) <= 1


def drawn(data: Data, seed: int, epoch: int, world_size: int, micro: int | None, workers: int) -> dict[int, float]:
    """What the random transform gave each sample of an epoch, over all ranks."""
    out: dict[int, float] = {}
    for rank in range(world_size):
        plan = Plan(len(data.train), seed, 12, micro, False, rank, world_size)
        batches = list(plan.indices(epoch))
        for batch, (inputs, _) in zip(batches, feed_of(data, workers, seed)(iter(batches), epoch), strict=True):
            out |= dict(zip(batch.tolist(), inputs.flatten().tolist()[: len(batch)], strict=True))
    assert sorted(out) == list(range(len(data.train)))
    return out


def test_what_is_drawn_depends_on_seed_epoch_and_sample_alone(images: Path):
    data = csv_images(str(images), False, transform="user_data:draw")
    first = drawn(data, 7, 0, 1, None, 0)
    assert len(set(first.values())) == len(first)  # samples differ
    for world_size, micro, workers in [(1, None, 2), (1, 5, 0), (2, None, 0), (3, 2, 0), (2, 3, 2), (50, None, 0)]:
        assert drawn(data, 7, 0, world_size, micro, workers) == first, (world_size, micro, workers)
    for other in (drawn(data, 7, 1, 1, None, 0), drawn(data, 8, 0, 1, None, 0)):
        assert not set(other.values()) & set(first.values())


def test_a_transforms_draw_is_kept_from_the_training(images: Path):
    """Building, reading, and every epoch's loader leave the generators of this process as they are."""
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = generators()
    data = csv_images(str(images), False, transform="user_data:draw")
    for workers in (0, 2):
        list(feed_of(data, workers)(iter(BATCHES)))
        assert generators() == before
    data.train.dataset[0]
    assert generators() != before  # the transform does draw


@pytest.mark.parametrize("leave", ["close", "drop", "error"])
def test_workers_end_when_an_epoch_is_left_early(images: Path, leave: str):
    ended = []

    def batches() -> Iterator[np.ndarray]:
        try:
            for _ in range(1000):
                yield np.arange(8)
        finally:
            ended.append(True)

    feed = feed_of(csv_images(str(images), False), workers=2)
    epoch = feed(batches())
    next(epoch)
    assert len(multiprocessing.active_children()) == 2
    if leave == "close":
        epoch.close()
    elif leave == "drop":
        del epoch
    else:
        with pytest.raises(ValueError, match="of the loop"):
            epoch.throw(ValueError("of the loop"))
    assert not multiprocessing.active_children() and ended == [True]
    assert len(list(feed([np.arange(3)]))) == 1  # the next epoch's come anew


def test_a_data_set_that_cannot_be_sent_to_workers(images: Path):
    data = csv_images(str(images), False, transform="user_data:NOT_SENDABLE")
    assert len(list(feed_of(data)(iter(BATCHES)))) == len(BATCHES)
    with pytest.raises(ConfigError, match="^data.workers: got 2, but the data set cannot be sent") as error:
        next(feed_of(data, workers=2)(iter(BATCHES)))
    assert "--data.workers 0" in str(error.value) and not multiprocessing.active_children()


# -- a user's own data set --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_users_own_data_set(workers: str):
    argv = ["--data.name", "user_data:squares", "--data.args.n", "21", "--data.workers", workers]
    parts = assemble.build(load(argv), CPU)
    inputs, targets = next(parts.feed([np.array([20, 3])]))
    assert torch.equal(inputs, torch.stack([torch.full((3, 4, 4), i / 21) for i in (20, 3)]))
    assert targets.tolist() == [0, 3] and len(parts.feed.split) == 21 and len(parts.feeds["test"].split) == 6


def test_a_run_on_a_users_own_data_set():
    argv = ["--data.name", "user_data:squares", "--train.epochs", "2", "--train.global_batch_size", "8"]
    argv += ["--model.hidden", "[8]", "--train.device", "cpu", "--track.every_steps", "1"]
    alone, helped = run_single(load(argv)), run_single(load([*argv, "--data.workers", "2"]))
    assert alone.losses == helped.losses and alone.evaluation == helped.evaluation
    assert all((alone.weights[name] == helped.weights[name]).all() for name in alone.weights)


@pytest.mark.parametrize(
    ("sample", "says"),
    [
        (
            {"image": torch.zeros(3, 4, 5)},
            "sample 1: got torch.float32 [3, 4, 5], expected a tensor torch.float32 [3, 4, 4]",
        ),
        ({"image": torch.zeros(3, 4, 4, dtype=torch.uint8)}, "sample 1: got torch.uint8 [3, 4, 4]"),
        ({"image": np.zeros((3, 4, 4))}, "sample 1: got ndarray"),
        ({"target": 4}, "sample 1: got target 4, expected a class number from 0 to 3"),
        ({"target": -1}, "sample 1: got target -1"),
        ({"target": 0.5}, "sample 1: got target 0.5"),
        ({"target": "cat"}, "sample 1: got target 'cat'"),
        ({"target": [0.25, 0.25, 0.25, 0.25]}, "sample 1: got target [0.25"),  # a number in sample 0
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_that_does_not_fit(sample: dict, says: str, workers: int):
    split = FromFiles(Squares(6, **sample))
    feed = feed_of(Data(split, split, (3, 4, 4), tuple("abcd")), workers)
    with pytest.raises(ConfigError) as error:
        list(feed([np.array([0]), np.array([0, 1])]))
    assert str(error.value).startswith(f"data.name: {says}")


@pytest.mark.parametrize(
    ("sample", "says"),
    [
        ({"image": torch.zeros(3, 4, 4), "label": 1}, "sample 1: got a dict with ['image', 'label'], expected a pair"),
        ((torch.zeros(3, 4, 4), 1, "a.png"), "sample 1: got a tuple of 3, expected a pair (tensor, target)"),
        (torch.zeros(3, 4, 4), "sample 1: got Tensor, expected a pair"),
        (None, "sample 1: got NoneType, expected a pair"),
    ],
)
def test_a_sample_that_is_no_pair_as_the_first_is(sample, says: str):
    split = FromFiles(user_data.Item(sample, 1))
    with pytest.raises(ConfigError) as error:
        list(feed_of(Data(split, split, (3, 4, 4), tuple("abcd")))([np.array([0, 1])]))
    assert str(error.value).startswith(f"data.name: {says}")


@pytest.mark.parametrize(
    ("target", "loss", "says"),
    [
        (
            [1.0, 0.0, 1.0, 0.0],
            "cross_entropy",
            "from 0 to 1 with the sum 2, expected the probabilities",
        ),
        ([0.0, 0.0, 0.0, 0.0], "cross_entropy", "with the sum 0"),
        ([1.5, -0.5, 0.0, 0.0], "cross_entropy", "from -0.5 to 1.5 with the sum 1"),
        ([float("nan"), 0.0, 0.0, 0.0], "cross_entropy", "with the sum nan"),
        (
            [0.0, 1.0, 0.0, 0.0],
            "nll",
            "task.loss: got nll, but the target of sample 0 is a vector, expected",
        ),
        ([0.0, 1.0, 0.0, 0.0], "cross_entropy", None),
        ([0.05, 0.05, 0.85, 0.05], "cross_entropy", None),
        (torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float16), "cross_entropy", None),
        ([1.0, 0.0, 1.0, 0.0], "mse", None),
    ],
)
def test_targets_that_are_vectors(target, loss: str, says: str | None):
    split = FromFiles(user_data.Item((torch.zeros(3, 4, 4), target), 0))
    data = Data(split, split, (3, 4, 4), tuple("abcd"))
    feed = functools.partial(Feed, split, data, CPU, torch.float32, False, False, loss=loss)
    if says is None:
        assert next(feed()([np.array([0, 1])]))[1].shape == (2, 4)
        return
    with pytest.raises(ConfigError) as error:
        feed()
    assert says in str(error.value) and "sample 0" in str(error.value)


def test_multi_hot_targets_are_refused_before_the_run():
    argv = ["--data.name", "user_data:multi_hot", "--train.device", "cpu"]
    with pytest.raises(ConfigError, match="^data.name: sample 0: .* add up to 1, for task.loss cross_entropy"):
        assemble.build(load(argv), CPU)
    assemble.build(load([*argv, "--task.loss", "mse", "--data.one_hot", "true"]), CPU)


def test_a_data_set_without_an_order():
    class Stream(IterableDataset):
        def __iter__(self):
            yield torch.zeros(3), 0

    class Nameless(Dataset):
        def __len__(self) -> int:
            return 3

    class Endless(Dataset):
        def __getitem__(self, index: int):
            return torch.zeros(3), 0

    for kind, what in ((Stream, "an IterableDataset"), (Nameless, "without __getitem__"), (Endless, "without __len__")):
        with pytest.raises(ConfigError) as error:
            FromFiles(kind())
        assert str(error.value) == (
            f"data.name: got {kind.__name__}, {what}, which has no order that a run can resume in; expected a "
            f"map-style Dataset with __len__ and __getitem__"
        )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"train": [1, 2]},
            "got list as the train split, expected dist_train.data.sets.Columns(tree), InMemory(images, labels), ",
        ),
        ({"test": 3}, "got int as the test split"),
        ({"classes": 10}, "got classes 10, expected their names in order, such as"),
        ({"classes": "abcd"}, "got classes 'abcd', expected their names in order"),
        ({"classes": {"a"}}, "got classes {'a'}, expected their names in order"),
        ({"input_shape": 48}, "got input_shape 48, expected the sizes of a sample"),
        ({"input_shape": (3, 4.0)}, "got input_shape (3, 4.0), expected whole numbers above 0"),
        ({"mean": 0.5}, "got mean 0.5, expected a number per channel, or one for all"),
        ({"mean": ("a",)}, "got mean ('a',), expected finite numbers"),
        ({"std": (float("inf"),)}, "got std (inf,), expected finite numbers"),
    ],
)
def test_what_a_data_function_returns(change: dict, says: str):
    given = {"train": FromFiles(Squares(4)), "test": FromFiles(Squares(4)), "input_shape": (3, 4, 4), "classes": ("a",)}
    with pytest.raises(ConfigError) as error:
        Data(**(given | change))
    assert str(error.value).startswith(f"data.name: {says}")


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ([0, 1], "got labels of type list, expected a tensor"),
        (torch.tensor(3), "got a tensor without a dimension as 1 of Columns"),
        (torch.zeros(3), "got Columns of lengths {'0': 4, '1': 3}, expected as many samples in each"),
    ],
)
def test_columns_that_are_none(labels, says: str):
    with pytest.raises(ConfigError) as error:
        InMemory(np.zeros((4, 3)), labels)
    assert str(error.value).startswith(f"data.name: {says}")


def test_a_data_function_that_returns_something_else():
    with pytest.raises(ConfigError) as error:
        assemble.read_data(load(["--data.name", "user_data:pair"]).data, False)
    assert str(error.value) == (
        "data.name: got tuple from user_data:pair, expected a map-style data set with __len__ and __getitem__, a dict "
        "of these with one named train, or a dist_train.data.sets.Data"
    )


SCRIPT = """
import sys
import torch
from dist_train.__main__ import main
from dist_train.data.sets import Data, FromFiles
from user_data import Squares

class Net(torch.nn.Linear):
    def __init__(self, input_shape, classes, *, bias=True):
        super().__init__(48, classes, bias)

    def forward(self, x):
        return super().forward(x.flatten(1))

def make(root, download, n=8):
    return Data(FromFiles(Squares(n)), FromFiles(Squares(n)), (3, 4, 4), tuple("abcd"))

number = 3
if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], None),
        (["--model.args.bias", "false", "--data.args.n", "6"], None),
        (["--model.args.width", "3"], "model.args.width: got 3, but __main__:Net does not have it; it takes bias"),
        (
            ["--model.name", "__main__:Other"],
            "model.name: got '__main__:Other', but there is no 'Other' in mine.py; expected module:name",
        ),
        (
            ["--model.name", "__main__:number"],
            "model.name: got __main__:number, which is of type int, expected a function or a class",
        ),
    ],
)
def test_what_the_started_script_defines(zygote: Zygote, tmp_path: Path, argv: list[str], says: str | None):
    (tmp_path / "mine.py").write_text(SCRIPT)
    names = ["--model.name", "__main__:Net", "--data.name", "__main__:make"]
    run = Run([*names, "--train.epochs", "1", "--run.dir", "run", *argv], cwd=str(tmp_path), script="mine.py")
    (ended,) = zygote.run(run)
    assert ended.codes == [2 if says else 0], ended
    assert not says or ended.err[0].startswith(f"dist_train: {says}")


def test_a_class_name_is_missing():
    data = squares("", False)
    with pytest.raises(ConfigError, match="sample 3: got target 3, expected a class number from 0 to 2"):
        next(feed_of(Data(data.train, data.test, (3, 4, 4), tuple("abc")))([np.array([3])]))


# -- images listed in a CSV -------------------------------------------------------------------------------------------


def test_the_mnist_images(tmp_path_factory: pytest.TempPathFactory):
    root = mnist_png_root(tmp_path_factory)
    data = csv_images(str(root), False)
    assert len(data.train) + len(data.test) == (10_000 if real_data("mnist_png.tar.gz") else 400)
    assert len(data.test) == (len(data.train) + len(data.test)) / 10
    assert data.input_shape == (1, 28, 28) and data.classes == tuple("0123456789")
    paths = [row.path for split in (data.train, data.test) for row in split.dataset.rows]
    assert len(set(paths)) == len(paths) == len(list((root / "images").iterdir()))
    for split in (data.train, data.test):
        digits = torch.tensor([int(row.path[-5]) for row in split.dataset.rows])
        assert torch.bincount(digits, minlength=10).min() > 0.02 * len(digits)  # a tenth each, about
        feed = Feed(split, data, CPU, torch.float32, False, False)
        batches = np.arange(len(split))[:2000].reshape(-1, 10)
        for batch, (inputs, targets) in zip(batches, feed(batches), strict=True):
            assert inputs.shape == (10, 1, 28, 28) and torch.equal(targets, digits[batch])
        last = np.array(Image.open(root / split.dataset.rows[batches[-1, -1]].path))
        assert torch.equal(inputs[-1, 0], torch.from_numpy(last) / 255)


@pytest.mark.parametrize(("fraction", "count"), [(0.1, 4), (0.25, 10), (0.6, 24), (0.999, 39), (1e-6, 1)])
def test_a_part_is_held_out(images: Path, fraction: float, count: int):
    data, again = (csv_images(str(images), False, test_fraction=fraction) for _ in range(2))
    train, test = ([row.path for row in split.dataset.rows] for split in (data.train, data.test))
    assert len(test) == count and sorted(train + test) == sorted(set(train + test)) and len(train + test) == 40
    assert test == [row.path for row in again.test.dataset.rows]


def test_the_held_out_part_has_every_class_of_a_list_that_goes_round_them(tmp_path: Path):
    write_images(tmp_path, made_images(100)[0], torch.arange(100) % 10)
    data = csv_images(str(tmp_path), False, test_fraction=0.3)
    assert len({row.label for row in data.test.dataset.rows}) >= 8


def test_one_image_is_never_on_both_sides(images: Path):
    files = [f"images/{path.name}" for path in sorted((images / "images").iterdir())]
    rewrite(images, *(f"{spelling}{name},0" for name in files for spelling in ("", "./", "images/../")))
    data = csv_images(str(images), False, test_fraction=0.5)
    train, test = ({(images / row.path).resolve() for row in split.dataset.rows} for split in (data.train, data.test))
    assert not train & test and len(train) == len(test) == 20
    assert len(data.train) + len(data.test) == 120


def test_own_test_annotations(images: Path):
    name = next((images / "images").iterdir()).name
    rewrite(images, f"{name},0", name="held.csv")
    rewrite(images, f"{name},1", f"{name},0")
    data = csv_images(str(images), False, test_annotations="held.csv", image_dir="images")
    assert [len(data.train), len(data.test)] == [2, 1] and data.classes == ("0", "1")


def test_labels_that_are_names(images: Path):
    files = sorted((images / "images").iterdir())
    rewrite(images, *(f"images/{path.name},{['pear', 'apple', '7'][i % 3]}" for i, path in enumerate(files)))
    data = csv_images(str(images), False, labels="names")
    assert data.classes == ("7", "apple", "pear")
    rows = data.train.dataset.rows
    _, targets = next(feed_of(data)([np.arange(len(rows))]))
    assert targets.tolist() == [data.classes.index(row.label) for row in rows]


def labelled(root: Path, *labels: str, **arguments) -> tuple[tuple[str, ...], list[int]]:
    """The classes of images with these labels, and the class number of each image."""
    files = sorted((root / "images").iterdir())
    rewrite(root, *(f"images/{path.name},{label}" for path, label in zip(files, labels, strict=False)))
    data = csv_images(str(root), False, test_annotations="annotations.csv", **arguments)
    return data.classes, [data.train.dataset[i][1] for i in range(len(labels))]


TEN, TWELVE = tuple(map(str, range(11))), ("02", "03", "11")


@pytest.mark.filterwarnings("ignore:.* makes .* classes")
@pytest.mark.parametrize(
    ("labels", "classes", "numbers"),
    [
        (("10", "2", "1"), TEN, [10, 2, 1]),
        (("10.0", "2", "2.", " +2 ", "2e0"), TEN, [10, 2, 2, 2, 2]),
        (("1e1", "0", "-0"), TEN, [10, 0, 0]),
        (("11", "02", "03"), TWELVE, [2, 0, 1]),  # with zeros: names, whose order is that of the numbers
        (("00501", "99999"), ("00501", "99999"), [0, 1]),
        (("b", "a", "c 1"), ("a", "b", "c 1"), [1, 0, 2]),
        (("1_0", "0x1"), ("0x1", "1_0"), [1, 0]),
    ],
)
def test_what_labels_are(images: Path, labels: tuple, classes: tuple, numbers: list[int]):
    assert labelled(images, *labels) == (classes, numbers)


@pytest.mark.filterwarnings("ignore:.* makes .* classes")
def test_labels_are_what_one_says(images: Path):
    assert labelled(images, "2", "10", "nan", labels="names") == (("10", "2", "nan"), [1, 0, 2])
    assert labelled(images, "007", "7", labels="numbers") == (TEN[:8], [7, 7])


@pytest.mark.filterwarnings("ignore:.* makes .* classes")
@pytest.mark.parametrize(
    ("labels", "line", "says"),
    [
        (("0", "1", "-1", "2"), 4, "got label -1, expected a class number from 0 to 99999"),
        (("0", "nan", "1"), 3, "got label nan, expected a class number"),
        (("0", "1", "NaN"), 4, "got label NaN, expected a class number"),
        (("0", "1", "inf"), 4, "got label inf, expected a class number"),
        (("0", "1", "1.5"), 4, "got label 1.5, expected a class number"),
        (("0", "1", "1e400"), 4, "got label 1e400, expected a class number"),
        (("0", "1", "100000"), 4, "got label 100000, expected a class number"),
        (("0", "1", "9" * 5000), 4, f"got label '{'9' * 60}...', expected a class number"),
        (("0", "1", "NA", "1"), 4, "got label 'NA', a name, expected a number as other labels are"),
        (("0", "1", "1 2"), 4, "got label '1 2', a name"),
        (("0", "1", "007"), 4, "got label 007, a name, for the zeros before it, expected a number"),
        (("cat", "dog", "nan"), 4, "got label nan, a number, expected a name as other labels are"),
    ],
)
def test_a_label_that_is_a_stranger_is_refused_with_its_row(images: Path, labels: tuple, line: int, says: str):
    with pytest.raises(ConfigError) as error:
        labelled(images, *labels)
    assert f"annotations.csv line {line}: {says}" in str(error.value) and "--data.args.labels" in str(error.value)
    assert len(str(error.value).replace(str(images), "")) < 300


def test_a_class_that_is_tested_and_not_trained_on(images: Path):
    first, second, third = (f"images/{path.name}" for path in sorted((images / "images").iterdir())[:3])
    rewrite(images, f"{first},cat", f"{second},dog")
    rewrite(images, f"{second},dog", f"{third},Dog", f"{third},cow", name="test.csv")
    with pytest.warns(UserWarning, match=r"test.csv line 3: no training image has label 'Dog' \(nor 1 others\)"):
        assert csv_images(str(images), False, test_annotations="test.csv").classes == ("Dog", "cat", "cow", "dog")


def test_most_class_numbers_without_images(images: Path):
    with pytest.warns(UserWarning, match="annotations.csv line 4: label 33 makes 34 classes, of which 3 have images"):
        labelled(images, "0", "1", "33")


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_spreadsheets_file(tmp_path: Path, end: str, mark: bytes):
    for name in ("a, b.png", 'say "c".png', "é.png"):
        Image.new("L", (2, 2), len(name)).save(tmp_path / name)
    lines = ['"file","target",note', '"a, b.png",0,x', '"say ""c"".png",1,', "", "é.png, 2 ,z", ""]
    (tmp_path / "annotations.csv").write_bytes(mark + end.join(lines).encode())
    data = csv_images(str(tmp_path), False, test_annotations="annotations.csv")
    rows = data.train.dataset.rows
    assert [(row.path, row.label) for row in rows] == [("a, b.png", "0"), ('say "c".png', "1"), ("é.png", "2")]
    assert [row.source.rpartition(" ")[2] for row in rows] == ["2", "3", "5"]
    inputs, _ = next(feed_of(data)([np.arange(3)]))
    assert (inputs[:, 0, 0, 0] * 255).round().tolist() == [8, 11, 5]


# -- transforms of one's own ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_own_transforms(images: Path, workers: int):
    data = csv_images(
        str(images),
        False,
        transform="user_data:FLIP",
        test_transform="user_data:INVERT",
        target_transform="user_data:parity",
    )
    assert data.classes == ("0", "1")
    rows = data.train.dataset.rows
    inputs, targets = next(feed_of(data, workers)([np.arange(len(rows))]))
    assert targets.tolist() == [int(row.label) % 2 for row in rows]
    plain = torch.stack([read_image(images / row.path, "UNCHANGED") / 255 for row in rows])
    kept = [torch.equal(a, b) for a, b in zip(inputs, plain, strict=True)]
    turned = [torch.equal(a.flip(-1), b) for a, b in zip(inputs, plain, strict=True)]
    assert all(a != b for a, b in zip(kept, turned, strict=True)) and 5 < sum(kept) < len(rows) - 5
    inputs, _ = next(Feed(data.test, data, CPU, torch.float32, True, False, workers)([np.array([0])]))
    pixels = read_image(images / data.test.dataset.rows[0].path, "UNCHANGED")
    assert torch.equal(inputs[0], (255 - pixels) / 255)


@pytest.mark.parametrize("name", ["soft", "soft_list"])
@pytest.mark.parametrize("workers", [0, 2])
def test_targets_that_are_probabilities(images: Path, name: str, workers: int):
    data = csv_images(str(images), False, target_transform=f"user_data:{name}")
    assert data.classes == tuple(map(str, range(12)))
    feed = feed_of(data, workers, dtype=torch.float64)
    (_, targets), none = feed(iter([np.arange(30), np.array([], np.int64)]))
    assert targets.dtype == torch.float64 and targets.shape == (30, 12)
    assert targets.argmax(1).tolist() == [int(row.label) for row in list(data.train.dataset.rows)[:30]]
    assert len(none) == 0 and none.tree[0].shape == (2, 1, 28, 28) and none.tree[1].shape == (2, 12)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"transform": "user_data:none"}, "data.args.transform: got 'user_data:none', expected module:attribute"),
        ({"test_transform": "no_such_module:x"}, "data.args.test_transform: got 'no_such_module:x'"),
        ({"target_transform": "user_data"}, "data.args.target_transform: got 'user_data'"),
        ({"transform": ":x"}, "data.args.transform: got ':x'"),
        ({"transform": "user_data:NOT_CALLABLE"}, "which is no callable"),
        ({"transform": "user_data:to_array"}, "data.args.transform: got ndarray from it, expected a tensor"),
        ({"mode": "GREY"}, "data.args.mode: got 'GREY', expected one of UNCHANGED, GRAY"),
        ({"labels": "text"}, "data.args.labels: got 'text', expected one of auto, numbers, names"),
        ({"upright": "yes"}, "data.args.upright: got 'yes', expected one of True, False"),
        ({"test_fraction": 0.0}, "data.args.test_fraction: got 0.0 of 40 images"),
        ({"test_fraction": 1.0}, "data.args.test_fraction: got 1.0"),
        ({"annotations": "none.csv"}, "data.args.annotations: got "),
        ({"test_annotations": "none.csv"}, "data.args.test_annotations: got "),
        ({"annotations": "images"}, "Is a directory"),
        ({"mean": (0.1, 0.2)}, "got mean (0.1, 0.2), expected a number per channel of (1, 28, 28)"),
    ],
)
def test_arguments_that_are_refused(images: Path, arguments: dict, says: str):
    assert says in refused(images, **arguments)


# -- a CSV that is wrong ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "without rows"),
        (b"\n\n", "without rows"),
        (b"file,target\n", "without rows"),
        (b"file,target\na.png,1\nb.png\n", "annotations.csv line 3: got 'b.png', expected an image path, a comma"),
        (b"file,target\na.png,1\n\nb.png, \n", "annotations.csv line 4: got 'b.png, '"),
        (b"file,target\n,1\n", "annotations.csv line 2: got ',1'"),
        (b"file;target\na.png;1\n", "annotations.csv line 1: got 'file;target'"),
        (b"file,target\na, b.png,1\n", "annotations.csv line 2: got 'a, b.png,1'"),
        (b'file,target\n"a.png,1\n', "that can be read"),
        (b"file,target\n\xff\xfe.png,1\n", "that can be read"),
        (b"a.png,1\nb.png,1\n", "annotations.csv line 1: got the image a.png, expected a header line"),
        (b"\xef\xbb\xbfa.png,1\nb.png,1\n", "annotations.csv line 1: got the image a.png, expected a header line"),
        (b"file,target\na.png,1\nb.png,2024001\n", "annotations.csv line 3: got label 2024001"),
        (b"x" * 300 + b",target\na.png\n", "annotations.csv line 2: got 'a.png', expected an image path"),
        (b"x" * 300 + b",target\na.png,1\nb.png,-1\n", "annotations.csv line 3: got label -1"),
        (b"x" * 300 + b"\na.png,1\n", f"annotations.csv line 1: got '{'x' * 60}...', expected an image path"),
        (b"x" * 200_000 + b",target\na.png,1\n", "field larger than field limit"),
    ],
)
def test_an_annotations_file_that_is_refused(tmp_path: Path, content: bytes, says: str):
    for name in ("a.png", "b.png"):
        Image.new("L", (2, 2)).save(tmp_path / name)
    (tmp_path / "annotations.csv").write_bytes(content)
    line = refused(tmp_path)
    assert says in line and str(tmp_path / "annotations.csv") in line


# -- an image that is wrong -------------------------------------------------------------------------------------------


def encoded(size: tuple[int, ...], format: str = "PNG") -> bytes:
    """A picture as a file, of [height, width] or [height, width, channels]."""
    out = io.BytesIO()
    pixels = np.random.default_rng(0).integers(256, size=size, dtype=np.uint8)
    Image.fromarray(pixels).save(out, format)
    return out.getvalue()


PNG, JPEG = encoded((28, 28)), encoded((28, 28), "JPEG")


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "No such file or directory"),
        (b"", "it is not in an image format"),
        (b"no image", "it is not in an image format"),
        (PNG[: len(PNG) // 2], "truncated"),
        (PNG[:10], "it is not in an image format, or cut off"),
        (flipped(PNG, len(PNG) // 2), "broken"),
        (JPEG[: len(JPEG) // 2], "truncated"),
        (encoded((28, 27)), "of shape (1, 28, 27), expected (1, 28, 28) as the first image has"),
        (encoded((28, 28, 3)), "of shape (3, 28, 28), expected"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_is_named_with_its_row(images: Path, content: bytes | None, says: str, workers: int, capfd):
    data = csv_images(str(images), False)
    row = data.train.dataset.rows[20]
    line_number = 1 + (images / "annotations.csv").read_text().splitlines().index(f"{row.path},{row.label}")
    (images / row.path).unlink()
    if content is not None:
        (images / row.path).write_bytes(content)
    epoch = feed_of(data, workers)(iter([np.arange(4), np.arange(18, 22), np.arange(4)]))
    next(epoch)  # the batches before it are had
    with pytest.raises(ConfigError) as error:
        next(epoch)
    (line,) = error.value.lines
    assert line.startswith(f"{images / 'annotations.csv'} line {line_number}: got {images / row.path}") and says in line
    assert capfd.readouterr() == ("", "") and not multiprocessing.active_children()


def test_a_bad_first_image_is_said_at_once(images: Path):
    first = csv_images(str(images), False).train.dataset.rows[0].path
    (images / first).write_bytes(b"")
    assert str(images / first) in refused(images)


RAMP = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)  # whose upper 8 bits are 0 to 255


def sixteen_bits(root: Path, name: str) -> Path:
    """The ramp in a file of a format with 16 bits."""
    if name.endswith("pgm"):
        (root / name).write_bytes(b"P5 16 16 65535\n" + RAMP.astype(">u2").tobytes())
    elif name == "big.tif":
        Image.frombytes("I;16B", (16, 16), RAMP.astype(">u2").tobytes()).save(root / name)
    else:
        Image.fromarray(RAMP).save(root / name)
    return root / name


@pytest.mark.parametrize("name", ["a.png", "a.tif", "big.tif", "a.pgm"])
def test_of_sixteen_bits_the_upper_eight_are_taken(tmp_path: Path, name: str):
    path = sixteen_bits(tmp_path, name)
    for mode, channels in (("GRAY", 1), ("RGB", 3), ("GRAY_ALPHA", 2)):
        pixels = read_image(path, mode)
        assert pixels.dtype == torch.uint8 and pixels.shape == (channels, 16, 16)
        assert pixels[0].flatten().tolist() == list(range(256))
    unchanged = read_image(path, "UNCHANGED")
    assert unchanged.dtype == torch.uint16 and unchanged[0].numpy().tolist() == RAMP.tolist()


def test_sixteen_bits_unchanged(tmp_path: Path):
    """They are refused, or made floats of."""
    sixteen_bits(tmp_path, "a.png")
    rewrite(tmp_path, "a.png,0", "./a.png,1")
    (tmp_path / "test.csv").write_text((tmp_path / "annotations.csv").read_text())
    says = refused(tmp_path, test_annotations="test.csv")
    assert says.startswith(f"{tmp_path / 'annotations.csv'} line 2: got {tmp_path / 'a.png'} with 16 bits a pixel")
    assert "--data.args.mode GRAY" in says
    data = csv_images(str(tmp_path), False, test_annotations="test.csv", transform="user_data:sixteen_to_float")
    inputs, _ = next(feed_of(data)([np.array([0])]))
    assert torch.equal(inputs[0, 0], torch.from_numpy(RAMP.astype(np.float32)) / 65535)


@pytest.mark.parametrize(("kind", "says"), [(np.int32, "integers of 32 bits"), (np.float32, "floats of 32 bits")])
def test_thirty_two_bits(tmp_path: Path, kind: type, says: str):
    Image.fromarray(RAMP.astype(kind)).save(tmp_path / "a.tif")
    rewrite(tmp_path, "a.tif,0")
    rewrite(tmp_path, "a.tif,0", name="test.csv")
    assert says in refused(tmp_path, mode="GRAY", test_annotations="test.csv")
    assert torch.equal(read_image(tmp_path / "a.tif", "UNCHANGED")[0], torch.from_numpy(RAMP.astype(kind)))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif"])
def test_photographs_are_turned_as_in_a_viewer(tmp_path: Path, orientation: int, name: str):
    exif = Image.Exif()
    exif[0x0112] = orientation
    shown = np.zeros((16, 8, 3), np.uint8)
    shown[:8, :4], shown[8:, :4], shown[:8, 4:] = 250, 120, 50
    stored = {
        1: shown, 2: shown[:, ::-1], 3: shown[::-1, ::-1], 4: shown[::-1], 5: shown.transpose(1, 0, 2),
        6: np.rot90(shown), 7: np.rot90(shown, 2).transpose(1, 0, 2), 8: np.rot90(shown, -1),
    }[orientation]  # fmt: skip
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / name, exif=exif, quality=100)
    for mode in ("UNCHANGED", "GRAY"):
        turned = read_image(tmp_path / name, mode).permute(1, 2, 0).numpy().astype(int)
        assert turned.shape[:2] == (16, 8) and np.abs(turned - shown).max() <= 8
    if not name.endswith("tif"):  # those Pillow turns itself
        left = read_image(tmp_path / name, "UNCHANGED", upright=False).permute(1, 2, 0).numpy().astype(int)
        assert left.shape == stored.shape and np.abs(left - stored).max() <= 8


@pytest.mark.filterwarnings("ignore:.*orrupt EXIF")
def test_exif_data_that_cannot_be_read_turn_nothing(tmp_path: Path):
    image = Image.fromarray(np.full((16, 8, 3), 90, np.uint8))
    for i, exif in enumerate((b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0")):
        image.save(tmp_path / f"{i}.jpg", exif=exif)
        assert read_image(tmp_path / f"{i}.jpg", "UNCHANGED").shape == (3, 16, 8)


def test_no_damaged_byte_of_a_png_goes_unseen(tmp_path: Path):
    """A byte changes what is decoded only if that is refused."""
    path = tmp_path / "damaged.png"
    unseen = []
    for place in range(len(PNG)):
        path.write_bytes(flipped(PNG, place))
        try:
            pixels = read_image(path, "UNCHANGED")
        except Exception:
            continue
        if pixels.tolist() != np.asarray(Image.open(io.BytesIO(PNG)))[None].tolist():
            unseen.append(place)
    assert not unseen


@pytest.mark.parametrize(
    ("mode", "kept", "shape"),
    [
        ("UNCHANGED", "1", (1, 2, 3)),
        ("UNCHANGED", "L", (1, 2, 3)),
        ("UNCHANGED", "P", (3, 2, 3)),
        ("UNCHANGED", "LA", (2, 2, 3)),
        ("UNCHANGED", "RGBA", (4, 2, 3)),
        ("GRAY", "RGB", (1, 2, 3)),
        ("GRAY_ALPHA", "RGB", (2, 2, 3)),
        ("RGB", "L", (3, 2, 3)),
        ("RGB_ALPHA", "P", (4, 2, 3)),
    ],
)
def test_modes(tmp_path: Path, mode: str, kept: str, shape: tuple[int, ...]):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (3, 2), (255, 255, 255)).convert(kept).save(tmp_path / name)
    rewrite(tmp_path, "a.png,0", "b.png,0")
    data = csv_images(str(tmp_path), False, mode=mode)
    assert data.input_shape == shape
    inputs, _ = next(feed_of(data)([np.array([0])]))
    assert inputs.unique().tolist() == [1.0]  # white, and opaque
