"""torchvision's data sets, decoded into memory. Download, checksums and folder layout are torchvision's."""

import contextlib
import io
import os
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torchvision import datasets

from dist_train.data.sets import Data, InMemory
from dist_train.errors import ConfigError

# Mean and deviation of the training pixels, a number per channel, measured on the training split.
MNIST_STATS = ((0.1307,), (0.3081,))
FASHION_STATS = ((0.2860,), (0.3530,))
KMNIST_STATS = ((0.1918,), (0.3483,))
CIFAR10_STATS = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


def mnist(root: str, download: bool) -> Data:
    """60,000 and 10,000 handwritten digits, 28x28. Source: LeCun, Cortes, Burges, 1998."""
    return _load(datasets.MNIST, root, download, MNIST_STATS, [f for f, _ in datasets.MNIST.resources])


def fashion_mnist(root: str, download: bool) -> Data:
    """60,000 and 10,000 pictures of clothes, 28x28. Source: Xiao, Rasul, Vollgraf, arXiv:1708.07747."""
    return _load(datasets.FashionMNIST, root, download, FASHION_STATS, [f for f, _ in datasets.FashionMNIST.resources])


def kmnist(root: str, download: bool) -> Data:
    """60,000 and 10,000 Japanese characters, 28x28. Source: Clanuwat et al., arXiv:1812.01718."""
    return _load(datasets.KMNIST, root, download, KMNIST_STATS, [f for f, _ in datasets.KMNIST.resources])


def cifar10(root: str, download: bool) -> Data:
    """50,000 and 10,000 colour photographs, 32x32. Source: Krizhevsky, 2009."""
    return _load(datasets.CIFAR10, root, download, CIFAR10_STATS, [datasets.CIFAR10.filename])


def _load(kind: type, root: str, download: bool, stats: tuple, files: list[str]) -> Data:
    folder = Path(root) / (kind.__name__ + "/raw" if issubclass(kind, datasets.MNIST) else "")
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):  # its progress bars
            train, test = _present(kind, root) or _fetched(kind, root, download, said)
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"data.root: got {root}, expected {', '.join(files)} in {folder} ({kind.__name__}); "
            f"{'no download: ' + reason if download else 'data.download is false'}; put the files there, "
            f"or point --data.root at the folder that has {kind.__name__}"
        ) from error
    return Data(
        _in_memory(train),
        _in_memory(test),
        input_shape=tuple(_in_memory_shape(train)),
        classes=tuple(str(name) for name in train.classes),
        mean=stats[0],
        std=stats[1],
    )


def _present(kind: type, root: str) -> tuple | None:
    """Both splits if they are there, without a lock: the folder may be read-only."""
    try:
        return kind(root, train=True), kind(root, train=False)
    except RuntimeError:  # torchvision: "Dataset not found"
        return None


def _fetched(kind: type, root: str, download: bool, said: io.StringIO) -> tuple:
    """Both splits, unpacked or downloaded by one rank of the node while the others wait at the lock."""
    if not download:
        raise RuntimeError("Dataset not found")
    os.makedirs(root, exist_ok=True)
    with FileLock(Path(root) / f".{kind.__name__}.lock"):
        return kind(root, train=True, download=True), kind(root, train=False, download=True)


def _in_memory(split: datasets.VisionDataset) -> InMemory:
    images = torch.as_tensor(np.asarray(split.data))  # [n, 28, 28], or [n, 32, 32, 3]
    images = images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2)
    return InMemory(images.contiguous(), torch.as_tensor(split.targets, dtype=torch.int64))


def _in_memory_shape(split: datasets.VisionDataset) -> tuple[int, ...]:
    shape = split.data.shape[1:]
    return (1, *shape) if len(shape) == 2 else (shape[2], *shape[:2])
