"""torchvision's data sets, with its download, checksums and folders. The pixels are mapped from files, of which a node
holds one copy for all of its ranks; torchvision is imported only where those files are not there yet."""

import contextlib
import io
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dist_train.data import decoded, idx
from dist_train.data.decoded import Splits
from dist_train.data.sets import Data, InMemory
from dist_train.errors import ConfigError

# Mean and deviation of the training pixels, a number per channel, measured on the training split.
MNIST_STATS = ((0.1307,), (0.3081,))
FASHION_STATS = ((0.2860,), (0.3530,))
KMNIST_STATS = ((0.1918,), (0.3483,))
CIFAR10_STATS = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))

# torchvision's.
MNIST_CLASSES = (
    *("0 - zero", "1 - one", "2 - two", "3 - three", "4 - four"),
    *("5 - five", "6 - six", "7 - seven", "8 - eight", "9 - nine"),
)
FASHION_CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
KMNIST_CLASSES = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")

# Images file and labels file of the training split and of the test split.
IDX_FILES = (
    ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
)

# What CIFAR-10 was decoded from, with torchvision's md5 of each; and where the pixels then are.
CIFAR10_SOURCES = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
    "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
}
CIFAR10_DECODED = "cifar-10-decoded.bin"

# A server that is silent for so long is taken for none. A firewall that drops packets would take minutes a file.
NETWORK_TIMEOUT_S = 30.0

Archives = dict[str, str]  # file name: md5
# Torchvision's classes, which are its folders' names as well.
KINDS = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "kmnist": "KMNIST", "cifar10": "CIFAR10"}
NotThere = (OSError, ValueError, KeyError, TypeError)  # what a mapped file that is absent or not whole leads to


def mnist(root: str, download: bool) -> Data:
    """60,000 and 10,000 handwritten digits, 28x28. Source: LeCun, Cortes, Burges, 1998."""
    return _from_idx("mnist", root, download, MNIST_CLASSES, MNIST_STATS)


def fashion_mnist(root: str, download: bool) -> Data:
    """60,000 and 10,000 pictures of clothes, 28x28. Source: Xiao, Rasul, Vollgraf, arXiv:1708.07747."""
    return _from_idx("fashion_mnist", root, download, FASHION_CLASSES, FASHION_STATS)


def kmnist(root: str, download: bool) -> Data:
    """60,000 and 10,000 Japanese characters, 28x28. Source: Clanuwat et al., arXiv:1812.01718."""
    return _from_idx("kmnist", root, download, KMNIST_CLASSES, KMNIST_STATS)


def cifar10(root: str, download: bool) -> Data:
    """50,000 and 10,000 colour photographs, 32x32. Source: Krizhevsky, 2009.

    What torchvision decodes is kept beside its files, 184 MB; in memory, once a rank, where that folder is read-only.
    """
    home = Path(root)
    try:
        splits, classes = decoded.read(home / CIFAR10_DECODED, CIFAR10_SOURCES)
    except NotThere:
        splits, classes = _torchvision("cifar10", root, download, _decode)
    return _data(splits, classes, CIFAR10_STATS)


def _from_idx(name: str, root: str, download: bool, classes: tuple[str, ...], stats: tuple) -> Data:
    try:
        splits = _mapped(Path(root) / KINDS[name] / "raw")
    except NotThere:
        splits = _torchvision(name, root, download, _unpack)
    return _data(splits, classes, stats)


def _mapped(folder: Path) -> Splits:
    """Both splits from the unpacked files. Raises what is in NotThere; a file that is being written is too short."""
    splits = []
    for images_file, labels_file in IDX_FILES:
        images, labels = idx.mapped(folder / images_file, 3), idx.mapped(folder / labels_file, 1)
        if len(images) != len(labels):
            raise ValueError(f"{folder}: got {len(images)} in {images_file} and {len(labels)} in {labels_file}")
        splits.append(InMemory(images.unsqueeze(1), labels.to(torch.int64)))
    return splits[0], splits[1]


def _data(splits: Splits, classes: tuple[str, ...], stats: tuple) -> Data:
    return Data(*splits, tuple(splits[0].tree[0].shape[1:]), classes, mean=stats[0], std=stats[1])


