"""The data of the tests: real where the folder $DIST_TRAIN_DATA has it, otherwise made here in the same format.

That folder is never written: what a test needs is copied to, or unpacked in, a folder of the session.
"""

import csv
import gzip
import hashlib
import os
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

FASHION = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
_made: dict[str, Path] = {}  # once a session


def real_data(path: str) -> Path | None:
    """A file or folder of the real data, if this machine has it."""
    folder = os.environ.get("DIST_TRAIN_DATA")
    if not folder:
        return None
    found = Path(folder) / path
    assert found.exists(), f"DIST_TRAIN_DATA={folder} has no {path}"
    return found


def needs_real_data(path: str) -> Path:
    """The same; skips the test without it."""
    return real_data(path) or pytest.skip(f"$DIST_TRAIN_DATA names no folder with {path}")


def fashion_mnist_root(factory: pytest.TempPathFactory) -> Path:
    """A data.root with Fashion-MNIST: the real archives, or 20,000 and 10,000 made pictures, unpacked."""
    if "fashion" not in _made:
        root = factory.mktemp("fashion")
        raw = root / "FashionMNIST" / "raw"
        archives = real_data("FashionMNIST/raw")
        if archives:
            shutil.copytree(archives, raw)
        else:
            write_raw(raw, 20_000, 10_000)
        _made["fashion"] = root
    return _made["fashion"]


def mnist_png_root(factory: pytest.TempPathFactory) -> Path:
    """A data.root with annotations.csv and images/NNNNNN-numD.png: 10,000 real digits, or 400 made ones."""
    if "png" not in _made:
        root = factory.mktemp("png")
        archive = real_data("mnist_png.tar.gz")
        if archive:
            with tarfile.open(archive) as tar:
                tar.extraction_filter = getattr(tarfile, "data_filter", None)  # older than Python 3.11.4
                tar.extractall(root)
            root = root / "mnist_png"
        else:
            images, labels = made_images(400)
            write_images(root, images, labels)
        _made["png"] = root
    return _made["png"]


def made_images(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures that a model can learn: uint8 [n, 28, 28], and their classes, int64 [n]."""
    draw = torch.Generator().manual_seed(seed)
    pictures = torch.randint(256, (10, 28, 28), generator=torch.Generator().manual_seed(99))
    labels = torch.randint(10, (n,), generator=draw)
    grain = torch.randint(256, (n, 28, 28), generator=draw, dtype=torch.uint8)
    return pictures[labels].to(torch.uint8) // 2 + grain // 2, labels


def write_raw(folder: Path, n: int, n_test: int) -> None:
    """The four files of an MNIST-like data set, unpacked."""
    folder.mkdir(parents=True)
    for (images_file, labels_file), (images, labels) in zip(
        (FASHION[:2], FASHION[2:]), (made_images(n, seed=1), made_images(n_test, seed=2)), strict=True
    ):
        (folder / images_file).write_bytes(idx(images))
        (folder / labels_file).write_bytes(idx(labels.to(torch.uint8)))


def write_archives(folder: Path, n: int, n_test: int) -> list[tuple[str, str]]:
    """The four files, packed. Gives the names with their checksums, as torchvision's `resources`."""
    write_raw(folder, n, n_test)
    out = []
    for name in FASHION:
        data = gzip.compress((folder / name).read_bytes(), compresslevel=1, mtime=0)
        (folder / name).unlink()
        (folder / f"{name}.gz").write_bytes(data)
        out.append((f"{name}.gz", hashlib.md5(data).hexdigest()))
    return out


def idx(array: torch.Tensor) -> bytes:
    """The idx format of MNIST: type, dimensions, sizes (big-endian), bytes."""
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.dim()]) + sizes + array.numpy().tobytes()


def write_images(root: Path, images: torch.Tensor, labels: torch.Tensor) -> None:
    """PNG files and their annotations.csv, named as the real ones."""
    (root / "images").mkdir(parents=True)
    rows = [["file", "target"]]
    for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        rows.append([f"images/{i:06d}-num{label}.png", str(label)])
        Image.fromarray(image.numpy()).save(root / rows[-1][0])
    with (root / "annotations.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
