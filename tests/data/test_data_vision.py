"""torchvision's data sets: from archives, unpacked, read-only, damaged, absent, and by four processes at once."""

import contextlib
import errno
import gzip
import hashlib
import itertools
import os
import pickle
import shutil
import socket
import stat
import sys
import tarfile
import tempfile
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as torch_dist
from filelock import FileLock
from torchvision import datasets

from dist_train.config.load import load
from dist_train.data import vision
from dist_train.data.sets import Data
from dist_train.errors import ConfigError

from data_files import FASHION, fashion_mnist_root, made_images, needs_real_data, real_data, write_archives, write_raw
from workers import run_ranks

Make = Callable[[str, bool], Data]
# Of made data, as they were when the pixels were in memory.
FINGERPRINTS = [
    (vision.mnist, "MNIST", "3e9a1e2458c9c29bd5f8d8def2a71562ffe89bf1e78de154338a8688662cb2d0"),
    (vision.fashion_mnist, "FashionMNIST", "51e1b4a457a04e8557a597148e773371f2afde3b6f763a225def737ce033e08d"),
    (vision.kmnist, "KMNIST", "17aaf538b6e414c7b4b75db1078926cd3bed9ab9c34adb486576164b8f11705a"),
]
CIFAR10_FINGERPRINT = "f41dcf7e37f1171aaa48ddcd293f66f798d8967d2029269b2079c6afbc292d77"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every request goes to a port at which no one listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        use_proxy(monkeypatch, taken)
        yield


def use_proxy(monkeypatch: pytest.MonkeyPatch, proxy: socket.socket) -> None:
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://{}:{}".format(*proxy.getsockname()))
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(urllib.request, "_opener", None)  # it keeps the proxies that it saw first


