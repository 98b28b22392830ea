"""Data sets by import path: of torchvision, of datasets, and the user's own."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset

from dist_train.config.load import load
from dist_train.data.generators import held
from dist_train.data.sets import Columns, Data
from dist_train.errors import ConfigError
from dist_train.ranks.launcher import Launcher
from dist_train.run import assemble
from dist_train.run.assemble import Parts
from dist_train.run.check import check

from data_files import fashion_mnist_root, made_images
from zygote import Run, Zygote

FAKE = ["--data.name", "torchvision.datasets:FakeData", "--data.args", "{size: 50, image_size: [3, 8, 8]}"]
TEN = ["--data.facts", "{classes: 10}"]


class Numbers(Dataset):
    """Pairs of a tensor and a class; root is asked for by name."""

    def __init__(self, root: str, count: int = 12, low: int = 0, options: dict | None = None):
        self.classes, self.count, self.low, self.root = ["even", "odd"], count, low, root

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return torch.full((4,), float(self.low + i)), i % 2


class Dicts(Numbers):
    def __getitem__(self, i: int) -> dict[str, Any]:
        picture = Image.fromarray(np.full((4, 5, 3), i, np.uint8))
        return {"image": picture, "label": i % 2, "name": f"number {i}"}


class Scenes(Numbers):
    """Pictures with a mask, which is a picture with a palette."""

    def __getitem__(self, i: int) -> tuple[Image.Image, Image.Image]:
        mask = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) % 3)
        mask.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
        picture = np.repeat(np.arange(64, dtype=np.uint8).reshape(8, 8, 1), 3, 2)
        return Image.fromarray(picture), mask


class Stream(IterableDataset):
    def __iter__(self):
        yield from range(10)


class Iterated:
    """As the streamed data sets of `datasets`: not torch's, and not by number."""

    def __iter__(self):
        yield from range(10)


def splits(root: str) -> dict[str, Dataset]:
    return {"train": Numbers(root, 8), "validation": Numbers(root, 4), "hard": Numbers(root, 3)}


def no_train(root: str) -> dict[str, Dataset]:
    return {"test": Numbers(root, 8)}


def two(root: str) -> tuple[Dataset, Dataset]:
    return Numbers(root), Numbers(root)


def data(root: str) -> Data:
    return Data(Columns((torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64))), classes=("a",))


def fails(root: str) -> Dataset:
    raise LookupError("no such thing")


def parts(*argv: str) -> Parts:
    config = load([*argv, "--train.device", "cpu", "--train.global_batch_size", "4"])
    check(config, Launcher("none", world_size=1, local_world_size=1), writes=False)
    return assemble.build(config, torch.device("cpu"))


def read(*argv: str) -> Data:
    config = load(list(argv))
    check(config, Launcher("none", world_size=1, local_world_size=1), writes=False)
    return assemble.read_data(config.data, False)


def refused(*argv: str) -> str:
    with pytest.raises(ConfigError) as error:
        parts(*argv)
    return "\n".join(error.value.lines)


def own(name: str) -> list[str]:
    return ["--data.name", f"test_by_path:{name}"]


# -- torchvision -----------------------------------------------------------------------------------------------------


def test_a_class_of_torchvision_that_asks_for_root_and_download(tmp_path_factory: pytest.TempPathFactory):
    root = ["--data.root", str(fashion_mnist_root(tmp_path_factory))]
    found = parts("--data.name", "torchvision.datasets:FashionMNIST", "--data.test_args", "{train: false}", *root)
    ours = assemble.read_data(load(["--data.name", "fashion_mnist", *root]).data, False)
    data = found.data
    assert data.input_shape == (1, 28, 28) and data.classes == ours.classes and len(data.tests) == 1
    for mine, its in ((data.train, ours.train), (data.tests[""], ours.tests[""])):
        assert len(mine) == len(its)
        image, label = mine.dataset[77]
        assert torch.equal(image, its.tree[0][77]) and label == int(its.tree[1][77]) and image.dtype == torch.uint8
    inputs, _ = found.feed.of(np.array([5]))
    assert torch.equal(inputs[0], ours.train.tree[0][5] / 255)


def test_held_out_samples_are_the_same_in_every_run():
    one, other = read(*FAKE, *TEN, "--data.test_fraction", "0.2"), read(*FAKE, *TEN, "--data.test_fraction", "0.2")
    held = one.tests[""].dataset.dataset.indices
    assert held == other.tests[""].dataset.dataset.indices and len(held) == 10
    assert sorted([*held, *one.train.dataset.dataset.indices]) == list(range(50))
    assert one.fingerprint() == other.fingerprint()
    assert one.fingerprint() != read(*FAKE, *TEN, "--data.test_fraction", "0.1").fingerprint()
    assert one.classes == tuple("0123456789") and one.input_shape == (3, 8, 8)
    assert read(*FAKE).test is None and read(*FAKE).classes == ()


