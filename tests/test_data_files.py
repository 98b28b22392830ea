"""Data in files: batches through DataLoader workers, and images listed in a CSV."""

import io
import multiprocessing
import random
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dist_train import assemble
from dist_train.config import load
from dist_train.data.csv_images import csv_images
from dist_train.data.feed import Feed
from dist_train.data.image_files import read_image
from dist_train.data.sets import Data, FromFiles
from dist_train.errors import ConfigError
from dist_train.order import Plan

from data_files import made_images, mnist_png_root, real_data, write_images
from parity_cells import run_single
from user_data import Squares, squares

CPU = torch.device("cpu")


@pytest.fixture(scope="session", autouse=True)
def worker_server():
    """Ends the process that workers are forked from, which the standard library keeps as long as this one lives."""
    yield
    for left in multiprocessing.active_children():  # of a test that failed: the server would wait for them
        left.kill()
    forkserver._forkserver._stop()  # what Python's own tests call


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
            out |= dict(zip(batch.tolist(), inputs.flatten().tolist(), strict=True))
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
    assert targets.tolist() == [0, 3] and len(parts.feed.split) == 21 and len(parts.test_feed.split) == 6


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
    data = csv_images(str(images), False)
    assert data.classes == ("7", "apple", "pear")
    rows = data.train.dataset.rows
    _, targets = next(feed_of(data)([np.arange(len(rows))]))
    assert targets.tolist() == [data.classes.index(row.label) for row in rows]


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
    (_, targets), (inputs, empty) = feed(iter([np.arange(30), np.array([], np.int64)]))
    assert targets.dtype == torch.float64 and targets.shape == (30, 12) and empty.shape == (0, 12)
    assert targets.argmax(1).tolist() == [int(row.label) for row in list(data.train.dataset.rows)[:30]]
    assert inputs.shape == (0, 1, 28, 28)


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


def test_sixteen_bits(tmp_path: Path):
    for name in ("a.png", "b.png"):
        Image.fromarray(np.full((2, 2), 60_000, np.uint16)).save(tmp_path / name)
    rewrite(tmp_path, "a.png,0", "b.png,0")
    assert "sample 0: got torch.uint16 [1, 2, 2], expected a tensor torch.uint8 or torch.float32" in refused(tmp_path)


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
