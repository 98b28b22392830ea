"""Batches that are trees: any type of tensor, any nesting, in memory, in mapped files and read sample by sample."""

from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset
from torch.utils.data._utils.pin_memory import pin_memory

from dist_train.data.agree import sketch
from dist_train.data.batch import Batch, flatten, leaves_of, mapped, names_of
from dist_train.data.feed import Feed
from dist_train.data.reader import Read
from dist_train.data.sets import Columns, Data, Samples
from dist_train.errors import ConfigError

CPU = torch.device("cpu")
SOME = np.array([3, 1, 2])
KINDS = (
    torch.bool,
    torch.uint8,
    torch.uint16,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.complex64,
    torch.bfloat16,
)


class Pair(NamedTuple):
    text: Any
    mask: Any


@dataclass(frozen=True)
class Scan:
    pixels: Any
    more: dict[str, Any]
    shape: tuple[int, ...] = field(init=False, default=(2, 2))  # no argument of its constructor


@dataclass(slots=True)
class Slots:
    a: Any
    b: Any

    def __post_init__(self) -> None:
        assert len(self.b) > 2, "made again"


def feed_of(split, data: Data | None = None, dtype: torch.dtype = torch.float32, workers: int = 0, **more) -> Feed:
    return Feed(split, data or Data(split), CPU, dtype, True, more.pop("one_hot", False), workers, **more)


def batch_of(feed: Feed, samples: np.ndarray = SOME) -> Batch:
    return next(feed([samples]))


class Listed(Dataset):
    """Items of a list."""

    def __init__(self, items: list[Any]):
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Any:
        item = self.items[i]
        if isinstance(item, Exception):
            raise item
        return item


def padded(items: list[torch.Tensor]) -> tuple[torch.Tensor, np.ndarray]:
    """A collate that gives a tuple, with an array in it."""
    return torch.nn.utils.rnn.pad_sequence(items, batch_first=True), np.array([len(item) for item in items])


def encoded(items: list[int]) -> Any:
    from transformers import BatchEncoding

    return BatchEncoding({"input_ids": torch.tensor([[i, i + 1] for i in items]), "text": [str(i) for i in items]})


def broken(items: list[Any]) -> Any:
    raise KeyError("nothing of that name")


# -- trees -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tree", "names"),
    [
        ((1, 2), ["0", "1"]),
        ({"a": 1, "b": {"c": [2, 3]}}, ["a", "b.c.0", "b.c.1"]),
        (Pair(1, {"x": 2}), ["0", "1.x"]),
        (Scan(1, {"x": (2, Pair(3, 4))}), ["pixels", "more.x.0", "more.x.1.0", "more.x.1.1", "shape.0", "shape.1"]),
        (Slots(1, [2, 3, 4]), ["a", "b.0", "b.1", "b.2"]),
        (OrderedDict(b=1, a=[]), ["b"]),
        (5, [""]),
    ],
    ids=["tuple", "dict", "NamedTuple", "dataclass", "slots", "empty branch", "leaf"],
)
def test_a_tree_and_its_leaves(tree: Any, names: list[str]):
    leaves, rebuild = flatten(tree)
    assert leaves == leaves_of(tree) and names_of(tree) == names
    other = rebuild([f"new {leaf}" for leaf in leaves])
    assert leaves_of(other) == [f"new {leaf}" for leaf in leaves] and names_of(other) == names
    assert isinstance(tree, int) or type(other) is (dict if isinstance(tree, dict) else type(tree))
    assert mapped(tree, lambda leaf: f"new {leaf}") == other and leaves_of(tree) == leaves


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_leaf_keeps_its_type(kind: torch.dtype):
    leaf = torch.arange(12).view(6, 2).to(kind)
    split = Columns({"x": leaf, "deep": Pair(leaf, [torch.ones(6).double()])})
    feed, data = feed_of(split), Data(split)
    batch = batch_of(feed)
    same = kind if not kind.is_floating_point else torch.float32
    assert torch.equal(batch["x"], leaf[SOME].to(same)) and batch["x"].dtype == same
    assert batch["deep"].mask[0].dtype == torch.float32 and torch.equal(batch.ids, torch.from_numpy(SOME))
    changed = Data(Columns({"x": leaf, "deep": Pair(torch.cat([leaf[:5], leaf[:1]]), [torch.ones(6).double()])}))
    assert data.fingerprint() != changed.fingerprint()
    assert sketch(feed, 3) == sketch(feed_of(split), 3) != sketch(feed_of(changed.train), 3)


