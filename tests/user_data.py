"""What a user brings: transforms and a data set of their own, in a module of their own."""

import os
import random
import sys
import time

import numpy as np
import torch
from torch.utils.data import Dataset, Subset
from torchvision.transforms import v2

from dist_train.data.sets import Columns, Data, FromFiles, InMemory
from dist_train.errors import ConfigError

if "SLOW_IMPORT" in os.environ and "dist_train.data.server" in sys.modules:
    time.sleep(120)

TO_FLOAT = v2.Compose([v2.Resize((14, 14)), v2.ToDtype(torch.float32, scale=True)])
FLIP = v2.RandomHorizontalFlip(p=0.5)
INVERT = v2.RandomInvert(p=1)
NOT_SENDABLE = lambda image: image  # noqa: E731
NOT_CALLABLE = 3


def draw(image: torch.Tensor) -> torch.Tensor:
    """One value that depends on all three generators."""
    return torch.rand(1) + np.random.rand() + random.random()


def to_array(image: torch.Tensor) -> np.ndarray:
    return image.numpy()


def sixteen_to_float(image: torch.Tensor) -> torch.Tensor:
    """uint16 pixels in [0, 1]."""
    return image.to(torch.float32) / 65535


def parity(number: int) -> int:
    return number % 2


def soft(number: int) -> torch.Tensor:
    """Probabilities of twelve classes."""
    return torch.full((12,), 0.1 / 11).index_fill(0, torch.tensor(number), 0.9)


def soft_list(number: int) -> list[float]:
    return soft(number).tolist()


class Squares(Dataset):
    """Item i is a square of brightness i, of class i % 4."""

    def __init__(self, n: int, target=None, image=None):
        self.n, self.target, self.image = n, target, image

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int):
        image = torch.full((3, 4, 4), i / self.n) if self.image is None or i == 0 else self.image
        return image, i % 4 if self.target is None or i == 0 else self.target


def squares(root: str, download: bool, n: int = 20) -> Data:
    return Data(FromFiles(Squares(n)), FromFiles(Squares(6)), input_shape=(3, 4, 4), classes=tuple("abcd"))


class Slow(Squares):
    """An item that never comes, or an error, or an end of the process that reads it, at sample `at`."""

    def __init__(self, n: int, at: int = -1, what: str = "raise"):
        super().__init__(n)
        self.at, self.what = at, what

    def __getitem__(self, i: int):
        if i == self.at and self.what == "raise":
            raise RuntimeError("of the data set")
        if i == self.at and self.what == "hang":
            time.sleep(600)
        return super().__getitem__(i)


def slow(root: str, download: bool, at: int = -1, what: str = "raise") -> Data:
    return Data(FromFiles(Slow(4000, at, what)), FromFiles(Squares(6)), input_shape=(3, 4, 4), classes=tuple("abcd"))


class Hidden:
    """A generator that nobody finds."""

    def random(self) -> float:
        return int.from_bytes(os.urandom(4), "little") / 2**32


class Module(torch.nn.Module):
    """A transform with a generator of its own."""

    def __init__(self, generator):
        super().__init__()
        self.generator = generator


class Noise(Dataset):
    """Item i is the sums of what the first half and the second half of some generators draw."""

    def __init__(self, generators: list, extra=None):
        self.generators, self.extra = generators, extra

    def __len__(self) -> int:
        return 24

    def __getitem__(self, i: int):
        draws = [self.draw(generator) for generator in self.generators]
        half = (len(draws) + 1) // 2
        DRAWN.append(sum(draws))
        return torch.tensor([sum(draws[:half]), sum(draws[half:])], dtype=torch.float64), 0

    @staticmethod
    def draw(generator) -> float:
        if isinstance(generator, float):
            return generator
        return float(
            torch.rand((), generator=generator) if isinstance(generator, torch.Generator) else generator.random()
        )


DRAWN: list[float] = []
TESTED = 6


def noise(root: str, download: bool) -> Data:
    train, test = Noise([np.random.default_rng(0)]), Subset(Noise([np.random.default_rng(1)]), range(TESTED))
    return Data(FromFiles(train), FromFiles(test), input_shape=(2,), classes=("a", "b"))


class Item(Squares):
    """The same sample at `at` and, where that is 0, at all numbers."""

    def __init__(self, sample, at: int):
        super().__init__(4)
        self.sample, self.at = sample, at

    def __getitem__(self, i: int):
        return self.sample if self.at in (0, i) else super().__getitem__(i)


def multi_hot(root: str, download: bool) -> Data:
    split = FromFiles(Item((torch.zeros(3, 4, 4), torch.tensor([1.0, 1, 0, 0])), 0))
    return Data(split, split, input_shape=(3, 4, 4), classes=tuple("abcd"))


def pair(root: str, download: bool):
    return FromFiles(Squares(4)), FromFiles(Squares(4))


class Rows(Dataset):
    """Rows of a tensor, of class 0 and up in turn; it counts what is read."""

    def __init__(self, images: torch.Tensor, shift: int = 0, bad: int = -1):
        self.images, self.shift, self.bad, self.reads = images, shift, bad, 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int):
        self.reads += 1
        if i == self.bad:
            raise ConfigError("it is gone")
        return self.images[i], (i + self.shift) % 4


class Unrepeated(Rows):
    def __getitem__(self, i: int):
        return super().__getitem__(i)[0] + Hidden().random(), i % 4


class Any(torch.nn.Module):
    """A model for any shape and number of classes."""

    def __init__(self, input_shape, classes):
        super().__init__()
        self.layer = torch.nn.Linear(int(np.prod(input_shape)), classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.flatten(1))


def by_rank(root: str, download: bool, what: str = "none", rank: int | None = None) -> Data:
    """Data that are other ones on rank 1, if `what` says so."""
    other = what if (int(os.environ.get("RANK", 0)) if rank is None else rank) == 1 else "none"
    n, n_test = 1400 if other == "count" else 1438, 5 if other == "test" else 6
    width = 9 if other == "shape" else 8
    images = torch.randint(250, (n, 1, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images += other == "pixels"
    labels = (torch.arange(n) + (other == "labels")) % 4
    if what == "split":
        labels = labels[torch.from_numpy(np.random.default_rng().permutation(n))]  # without a seed
    names = {"classes": "abcde", "names": "dcba"}.get(other, "abcd")
    train: Columns | FromFiles = InMemory(images, labels)
    if what in ("identity", "items", "targets", "unreadable", "none in files", "not repeated") or other == "kind":
        kind = Unrepeated if what == "not repeated" else Rows
        floats = images / 255 + (0.1 if other == "items" else 0.0)
        rows = kind(floats, shift=other == "targets", bad=n - 1 if other == "unreadable" else -1)
        train = FromFiles(rows, identity=other)
        if what != "identity":
            train = FromFiles(rows)
    test = InMemory(torch.zeros(n_test, 1, width, dtype=torch.uint8), torch.arange(n_test) % 4)
    return Data(train, test, (1, width), tuple(names), mean=(0.5 if other == "mean" else 0.0,))
