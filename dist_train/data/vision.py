"""torchvision's data sets, decoded into memory. Download, checksums and folder layout are torchvision's."""

import contextlib
import io
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torchvision import datasets
from torchvision.datasets.utils import check_integrity

from dist_train.data.sets import Data, InMemory
from dist_train.errors import ConfigError

# Mean and deviation of the training pixels, a number per channel, measured on the training split.
MNIST_STATS = ((0.1307,), (0.3081,))
FASHION_STATS = ((0.2860,), (0.3530,))
KMNIST_STATS = ((0.1918,), (0.3483,))
CIFAR10_STATS = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))

# A server that is silent for so long is taken for none. A firewall that drops packets would take minutes a file.
NETWORK_TIMEOUT_S = 30.0

Archives = dict[str, str]  # file name: md5
KINDS = {
    "mnist": datasets.MNIST,
    "fashion_mnist": datasets.FashionMNIST,
    "kmnist": datasets.KMNIST,
    "cifar10": datasets.CIFAR10,
}


def mnist(root: str, download: bool) -> Data:
    """60,000 and 10,000 handwritten digits, 28x28. Source: LeCun, Cortes, Burges, 1998."""
    return _load("mnist", root, download, MNIST_STATS)


def fashion_mnist(root: str, download: bool) -> Data:
    """60,000 and 10,000 pictures of clothes, 28x28. Source: Xiao, Rasul, Vollgraf, arXiv:1708.07747."""
    return _load("fashion_mnist", root, download, FASHION_STATS)


def kmnist(root: str, download: bool) -> Data:
    """60,000 and 10,000 Japanese characters, 28x28. Source: Clanuwat et al., arXiv:1812.01718."""
    return _load("kmnist", root, download, KMNIST_STATS)


def cifar10(root: str, download: bool) -> Data:
    """50,000 and 10,000 colour photographs, 32x32. Source: Krizhevsky, 2009."""
    return _load("cifar10", root, download, CIFAR10_STATS)


def archives_of(name: str, root: str) -> tuple[Path, Archives]:
    """The folder that a data set's archives lie in, and their checksums.

    Args:
        name: a key of KINDS.
        root: data.root.
    """
    kind, home = KINDS[name], Path(root).expanduser()
    if issubclass(kind, datasets.MNIST):
        return home / kind.__name__ / "raw", dict(kind.resources)
    return home, {kind.filename: kind.tgz_md5}


def _load(name: str, root: str, download: bool, stats: tuple) -> Data:
    kind, home = KINDS[name], Path(root).expanduser()
    folder, archives = archives_of(name, root)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # progress bars
            train, test = _both(kind, home, folder, download, archives)
    except Exception as error:  # torchvision reads what is there, and raises what that leads to
        raise ConfigError(
            f"data.root: got {root}, expected {', '.join(archives)} in {folder} ({kind.__name__}); "
            f"{_reason(error, folder, download, archives)}; put the files there, "
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


def _both(kind: type, home: Path, folder: Path, download: bool, archives: Archives) -> tuple:
    """Both splits. One process of the node downloads or unpacks what is missing while the others wait at the lock."""
    # First without the lock: the folder may be read-only. Any error may be a file that another process is unpacking.
    with contextlib.suppress(Exception):
        return kind(home, train=True), kind(home, train=False)
    unpack = all(check_integrity(folder / name, md5) for name, md5 in archives.items())
    if not unpack and not download:
        return kind(home, train=True), kind(home, train=False)  # raises what is wrong
    os.makedirs(home, exist_ok=True)
    with FileLock(home / f".{kind.__name__}.lock"), _network_timeout():
        return kind(home, train=True, download=True), kind(home, train=False)


@contextlib.contextmanager
def _network_timeout() -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(NETWORK_TIMEOUT_S)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _reason(error: Exception, folder: Path, download: bool, archives: Archives) -> str:
    """Why they could not be had, in the user's terms."""
    said = " ".join(f"{type(error).__name__}: {error}".split())
    no_download = f"no download: {said}" if download else "data.download is false"
    if isinstance(error, OSError) and error.errno and error.filename:
        return f"{error.filename}: {error.strerror}; it must be readable, and writable for downloading and unpacking"
    damaged = [f for f, md5 in archives.items() if (folder / f).is_file() and not check_integrity(folder / f, md5)]
    if damaged:
        return f"{', '.join(damaged)} there has a wrong checksum; {no_download}"
    if all((folder / f.removesuffix(".gz")).is_file() for f in archives):
        return f"what is unpacked there cannot be read: {said}; delete it to have it unpacked again"
    return no_download


def _in_memory(split: datasets.VisionDataset) -> InMemory:
    images = torch.as_tensor(np.asarray(split.data))  # [n, 28, 28], or [n, 32, 32, 3]
    images = images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2)
    return InMemory(images.contiguous(), torch.as_tensor(split.targets, dtype=torch.int64))


def _in_memory_shape(split: datasets.VisionDataset) -> tuple[int, ...]:
    shape = split.data.shape[1:]
    return (1, *shape) if len(shape) == 2 else (shape[2], *shape[:2])