def refused(make: Make, root: Path, download: bool) -> str:
    """The one line."""
    with pytest.raises(ConfigError) as error:
        make(str(root), download)
    (line,) = error.value.lines
    assert line.startswith(f"data.root: got {root}, expected ")
    return line


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """No one may write there. Root could, so root's rights are given up meanwhile."""
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in [folder, *folder.rglob("*")]}
    for path in modes:
        path.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        with pytest.raises(PermissionError):
            (folder / "planted").touch()
        yield
    finally:
        if root:
            os.seteuid(0)
        for path, mode in modes.items():
            path.chmod(mode)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """Not pytest's tmp_path: no one but its owner may enter that."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


# -- unpacked files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST", "KMNIST"])
@pytest.mark.parametrize("download", [False, True])
def test_unpacked_idx_files(tmp_path: Path, name: str, download: bool):
    write_raw(tmp_path / name / "raw", 30, 20)
    make = {"MNIST": vision.mnist, "FashionMNIST": vision.fashion_mnist, "KMNIST": vision.kmnist}[name]
    data = make(str(tmp_path), download)
    for split, (images, labels) in ((data.train, made_images(30, 1)), (data.test, made_images(20, 2))):
        assert torch.equal(split.tree[0][:, 0], images) and torch.equal(split.tree[1], labels)
    assert data.input_shape == (1, 28, 28) and len(data.classes) == 10
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]  # no lock was needed


def test_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_raw(tmp_path / "data" / "MNIST" / "raw", 3, 2)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(vision.mnist(load(["--data.root", "~/data"]).data.root, False).train) == 3


def write_cifar10(folder: Path, n: int) -> torch.Tensor:
    """The python version's files, n images in each, and their pixels, uint8 [6, n, 3, 32, 32]."""
    folder.mkdir(parents=True)
    pixels = torch.randint(256, (6, n, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    for i, name in enumerate([f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]):
        entry = {"data": pixels[i].flatten(1).numpy(), "labels": [(i + k) % 10 for k in range(n)]}
        (folder / name).write_bytes(pickle.dumps(entry))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"thing {k}" for k in range(10)]}))
    return pixels


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def cifar10_pixels(open_folder: Path, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """The pixels of the made archive in `open_folder`, whose checksums torchvision and the package now expect."""
    made = open_folder / "made" / "cifar-10-batches-py"
    pixels = write_cifar10(made, 4)
    with tarfile.open(open_folder / "cifar-10-python.tar.gz", "w:gz") as tar:
        tar.add(made, "cifar-10-batches-py")
    sums = {path.name: md5(path) for path in made.iterdir()}
    shutil.rmtree(open_folder / "made")
    monkeypatch.setattr(vision, "CIFAR10_SOURCES", sums)
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", md5(open_folder / "cifar-10-python.tar.gz"))
    lists = [[f"data_batch_{k}", sums[f"data_batch_{k}"]] for k in range(1, 6)]
    monkeypatch.setattr(datasets.CIFAR10, "train_list", lists)
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(datasets.CIFAR10, "meta", datasets.CIFAR10.meta | {"md5": sums["batches.meta"]})
    return pixels


def check_cifar10(root: Path, pixels: torch.Tensor) -> Data:
    data = vision.cifar10(str(root), False)
    assert torch.equal(data.train.tree[0], pixels[:5].flatten(0, 1)) and torch.equal(data.test.tree[0], pixels[5])
    assert data.train.tree[0].is_contiguous() and data.input_shape == (3, 32, 32)
    assert data.train.tree[1][:5].tolist() == [0, 1, 2, 3, 1] and data.test.tree[1].tolist() == [5, 6, 7, 8]
    assert data.classes == tuple(f"thing {k}" for k in range(10))
    return data


def maps(name: str) -> bool:
    """Whether a file with `name` in its path is mapped in this process."""
    return name in Path("/proc/self/maps").read_text()


def test_cifar10_is_decoded_once_and_then_mapped(open_folder: Path, cifar10_pixels: torch.Tensor):
    data = check_cifar10(open_folder, cifar10_pixels)
    assert maps(str(open_folder / vision.CIFAR10_DECODED)) and sorted(p.name for p in open_folder.iterdir()) == [
        *(".CIFAR10.lock", "cifar-10-batches-py", "cifar-10-decoded.bin", "cifar-10-python.tar.gz"),
    ]
    del data
    shutil.rmtree(open_folder / "cifar-10-batches-py")
    (open_folder / "cifar-10-python.tar.gz").unlink()
    with read_only(open_folder):
        assert check_cifar10(open_folder, cifar10_pixels).fingerprint() == CIFAR10_FINGERPRINT
    assert not maps(vision.CIFAR10_DECODED)  # a mapping goes with its tensors


@pytest.mark.parametrize("damage", ["other source", "cut off", "no JSON", "other format"])
def test_a_decoded_file_that_does_not_fit_is_made_anew(damage: str, open_folder: Path, cifar10_pixels: torch.Tensor):
    check_cifar10(open_folder, cifar10_pixels)
    file = open_folder / vision.CIFAR10_DECODED
    whole = file.read_bytes()
    some_md5 = vision.CIFAR10_SOURCES["test_batch"].encode()
    file.write_bytes(
        {
            "other source": whole.replace(some_md5, some_md5[::-1]),
            "cut off": whole[:-1],
            "no JSON": bytes(len(whole)),
            "other format": whole.replace(b'"format": 1', b'"format": 2'),
        }[damage]
    )
    assert file.read_bytes() != whole
    check_cifar10(open_folder, cifar10_pixels)
    assert file.read_bytes() == whole


def test_cifar10_unpacked_in_a_read_only_folder(open_folder: Path, cifar10_pixels: torch.Tensor):
    """Nothing can be kept beside it: it is decoded in memory, by every process."""
    check_cifar10(open_folder, cifar10_pixels)
    (open_folder / vision.CIFAR10_DECODED).unlink()
    (open_folder / "cifar-10-python.tar.gz").unlink()
    with read_only(open_folder):
        data = check_cifar10(open_folder, cifar10_pixels)
        assert data.fingerprint() == CIFAR10_FINGERPRINT and not maps(vision.CIFAR10_DECODED)
        (unread,) = [path for path in (open_folder / "cifar-10-batches-py").iterdir() if path.name == "data_batch_3"]
    unread.write_bytes(b"")
    with read_only(open_folder):
        assert "CIFAR10.lock: Permission denied" in refused(vision.cifar10, open_folder, False)


def test_cifar10_on_a_full_disk(open_folder: Path, cifar10_pixels: torch.Tensor, monkeypatch: pytest.MonkeyPatch):
    def full(*_) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    check_cifar10(open_folder, cifar10_pixels)
    assert not [path for path in open_folder.iterdir() if vision.CIFAR10_DECODED in path.name]


# -- as they were before they were mapped ------------------------------------------------------------------------------


def test_what_is_known_of_the_sets_is_torchvisions():
    sets = {"MNIST": vision.MNIST_CLASSES, "FashionMNIST": vision.FASHION_CLASSES, "KMNIST": vision.KMNIST_CLASSES}
    for name, classes in sets.items():
        kind = getattr(datasets, name)
        assert tuple(kind.classes) == classes
        assert [f.removesuffix(".gz") for f, _ in kind.resources] == list(itertools.chain(*vision.IDX_FILES))
    assert vision._verified(datasets.CIFAR10) == vision.CIFAR10_SOURCES


@pytest.mark.parametrize(("make", "name", "expected"), FINGERPRINTS)
def test_a_fingerprint_stays(make: Make, name: str, expected: str, tmp_path: Path):
    """A checkpoint holds it: with another one, the run that it is of would be refused."""
    write_raw(tmp_path / name / "raw", 30, 20)
    assert make(str(tmp_path), False).fingerprint() == expected


# -- nothing, or something damaged ------------------------------------------------------------------------------------


@pytest.mark.parametrize("download", [False, True])
@pytest.mark.parametrize(
    ("make", "folder", "files"),
    [
        (vision.mnist, "MNIST/raw", [f"{name}.gz" for name in FASHION]),
        (vision.fashion_mnist, "FashionMNIST/raw", [f"{name}.gz" for name in FASHION]),
        (vision.kmnist, "KMNIST/raw", [f"{name}.gz" for name in FASHION]),
        (vision.cifar10, "", ["cifar-10-python.tar.gz"]),
    ],
)
def test_no_data_and_no_network(make: Make, folder: str, files: list[str], download: bool, tmp_path: Path, capfd):
    root = tmp_path / "none"
    line = refused(make, root, download)
    assert all(name in line for name in files) and f" in {root / folder} " in line
    assert ("Connection refused" in line) == download and ("data.download is false" in line) == (not download)
    assert root.exists() == download  # nothing is made where nothing may be fetched
    assert capfd.readouterr() == ("", "")


def test_a_server_that_is_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(vision, "NETWORK_TIMEOUT_S", 0.2)
    done = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            link, _ = server.accept()
            done.wait(20)  # without a time limit of the client, this ends the request, with another message
            link.close()

        thread = threading.Thread(target=accept)
        thread.start()
        use_proxy(monkeypatch, server)
        line = refused(vision.fashion_mnist, tmp_path, True)
        done.set()
        thread.join()
    assert "timed out" in line
    assert socket.getdefaulttimeout() is None


@pytest.mark.parametrize("download", [False, True])
def test_a_damaged_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, download: bool):
    raw = tmp_path / "FashionMNIST" / "raw"
    monkeypatch.setattr(datasets.FashionMNIST, "resources", write_archives(raw, 30, 20))
    packed = raw / "t10k-images-idx3-ubyte.gz"
    content = bytearray(packed.read_bytes())
    content[len(content) // 2] ^= 1
    packed.write_bytes(content)
    line = refused(vision.fashion_mnist, tmp_path, download)
    assert "; t10k-images-idx3-ubyte.gz there has a wrong checksum; " in line
    assert packed.read_bytes() == content  # the user's file stays


@pytest.mark.parametrize("name", FASHION)
@pytest.mark.parametrize("size", [0, 12, 300])
def test_an_unpacked_file_that_is_cut_off(tmp_path: Path, name: str, size: int):
    write_raw(tmp_path / "MNIST" / "raw", 500, 500)
    with (tmp_path / "MNIST" / "raw" / name).open("r+b") as file:
        file.truncate(size)
    line = refused(vision.mnist, tmp_path, True)
    assert "what is unpacked there cannot be read" in line and "delete it" in line


# -- archives ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("download", [False, True])
def test_archives_are_found_by_checksum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, download: bool):
    monkeypatch.setattr(datasets.KMNIST, "resources", write_archives(tmp_path / "KMNIST" / "raw", 30, 20))
    data = vision.kmnist(str(tmp_path), download)
    assert torch.equal(data.train.tree[0][:, 0], made_images(30, 1)[0])
    assert torch.equal(data.test.tree[1], made_images(20, 2)[1])


