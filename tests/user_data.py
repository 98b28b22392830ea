"""What a user brings: transforms and a data set of their own, in a module of their own."""

import random
import time

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision.transforms import v2

from dist_train.data.sets import Data, FromFiles

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
