"""Data in memory: the sets that need no files, and exact batches of any of them."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import sklearn
import torch
from torch.utils.data import TensorDataset
from torchvision import transforms

from dist_train.data import digits as digits_module
from dist_train.data import synthetic as synthetic_module
from dist_train.data.digits import digits
from dist_train.data.feed import Feed
from dist_train.data.sets import Data, FromFiles, InMemory
from dist_train.data.synthetic import synthetic
from dist_train.data.vision import fashion_mnist
from dist_train.errors import ConfigError

from data_files import fashion_mnist_root

CPU = torch.device("cpu")


def feed_of(data: Data, dtype: torch.dtype = torch.float32, normalize: bool = False, one_hot: bool = False) -> Feed:
    return Feed(data.train, data, CPU, dtype, normalize, one_hot)


def colours() -> Data:
    """Three channels that differ, in statistics too."""
    draw = torch.Generator().manual_seed(5)
    images = torch.randint(256, (50, 3, 6, 5), generator=draw, dtype=torch.uint8)
    images[:, 1] //= 2
    labels = torch.arange(50) % 7
    split = InMemory(images, labels)
    return Data(split, split, (3, 6, 5), tuple("abcdefg"), mean=(0.4914, 0.2411, 0.4465), std=(0.2470, 0.1435, 0.2616))


# -- the sets ---------------------------------------------------------------------------------------------------------


def test_digits():
    data = digits("no/such/folder", False)
    assert data.train.tree[0].shape == (1438, 1, 8, 8) and data.test.tree[0].shape == (359, 1, 8, 8)
    assert data.classes == tuple("0123456789") and set(data.train.tree[1].tolist()) == set(range(10))
    assert int(data.train.tree[0].min()) == 0 and int(data.train.tree[0].max()) == 255


def test_the_first_digit():
    """The top row of the zero that scikit-learn's documentation shows is 0 0 5 13 9 1 0 0, of 16."""
    data = digits("", False)
    assert data.train.tree[0][0, 0, 0].tolist() == [0, 0, 79, 207, 143, 15, 0, 0]  # floor(value * 255 / 16)
    assert data.train.tree[1][:6].tolist() == [0, 1, 2, 3, 5, 6] and data.test.tree[1][:3].tolist() == [4, 9, 4]


def test_digits_mean_and_deviation_are_the_datas():
    data = digits("", False)
    pixels = data.train.tree[0].double() / 255
    assert data.mean == (round(pixels.mean().item(), 4),)
    assert data.std == (round(pixels.std(unbiased=False).item(), 4),)