@pytest.mark.parametrize("kind", [torch.int8, torch.int16, torch.bool, torch.complex64], ids=str)
def test_the_input_of_a_pair_that_is_neither_pixels_nor_floats_stays(kind: torch.dtype):
    inputs = torch.arange(12).view(6, 2).to(kind)
    split = Columns((inputs, torch.zeros(6, 4, 4, dtype=torch.uint8)))
    data = Data(split, mean=(0.5,), std=(0.1,))
    given, pictures = batch_of(feed_of(split, data))
    assert given.dtype == kind and torch.equal(given, inputs[SOME]) and pictures.dtype == torch.uint8
    items = Samples(Listed(list(zip(inputs, split.tree[1], strict=True))))
    assert torch.equal(batch_of(feed_of(items, Data(items, mean=(0.5,), std=(0.1,))))[0], given)


def test_mapped_arrays_stay_mapped(tmp_path: Path, recwarn: pytest.WarningsRecorder):
    np.save(tmp_path / "x.npy", np.arange(40, dtype=np.float64).reshape(10, 4))
    array = np.load(tmp_path / "x.npy", mmap_mode="r")
    split = Columns({"x": array, "y": np.arange(10)})
    assert split.tree["x"].data_ptr() == array.ctypes.data and not recwarn.list
    assert torch.equal(batch_of(feed_of(split))["x"], torch.arange(40.0).view(10, 4)[SOME])
    assert Data(split).fingerprint() and not recwarn.list


@pytest.mark.parametrize(
    ("array", "why"),
    [(np.array(["a", "b"]), "<U1 [2]"), (np.array([1, 2], ">i4"), ">i4 [2]"), (np.array([[], None], object), "object")],
    ids=["text", "byte order", "objects"],
)
def test_an_array_that_torch_does_not_take(array: np.ndarray, why: str):
    with pytest.raises(ConfigError, match="in this machine's order") as error:
        Columns((torch.zeros(2), array))
    assert error.value.lines[0].startswith(f"data.name: got an array {why}")


def test_several_test_splits_by_name():
    one, other = Columns({"x": torch.arange(4)}), Columns({"x": torch.arange(3)})
    data = Data(one, {"clean": one, "noisy": other})
    assert list(data.splits) == ["train", "clean", "noisy"] and data.tests["noisy"] is other
    assert data.fingerprint() != Data(one, {"noisy": one, "clean": other}).fingerprint()
    assert Data(one).tests == {} and list(Data(one, other).tests) == [""]
    for name in ("train", "", "a/b", 3):
        with pytest.raises(ConfigError, match="as the name of a test split"):
            Data(one, {name: other})


# -- samples ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_a_tree_is_the_same_from_a_worker(workers: int):
    """Torch's own conversion in the loader makes lists of tuples, and leaves the arrays of dataclasses."""
    split = Samples(Listed([torch.arange(i + 1) for i in range(6)]), collate=padded)
    feed = feed_of(split, workers=workers)
    batch = batch_of(feed)
    assert type(batch.tree) is tuple and torch.equal(batch.tree[1], torch.tensor([4, 2, 3]))
    assert batch.tree[0].shape == (3, 4) and batch.tree[0].dtype == torch.int64
    assert all(torch.equal(a, b) for a, b in zip(batch, feed.of(SOME), strict=True))