def test_a_run_with_workers(zygote: Zygote, tmp_path: Path):
    argv = [*FAKE, *TEN, "--data.test_fraction", "0.2", "--data.workers", "1", "--train.epochs", "1"]
    argv += ["--data.transforms", "[{name: RandomCrop, size: 8, padding: 2}, RandomHorizontalFlip]"]
    argv += ["--data.batch_transforms", "[MixUp]", "--train.global_batch_size", "8", "--train.device", "cpu"]
    (ended,) = zygote.run(Run([*argv, "--run.dir", str(tmp_path / "run")]))
    ended.check()
    assert "40 samples to train on, 10 to test" in ended.out[0]


def test_runs_without_a_test_split_and_with_several(zygote: Zygote, tmp_path: Path):
    """Saved at the last step and ended there, by two ranks; then nothing is left to do but the end."""
    argv = [
        "--train.global_batch_size",
        "4",
        "--train.epochs",
        "2",
        "--train.device",
        "cpu",
        "--checkpoint.every_steps",
    ]
    for name, tests in (("none", []), ("two", ["--data.test_args", "{clean: {low: 9}, noisy: {count: 3}}"])):
        run = [*own("Numbers"), *tests, *argv, "2", "--run.dir", str(tmp_path / name)]
        for ended in zygote.run(Run(run, 2)):
            ended.check()
        (again,) = zygote.run(Run([*run, "--train.epochs", "3", "--run.dir", str(tmp_path / f"{name}-2"),
                                   "--checkpoint.resume", str(tmp_path / name)]))  # fmt: skip
        again.check()
        lines = (tmp_path / name / "metrics.jsonl").read_text() + (tmp_path / f"{name}-2" / "metrics.jsonl").read_text()
        assert ("eval/" in lines) == ("eval/clean/loss" in lines and "eval/noisy/accuracy" in lines) == (name == "two")
        (report,) = zygote.run(Run(["report", str(tmp_path / name)]))
        report.check()


def test_an_image_folder_of_torchvision(tmp_path: Path):
    for i, image in enumerate(made_images(8)[0]):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        Image.fromarray(image.numpy()).save(tmp_path / "ab"[i % 2] / f"{i}.png")
    found = read("--data.name", "torchvision.datasets:ImageFolder", "--data.root", str(tmp_path))
    assert found.classes == ("a", "b") and found.input_shape == (3, 28, 28) and len(found.train) == 8
    (tmp_path / "b" / "1.png").write_bytes(b"no picture")
    feed = parts("--data.name", "torchvision.datasets:ImageFolder", "--data.root", str(tmp_path)).feed
    with pytest.raises(ConfigError, match=r"data.name: sample 4: the data set raises an error .*1.png"):
        feed.of(np.arange(5))


def test_what_is_not_there_is_said_without_blaming_the_user(tmp_path: Path):
    argv = [
        "--data.name",
        "torchvision.datasets:FashionMNIST",
        "--data.root",
        str(tmp_path),
        "--data.download",
        "false",
    ]
    (line,) = refused(*argv).splitlines()
    assert line.startswith("data.name: torchvision.datasets:FashionMNIST raises RuntimeError: Dataset not found"), line


# -- datasets --------------------------------------------------------------------------------------------------------


def test_a_table_of_datasets(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["even", "odd"])})
    rows = {"image": [Image.fromarray(np.full((4, 5, 3), i, np.uint8)) for i in range(9)], "label": [0, 1, 0] * 3}
    table = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": table, "validation": table.select(range(4))}).save_to_disk(tmp_path / "table")
    name = ["--data.name", "datasets:load_from_disk", "--data.args", f"{{dataset_path: {tmp_path / 'table'}}}"]
    found = read(*name, "--data.pair", "[image, label]")
    assert found.classes == ("even", "odd") and found.input_shape == (3, 4, 5) and list(found.tests) == ["validation"]
    image, label = found.train.dataset[7]
    assert torch.equal(image, torch.full((3, 4, 5), 7, dtype=torch.uint8)) and label == 1
    assert parts(*name, "--data.pair", "[image, label]").feed.of(np.arange(3)).tree[0].shape == (3, 3, 4, 5)
    assert read(*name).train.dataset[2]["image"].shape == (3, 4, 5)
    assert held(found.train.dataset) == []  # nor those that the library's own code has
    again = read(*name, "--data.pair", "[image, label]")
    assert again.fingerprint() == found.fingerprint()
    assert "test_args" in refused(*name, "--data.test_args", "{split: test}", "--data.pair", "[image, label]")


