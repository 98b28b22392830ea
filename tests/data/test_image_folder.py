"""Images in a folder for each class."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dist_train.config.load import load
from dist_train.data.sets import Data
from dist_train.errors import ConfigError
from dist_train.ranks.launcher import Launcher
from dist_train.run import assemble
from dist_train.run.check import check

from data_files import mnist_png_root
from parity_cells import run_single

CPU = torch.device("cpu")


def images(home: Path, counts: dict[str, int], size: tuple[int, int] = (5, 4)) -> None:
    """A folder for each class, with pictures of one grey each."""
    for label, (name, count) in enumerate(counts.items()):
        (home / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(np.full(size, 10 * label + i, np.uint8)).save(home / name / f"{i}.png")


def folder(root: Path, *argv: str) -> Data:
    config = load(["--data.name", "image_folder", "--data.root", str(root), *argv])
    check(config, Launcher("none", world_size=1, local_world_size=1), writes=False)
    return assemble.read_data(config.data, False)


def refused(root: Path, *argv: str) -> str:
    with pytest.raises(ConfigError) as error:
        folder(root, *argv)
    return error.value.lines[0]


@pytest.mark.parametrize("test", ["test", "val"])
def test_train_and_test_side_by_side(tmp_path: Path, test: str):
    images(tmp_path / "train", {"dog": 3, "cat": 2, ".hidden": 1})
    images(tmp_path / test, {"cat": 2, "dog": 1})
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "train" / "cat" / ".1.png").write_text("left by a file manager")
    data = folder(tmp_path)
    assert data.classes == ("cat", "dog") and data.input_shape == (3, 5, 4)
    assert [label for _, label in (data.train.dataset[i] for i in range(5))] == [0, 0, 1, 1, 1]
    assert int(data.train.dataset[1][0][0, 0, 0]) == 11 and len(data.tests[""]) == 3
    grey = folder(tmp_path, "--data.args.mode", "GRAY", "--data.args.test", "train")
    assert grey.input_shape == (1, 5, 4) and len(grey.tests[""]) == 5


def test_held_out(tmp_path: Path):
    images(tmp_path / "mine", {"cat": 6, "dog": 4})
    data = folder(tmp_path, "--data.args", "{folder: mine, test_fraction: 0.3}")
    paths = [row.path for split in data.splits.values() for row in split.dataset.rows]
    assert len(data.train) == 7 and len(set(paths)) == 10
    (tmp_path / "other").mkdir()
    (tmp_path / "mine").rename(tmp_path / "other" / "mine")
    moved = folder(tmp_path / "other", "--data.args", "{folder: mine, test_fraction: 0.3}")
    assert moved.fingerprint() == data.fingerprint()
    assert moved.fingerprint() != folder(tmp_path / "other" / "mine", "--data.args.test_fraction", "0.2").fingerprint()


def test_a_bad_image_is_named(tmp_path: Path):
    images(tmp_path, {"cat": 4, "dog": 4})
    (tmp_path / "dog" / "2.png").write_bytes(b"no image")
    config = load(["--data.name", "image_folder", "--data.root", str(tmp_path), "--data.args.test_fraction", "0.1"])
    with pytest.raises(ConfigError) as error:
        parts = assemble.build(config, CPU)
        for split, feed in zip(parts.data.splits.values(), parts.feeds.values(), strict=True):
            list(feed([np.arange(len(split))]))
    assert f"got {tmp_path / 'dog' / '2.png'}, expected an image that can be decoded" in error.value.lines[0]


def test_images_of_other_sizes_need_a_transform(tmp_path: Path):
    images(tmp_path / "train", {"cat": 2, "dog": 2})
    images(tmp_path / "test", {"cat": 2, "dog": 2}, size=(9, 7))
    data = folder(tmp_path)
    with pytest.raises(
        ConfigError, match=r"shape \(3, 9, 7\), expected \(3, 5, 4\) .* set data.transforms and data.test"
    ):
        data.tests[""].dataset[0]
    resize = "[{name: Resize, size: [6, 6]}]"
    data = folder(tmp_path, "--data.transforms", resize, "--data.test_transforms", resize)
    assert data.input_shape == (3, 6, 6) and data.tests[""].dataset[1][0].shape == (3, 6, 6)
    assert type(data.train.dataset[0][0]) is torch.Tensor


def test_refused(tmp_path: Path):
    assert refused(tmp_path / "none").startswith(f"data.root: got {tmp_path / 'none'}, which cannot be read")
    assert "with 0 folders, expected one for each class" in refused(tmp_path)
    images(tmp_path / "train", {"cat": 0, "dog": 0})
    assert "without images in its folders" in refused(tmp_path)
    images(tmp_path / "more" / "train", {"cat": 2, "dog": 2})
    images(tmp_path / "more" / "test", {"cat": 1, "fox": 1})
    assert "fox, a class without training images" in refused(tmp_path / "more")
    assert refused(tmp_path, "--data.args.mode", "CMYK").startswith("data.args.mode: got 'CMYK', expected one of")
    assert refused(tmp_path, "--data.args.transforms", "x").startswith(
        "data.args.transforms: got 'x', but it is set by"
    )
    assert refused(tmp_path, "--data.test_fraction", "0.1").endswith("leave it out; write --data.args.test_fraction")


def test_a_model_learns_from_it(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory):
    """The PNG files of MNIST, in folders."""
    files = sorted((mnist_png_root(tmp_path_factory) / "images").iterdir())[:400]
    for path in files:
        (tmp_path / path.stem[-1]).mkdir(exist_ok=True)
        (tmp_path / path.stem[-1] / path.name).symlink_to(path)
    argv = [
        "--data.name",
        "image_folder",
        "--data.root",
        str(tmp_path),
        "--data.args.mode",
        "GRAY",
        "--data.workers",
        "0",
    ]
    argv += ["--train.epochs", "6", "--model.hidden", "[64]", "--train.device", "cpu", "--train.threads", "1"]
    run = run_single(load([*argv, "--track.every_steps", "1", "--train.eval_every_epochs", "null"]))
    assert run.evaluation["eval/accuracy"] > 0.6