@pytest.mark.parametrize("kept", ["nowhere", "half a file", "another table"])
def test_digits_of_a_version_that_keeps_them_elsewhere(kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Then scikit-learn is imported; the data are the same, bit by bit."""
    file, loaded = tmp_path / "digits.csv.gz", digits("", False)
    if kept == "half a file":
        packed = (Path(sklearn.__file__).parent / digits_module.FILE).read_bytes()
        file.write_bytes(packed[: len(packed) // 2])
    elif kept == "another table":
        file.write_bytes(gzip.compress(b"1,2,3\n4,5,6\n"))
    monkeypatch.setattr(digits_module, "FILE", str(file))
    again = digits("", False)
    assert torch.equal(again.train.tree[0], loaded.train.tree[0]) and torch.equal(
        again.test.tree[1], loaded.test.tree[1]
    )
    assert again.fingerprint() == loaded.fingerprint()
    assert again.fingerprint() == "df64a0c4690e08ef67f3b84f54460cc407fa6e0129f30cb684c2d4b1cb9a997c"


@pytest.mark.parametrize(("n", "shape", "classes"), [(1, (1, 28, 28), 10), (33, (3, 5, 4), 2), (12, (7,), 1000)])
def test_synthetic_of_any_size(n: int, shape: tuple[int, ...], classes: int):
    data = synthetic("", False, n=n, n_test=5, shape=shape, classes=classes)
    assert data.train.tree[0].shape == (n, *shape) and len(data.test) == 5
    assert len(data.classes) == classes and data.input_shape == shape
    inputs, targets = next(feed_of(data, normalize=True)([np.arange(n)]))
    assert inputs.shape == (n, *shape) and targets.shape == (n,)


def test_synthetic_is_a_function_of_its_seed(monkeypatch: pytest.MonkeyPatch):
    one, other = synthetic("", False, n=500, seed=3), synthetic("", False, n=500, seed=4)
    torch.rand(5)  # the process's generator has no part in it
    monkeypatch.setattr(synthetic_module, "PIECE_PIXELS", 7 * 784)  # nor has the size of the pieces
    again = synthetic("", False, n=500, seed=3)
    assert torch.equal(one.train.tree[0], again.train.tree[0]) and torch.equal(one.train.tree[1], again.train.tree[1])
    assert torch.equal(one.test.tree[0], again.test.tree[0])
    assert not torch.equal(one.train.tree[0], other.train.tree[0])


@pytest.mark.parametrize(("noise", "low", "high"), [(0.5, 0.99, 1.0), (1.0, 0.0, 0.3)])
def test_a_linear_model_learns_synthetic_unless_it_is_all_noise(noise: float, low: float, high: float):
    data = synthetic("", False, n=2000, n_test=500, shape=(1, 8, 8), noise=noise)
    feed = feed_of(data, torch.float64, normalize=True, one_hot=True)
    inputs, targets = next(feed([np.arange(2000)]))
    weights = torch.linalg.lstsq(inputs.flatten(1), targets).solution
    test = next(Feed(data.test, data, CPU, torch.float64, True, False)([np.arange(500)]))
    accuracy = ((test[0].flatten(1) @ weights).argmax(1) == test[1]).double().mean().item()
    assert low <= accuracy <= high


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"n": 0}, "data.args.n: got 0"),
        ({"n_test": 1.5}, "data.args.n_test: got 1.5"),
        ({"classes": 1}, "data.args.classes: got 1"),
        ({"noise": 1.1}, "data.args.noise: got 1.1"),
        ({"shape": (1, 0)}, "data.args.shape: got (1, 0)"),
        ({"shape": ()}, "data.args.shape: got ()"),
    ],
)
def test_synthetic_refuses(arguments: dict, names: str):
    with pytest.raises(ConfigError) as refused:
        synthetic("", False, **arguments)
    assert str(refused.value).startswith(names)


# -- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: digits("", False), colours], ids=["grey", "colour"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_batch_is_to_tensor(make, dtype: torch.dtype):
    data = make()
    index = np.array([3, 0, 41, 3, 17])  # any order, twice the same
    inputs, targets = next(feed_of(data, dtype)([index]))
    by_hand = torch.stack([transforms.ToTensor()(data.train.tree[0][i].permute(1, 2, 0).numpy()) for i in index])
    assert inputs.dtype == dtype and targets.tolist() == data.train.tree[1][index].tolist()
    if dtype == torch.float32:
        assert torch.equal(inputs, by_hand)
    else:
        assert torch.equal(inputs, data.train.tree[0][index].double() / 255)

    inputs, _ = next(feed_of(data, dtype, normalize=True)([index]))
    by_hand = torch.stack([transforms.Normalize(data.mean, data.std)(image) for image in by_hand])
    assert torch.allclose(inputs.double(), by_hand.double(), rtol=0, atol=1e-6)


def test_float64_is_normalised_in_float64():
    data = colours()
    inputs, _ = next(feed_of(data, torch.float64, normalize=True)([np.arange(50)]))
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (data.mean, data.std))
    assert torch.allclose(inputs, (data.train.tree[0].double() / 255 - mean) / std, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_hot(dtype: torch.dtype):
    data = colours()
    _, targets = next(feed_of(data, dtype, one_hot=True)([np.arange(10)]))
    assert targets.dtype == dtype and torch.equal(targets, torch.eye(7, dtype=dtype)[data.train.tree[1][:10]])


@pytest.mark.parametrize("one_hot", [False, True])
def test_an_empty_batch(one_hot: bool):
    """It is a stand-in of the first samples, which says that none of them counts."""
    feed = feed_of(colours(), torch.float64, normalize=True, one_hot=one_hot)
    batch = next(feed([np.empty(0, np.int64)]))
    inputs, targets = batch
    assert len(batch) == 0 and batch.ids.tolist() == [0, 1]
    assert inputs.shape == (2, 3, 6, 5) and inputs.dtype == torch.float64
    assert targets.shape == ((2, 7) if one_hot else (2,))


def test_the_order_is_kept_and_the_data_is_not_changed():
    data = colours()
    before = data.train.tree[0].clone()
    batches = [np.array([7, 1]), np.array([], np.int64), np.array([49]), np.array([1, 7, 0])]
    first, second = (list(feed_of(data, normalize=True)(batches)) for _ in range(2))
    assert [batch.ids[: len(batch)].tolist() for batch in first] == [b.tolist() for b in batches]
    assert [t[: len(b)].tolist() for b, (_, t) in zip(batches, first, strict=True)] == [
        data.train.tree[1][b].tolist() for b in batches
    ]
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, second, strict=True))
    assert torch.equal(data.train.tree[0], before)


# -- memory -----------------------------------------------------------------------------------------------------------


def test_a_model_may_change_its_input():
    data = synthetic("unused", False, n=40)
    factor = torch.nn.Parameter(torch.full((1,), 2.0))
    for inputs, _ in feed_of(data)([np.arange(8), np.arange(8, 16), np.arange(8)]):
        before = inputs.clone()
        inputs.mul_(factor).sum().backward()
        assert torch.equal(inputs, 2 * before)
        torch.testing.assert_close(factor.grad, before.sum().view(1))
        factor.grad = None


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_the_pixels_are_held_once(tmp_path_factory: pytest.TempPathFactory):
    root = str(fashion_mnist_root(tmp_path_factory))
    fashion_mnist(root, True)  # unpacked by now, and imported what that needs
    before = resident_bytes()
    data = fashion_mnist(root, True)
    feeds = [Feed(split, data, CPU, torch.float32, True, False) for split in (data.train, data.test)]
    for feed in feeds:
        list(feed(np.arange(len(feed.split))[: 64 * 20].reshape(-1, 64)))
        images = feed.columns[0]
        assert images.dtype == torch.uint8 and images.is_contiguous()
        assert images.data_ptr() == feed.split.tree[0].data_ptr()
    pixels = data.train.tree[0].nbytes + data.test.tree[0].nbytes
    assert resident_bytes() - before < 1.5 * pixels + (4 << 20)


# -- what fits together -----------------------------------------------------------------------------------------------

IMAGES, LABELS = torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize(
    ("images", "labels", "more", "says"),
    [
        (IMAGES.view(4, 2, 2), LABELS, {}, "got train images torch.uint8 [4, 2, 2], expected [4, 1, 2, 2]"),
        (IMAGES, LABELS.int(), {}, "labels torch.int32"),
        (IMAGES, LABELS + 1, {}, "from 1 to 3, expected torch.int64 [4] from 0 to 2"),
        (IMAGES, LABELS - 1, {}, "from -1 to 1"),
        (IMAGES[:0], LABELS[:0], {}, "no samples in the train split"),
        (IMAGES, LABELS, {"mean": (0.5, 0.5)}, "got mean (0.5, 0.5)"),
        (IMAGES, LABELS, {"std": (0.0,)}, "got std (0.0,)"),
    ],
)
def test_a_data_set_that_does_not_fit_together(images: torch.Tensor, labels: torch.Tensor, more: dict, says: str):
    good = InMemory(IMAGES, LABELS)
    Data(good, good, (1, 2, 2), tuple("abc"))
    with pytest.raises(ConfigError) as refused:
        Data(InMemory(images, labels), good, (1, 2, 2), tuple("abc"), **more)
    assert str(refused.value).startswith("data.name: ") and says in str(refused.value)


def test_a_split_without_samples():
    good = InMemory(IMAGES, LABELS)
    with pytest.raises(ConfigError, match="no samples in the test split"):
        Data(good, FromFiles(TensorDataset(IMAGES[:0], LABELS[:0])), (1, 2, 2), tuple("abc"))