def test_a_stream_of_datasets_is_refused(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    (tmp_path / "t.csv").write_text("a,b\n1,2\n3,4\n")
    stream = datasets.load_dataset("csv", data_files=str(tmp_path / "t.csv"), split="train", streaming=True)
    from dist_train.data import by_path

    with pytest.raises(ConfigError, match="an iterable data set, which has no order"):
        by_path.gathered(load(["--data.name", "datasets:load_dataset"]).data, stream, lambda args: None)


# -- ones own --------------------------------------------------------------------------------------------------------


def test_test_splits_by_name():
    args = ["--data.args", "{count: 6}", "--data.test_args"]
    (one,) = read(*own("Numbers"), *args, "{low: 100}").tests.values()
    assert len(one) == 6 and float(one.dataset[1][0][0]) == 101
    several = read(*own("Numbers"), *args, "{clean: {low: 10}, noisy: {low: 20, count: 3}}")
    assert [(name, len(split), float(split.dataset[0][0][0])) for name, split in several.tests.items()] == [
        ("clean", 6, 10.0),
        ("noisy", 3, 20.0),
    ]
    (same,) = read(*own("Numbers"), "--data.test_args", "{}").tests.values()
    assert len(same) == 12
    (key,) = read(*own("Numbers"), "--data.test_args.count", "5").tests.values()
    assert len(key) == 5
    named = parts(*own("Numbers"), *args, "{clean: {low: 10}, noisy: {low: 20, count: 3}}")
    assert list(named.test_feeds) == ["clean", "noisy"] and named.data.train.dataset.dataset.root == "data"


def test_a_dict_of_splits():
    found = read(*own("splits"))
    assert {name: len(split) for name, split in found.splits.items()} == {"train": 8, "validation": 4, "hard": 3}
    assert found.classes == ("even", "odd")
    assert "expected one named train; name the one to train on" in refused(*own("no_train"))


def test_dicts():
    found = read(*own("Dicts"), "--data.pair", "[image, label]")
    assert found.input_shape == (3, 4, 5) and found.train.dataset[3][1] == 1
    assert read(*own("Dicts")).train.dataset[3]["image"].shape == (3, 4, 5)
    line = refused(*own("Dicts"), "--data.pair", "[picture, label]")
    assert line == (
        "data.pair: got ['picture', 'label'], but sample 0 is a dict with image, label, name; expected keys of it"
    )


def test_a_mask_holds_the_numbers_of_its_palette():
    image, mask = read(*own("Scenes")).train.dataset[0]
    assert image.shape == (3, 8, 8) and mask.dtype == torch.int64 and mask.unique().tolist() == [0, 1, 2]


def test_facts_of_the_config():
    facts = "{classes: [cat, dog], input_shape: [4], mean: [0.5], vocab_size: 9}"
    found = read(*own("Numbers"), "--data.facts", facts)
    assert found.classes == ("cat", "dog")
    assert found.known() == {"input_shape": (4,), "classes": 2, "outputs": 2, "vocab_size": 9}
    assert found.mean == (0.5,)
    for wrong, line in (
        ("{classes: [no, yes]}", "got classes [False, True], expected their number, or a list of their names, in"),
        ("{classes: 0}", "got classes 0, expected their number, or a list of their names"),
        ("{input_shape: 4}", "got input_shape 4, expected the sizes of a sample's input"),
        ("{mean: 1}", "got mean 1, expected a number per channel"),
    ):
        assert refused(*own("Numbers"), "--data.facts", wrong).startswith(f"data.facts: {line}")


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (own("Stream"), "data.name: got Stream from test_by_path:Stream, an iterable data set, which has no order"),
        (
            own("Iterated"),
            "data.name: got Iterated from test_by_path:Iterated, an iterable data set, which has no order",
        ),
        (own("two"), "data.name: got tuple from test_by_path:two, expected a map-style data set with __len__"),
        ([*own("data"), "--data.test_args", "{}"], "data.test_args: got {}, but test_by_path:data gives a Data"),
        ([*own("Numbers"), "--data.test_args", "{a: 1}"], "data.args: got {'root': 'data', 'a': 1}, which"),
        (
            [*own("Numbers"), "--data.test_fraction", "1.0"],
            "data.test_fraction: got 1.0 of 12 samples, expected above 0",
        ),
        (
            [*own("Numbers"), "--data.test_fraction", "0.1", "--data.test_args", "{}"],
            "data.test_fraction: got 0.1 with",
        ),
        ([*own("Numbers"), "--data.pair", "[a]"], "data.pair: got ['a'], expected two keys"),
        (["--data.test_args", "{}"], "data.test_args: got {}, but digits has its own test split and pairs"),
        (own("fails"), "data.name: got test_by_path:fails, and your own code raises an error when it is called"),
    ],
    ids=["stream", "iterable", "tuple", "Data", "argument", "share", "both", "pair", "ours", "raises"],
)
def test_refused(argv: list[str], line: str):
    assert refused(*argv).startswith(line), refused(*argv)