def test_a_read_only_folder_with_unpacked_files(open_folder: Path):
    write_raw(open_folder / "MNIST" / "raw", 30, 20)
    with read_only(open_folder):
        data = vision.mnist(str(open_folder), True)
    assert torch.equal(data.train.tree[0][:, 0], made_images(30, 1)[0])


def test_a_read_only_folder_with_archives_alone(open_folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(datasets.MNIST, "resources", write_archives(open_folder / "MNIST" / "raw", 30, 20))
    with read_only(open_folder):
        line = refused(vision.mnist, open_folder, True)
    assert f"; {open_folder}/.MNIST.lock: Permission denied; it must be readable, and writable for" in line


WRITTEN: list[str] = []  # names of files that this process opened for writing


def note_writing(event: str, details: tuple) -> None:
    if event == "open" and isinstance(details[0], str) and details[2] & (os.O_WRONLY | os.O_RDWR):
        WRITTEN.append(os.path.basename(details[0]))


def test_a_look_while_another_process_unpacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A file is open and still empty, and the lock is taken: it waits, and then reads the whole file."""
    raw, at_the_lock, got = tmp_path / "MNIST" / "raw", threading.Event(), []
    monkeypatch.setattr(datasets.MNIST, "resources", write_archives(raw, 30, 20))
    for packed in raw.glob("*.gz"):
        packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
    whole = (raw / FASHION[0]).read_bytes()
    (raw / FASHION[0]).write_bytes(b"")
    lock = tmp_path / ".MNIST.lock"

    def load() -> None:
        try:
            got.append(vision.mnist(str(tmp_path), False))
        finally:
            at_the_lock.set()

    def note_lock(event: str, details: tuple) -> None:
        if event == "open" and details[0] == str(lock) and threading.current_thread() is thread:
            at_the_lock.set()

    thread = threading.Thread(target=load)
    sys.addaudithook(note_lock)
    with FileLock(lock):
        thread.start()
        assert at_the_lock.wait(60) and thread.is_alive()
        (raw / FASHION[0]).write_bytes(whole)
    thread.join()
    assert torch.equal(got[0].train.tree[0][:, 0], made_images(30, 1)[0])


def load_together(root: str, resources: list[tuple[str, str]]) -> tuple[list[str], list[str], list[int]]:
    """What this rank wrote; the checksums of what it read; how many samples."""
    datasets.FashionMNIST.resources, before = resources, datasets.FashionMNIST.resources
    if not WRITTEN:
        sys.addaudithook(note_writing)
    WRITTEN[:] = ["hooked"]
    torch_dist.barrier()
    try:
        data = vision.fashion_mnist(root, True)
    finally:
        datasets.FashionMNIST.resources = before
    tensors = (data.train.tree[0], data.train.tree[1], data.test.tree[0], data.test.tree[1])
    return list(WRITTEN), [hashlib.md5(t.numpy()).hexdigest() for t in tensors], [len(data.train), len(data.test)]


def test_four_processes_at_once_unpack_once(tmp_path: Path):
    raw = tmp_path / "FashionMNIST" / "raw"
    archives = real_data("FashionMNIST/raw")
    if archives:
        raw.mkdir(parents=True)
        for packed in archives.glob("*.gz"):
            (raw / packed.name).write_bytes(packed.read_bytes())
        resources = datasets.FashionMNIST.resources
    else:
        resources = write_archives(raw, 10_000, 2_000)
    ranks = run_ranks(load_together, 4, str(tmp_path), resources)
    assert all(rank[1:] == ranks[0][1:] for rank in ranks)
    written = [name for names, *_ in ranks for name in names]
    assert [written.count(name) for name in FASHION] == [1, 1, 1, 1]
    assert ranks[0][2] == ([60_000, 10_000] if archives else [10_000, 2_000])


# -- the real data ----------------------------------------------------------------------------------------------------


def test_fashion_mnist_is_whole(tmp_path_factory: pytest.TempPathFactory):
    needs_real_data("FashionMNIST/raw")
    data = vision.fashion_mnist(str(fashion_mnist_root(tmp_path_factory)), True)
    assert torch.bincount(data.train.tree[1]).tolist() == [6000] * 10
    assert torch.bincount(data.test.tree[1]).tolist() == [1000] * 10
    assert data.classes[0] == "T-shirt/top" and data.classes[9] == "Ankle boot"
    pixels = data.train.tree[0].double() / 255
    assert data.mean == (round(pixels.mean().item(), 4),)
    assert data.std == (round(pixels.std(unbiased=False).item(), 4),)