def archives_of(name: str, root: str) -> tuple[Path, Archives]:
    """The folder that a data set's archives lie in, and their checksums.

    Args:
        name: a key of KINDS.
        root: data.root.
    """
    kind, home = _kind(name), Path(root)
    if name != "cifar10":
        return home / KINDS[name] / "raw", dict(kind.resources)
    return home, {kind.filename: kind.tgz_md5}


def check_integrity(file: Path, md5: str) -> bool:
    """Whether a file is there, with this checksum."""
    from torchvision.datasets import utils

    return utils.check_integrity(file, md5)


def _kind(name: str) -> type:
    from torchvision import datasets

    return getattr(datasets, KINDS[name])


def _torchvision(name: str, root: str, download: bool, make: Callable) -> Any:
    """What `make` makes of the archives of a data set, which are there, or are to be."""
    kind, (folder, archives) = _kind(name), archives_of(name, root)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # progress bars
            return make(kind, Path(root), folder, download, archives)
    except Exception as error:  # torchvision reads what is there, and raises what that leads to
        raise ConfigError(
            f"data.root: got {root}, expected {', '.join(archives)} in {folder} ({KINDS[name]}); "
            f"{_reason(error, folder, download, archives)}; put the files there, or point --data.root at the folder "
            f"that has {KINDS[name]}"
        ) from error


def _unpack(kind: type, home: Path, folder: Path, download: bool, archives: Archives) -> Splits:
    """One process of the node downloads or unpacks what is missing while the others wait at the lock."""
    if download or _whole(folder, archives):
        with alone(kind.__name__, home):
            with contextlib.suppress(*NotThere):
                return _mapped(folder)
            kind(home, train=True, download=True), kind(home, train=False)
    else:
        kind(home, train=True), kind(home, train=False)  # raises what is wrong
    return _mapped(folder)


def _decode(kind: type, home: Path, folder: Path, download: bool, archives: Archives) -> tuple[Splits, tuple[str, ...]]:
    """The same for a set whose files hold pixels that cannot be mapped as they are."""
    fetch = download or _whole(folder, archives)
    if not fetch and not os.path.isdir(home / kind.base_folder):
        kind(home, train=True)  # raises what is wrong
    try:
        with alone(kind.__name__, home):
            with contextlib.suppress(*NotThere):
                return decoded.read(home / CIFAR10_DECODED, CIFAR10_SOURCES)
            splits, classes = _in_memory(kind, home, fetch)
            with contextlib.suppress(*NotThere):  # a full disk: they stay in memory
                decoded.write(home / CIFAR10_DECODED, _verified(kind), splits, classes)
                return decoded.read(home / CIFAR10_DECODED, CIFAR10_SOURCES)
            return splits, classes
    except OSError:
        with contextlib.suppress(Exception):  # the folder may be read-only, with all that is needed in it
            return _in_memory(kind, home, False)
        raise


def _in_memory(kind: type, home: Path, fetch: bool) -> tuple[Splits, tuple[str, ...]]:
    train, test = kind(home, train=True, download=fetch), kind(home, train=False)
    splits = [
        InMemory(
            torch.as_tensor(np.asarray(split.data)).permute(0, 3, 1, 2).contiguous(),  # from [n, 32, 32, 3]
            torch.as_tensor(split.targets, dtype=torch.int64),
        )
        for split in (train, test)
    ]
    return (splits[0], splits[1]), tuple(str(name) for name in train.classes)


def _verified(kind: type) -> dict[str, str]:
    """The files that torchvision has read, and the md5 that it has found them to have."""
    return dict(kind.train_list) | dict(kind.test_list) | {kind.meta["filename"]: kind.meta["md5"]}


def _whole(folder: Path, archives: Archives) -> bool:
    """Whether all archives are there to be unpacked."""
    return all(check_integrity(folder / name, md5) for name, md5 in archives.items())


@contextlib.contextmanager
def alone(kind: str, home: Path) -> Iterator[None]:
    """Only one process of the node is here at a time. Raises OSError where the lock cannot be made."""
    from filelock import FileLock

    os.makedirs(home, exist_ok=True)
    before = socket.getdefaulttimeout()
    with FileLock(home / f".{kind}.lock"):
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