def test_what_is_pinned(monkeypatch: pytest.MonkeyPatch):
    """As torch's loader does it, which leaves dataclasses alone by itself."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self + 100)
    tree = (torch.tensor([1]), Scan(torch.tensor([2]), {"text": ["a"], "pair": Pair(torch.tensor([3]), 4)}))
    pinned = pin_memory(Read(tree)).tree
    assert type(pinned) is tuple and type(pinned[1]) is Scan and type(pinned[1].more["pair"]) is Pair
    assert [int(leaf) for leaf in leaves_of(pinned) if isinstance(leaf, torch.Tensor)] == [101, 102, 103]
    assert int(pin_memory(tree)[1].pixels) == 2


def test_what_a_tokenizer_gives():
    feed = feed_of(Samples(Listed(list(range(6))), collate=encoded))
    batch = batch_of(feed)
    assert type(batch.tree) is dict and torch.equal(batch["input_ids"][:, 0], torch.from_numpy(SOME))
    assert batch["text"] == ["3", "1", "2"]


@pytest.mark.parametrize("draws", [True, False])
def test_items_that_are_dataclasses(draws: bool):
    items = [Scan(torch.full((2,), float(i)), {"name": f"scan {i}", "at": (i, i * 0.5)}) for i in range(5)]
    batch = batch_of(feed_of(Samples(Listed(items), draws=draws)))
    assert isinstance(batch.tree, Scan) and torch.equal(batch.tree.pixels[:, 0], torch.tensor([3.0, 1.0, 2.0]))
    assert batch.tree.more["name"] == ["scan 3", "scan 1", "scan 2"]
    assert batch.tree.more["at"][1].dtype == torch.float32  # of floats the run's


def test_a_class_with_several_inputs():
    items = [({"ids": torch.tensor([i]), "mask": torch.tensor([True])}, i % 2) for i in range(4)]
    split = Samples(Listed(items))
    inputs, targets = batch_of(feed_of(split, Data(split, classes=("a", "b"))))
    assert torch.equal(inputs["ids"][:, 0], torch.from_numpy(SOME)) and targets.tolist() == [1, 1, 0]


def test_text_as_the_target_of_a_pair():
    split = Samples(Listed([(torch.ones(2), f"text {i}") for i in range(4)]))
    inputs, targets = batch_of(feed_of(split, one_hot=True), np.array([2]))
    assert inputs.shape == (1, 2) and list(targets) == ["text 2"]


def test_what_a_data_set_holds_is_not_changed():
    held = torch.ones(1, 3)
    split = Samples(Listed([held] * 3), collate=lambda items: (items[0], torch.zeros(1)))
    feed = feed_of(split, Data(split, mean=(0.5,), std=(0.25,)))
    for _ in range(2):
        assert batch_of(feed, np.array([1]))[0].tolist() == [[2.0] * 3]
    assert held.tolist() == [[1.0] * 3]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("what", ["raises", "collate", "shapes"])
def test_the_samples_of_an_error_are_named(what: str, workers: int):
    items: list[Any] = [torch.zeros(2) for _ in range(6)]
    items[2] = ValueError("of its own") if what == "raises" else torch.zeros(3)
    split = Samples(Listed(items), collate=broken if what == "collate" else None)
    if what == "collate":
        with pytest.raises(ConfigError) as error:
            feed_of(split, workers=workers)
        expected = (
            "sample 0: your own code raises an error when they are put together: KeyError: 'nothing of that name'"
        )
    else:
        feed = feed_of(split, workers=workers)
        with pytest.raises(ConfigError) as error:
            batch_of(feed)
        expected = {
            "raises": "sample 2: your own code raises an error when it is read: ValueError: of its own",
            "shapes": "samples 3 to 2: got items (Tensor) that cannot be stacked",
        }[what]
    (line,) = error.value.lines
    assert line.startswith(f"data.name: {expected}"), line
    assert what == "shapes" or f"{__file__}, line" in line
