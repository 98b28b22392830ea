"""Where a run's checkpoints are: a folder, or an object store; and what makes one there whole or absent.

A folder of a file system, in which a rename commits:

    .writing-START-step-00000100  every rank writes its file and syncs it, rank 0 then the manifest
    step-00000100                 one rename by rank 0, synced: from here on it exists
    .removing-step-00000050       then an older one goes, also by a rename first
    suspect-step-00000100         an audit has found that a device computes wrongly; see set_aside

An object store has no rename. There the manifest, which is one object and is sent last, commits:

    step-00000100-START/...            every rank sends its file; without a manifest they are nothing
    step-00000100-START/manifest.json  sent by rank 0 when all are there: from here on it exists
    suspect-step-00000100-START        an object, which says that that one is set aside

START is drawn at every start of a run: a rank of a killed run may still write when the next run has begun.
"""

import contextlib
import itertools
import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

import yaml

from dist_train.checkpoint.urls import LOCAL, Unreachable, Url, is_url, scheme
from dist_train.config import strict_yaml
from dist_train.config.paths import expanded
from dist_train.config.tree import Config
from dist_train.errors import ConfigError

MANIFEST = "manifest.json"
FOLDER = "checkpoints"  # in a run's folder
KEY = "checkpoint.dir"
WRITING, REMOVING, SUSPECT = ".writing-", ".removing-", "suspect-"
STEP = re.compile(r"step-\d{8,}(\.\d+|-[0-9a-f]{8})?")
_PROBE = ".probe-"

Folder = Path | Url


class Place(ABC):
    """The checkpoints of a run: what reads them, and what its rank 0 does to them."""

    folder: Folder

    def __str__(self) -> str:
        return str(self.folder)

    @abstractmethod
    def folders(self) -> list[Folder]:
        """Of the checkpoints, damaged ones among them, in no order that means anything. Raises ConfigError."""

    @abstractmethod
    def clean(self) -> None:
        """Removes what a killed run left half-written or half-removed. By who holds the run. Raises ConfigError."""

    @abstractmethod
    def beside(self, start: str, name: str) -> Folder:
        """Where all ranks write a checkpoint that does not exist yet.

        Args:
            start: drawn at the start of the run.
            name: of the checkpoint, such as step-00000100.
        """

    @abstractmethod
    def commit(self, beside: Folder, name: str, manifest: str) -> Folder:
        """Makes a checkpoint exist, under this name or one that begins so. Returns its folder.

        Args:
            beside: where all of its files are.
            name: of the checkpoint.
            manifest: the text of its manifest.
        """

    @abstractmethod
    def discard(self, beside: Folder) -> None:
        """Removes what could not be written, as far as that goes."""

    @abstractmethod
    def remove(self, folder: Folder) -> None:
        """Removes a checkpoint; if killed on the way, it is absent."""

    @abstractmethod
    def set_aside(self, folder: Folder) -> str:
        """Makes a checkpoint one that no run resumes from. Returns the name under which it is kept."""


class Local(Place):
    """In a folder of a file system that all ranks see."""

    def __init__(self, folder: Path):
        self.folder: Path = folder

    def folders(self) -> list[Folder]:
        """See Place."""
        try:
            return sorted(path for path in self.folder.iterdir() if STEP.fullmatch(path.name))
        except (FileNotFoundError, NotADirectoryError, ValueError):  # no file has a NUL in its name
            return []
        except OSError as error:  # to go on as if there were none would start anew
            raise ConfigError(
                f"checkpoint.resume: got {self.folder}, which cannot be listed ({error.strerror}), expected a folder "
                f"that can be read"
            ) from None

    def clean(self) -> None:
        """See Place."""
        for path in [*self.folder.glob(f"{WRITING}*"), *self.folder.glob(f"{REMOVING}*")]:
            shutil.rmtree(path, ignore_errors=True)  # a rank of the killed run may be in it still

    def beside(self, start: str, name: str) -> Path:
        """See Place."""
        return self.folder / f"{WRITING}{start}-{name}"

    def commit(self, beside: Folder, name: str, manifest: str) -> Path:
        """See Place."""
        assert isinstance(beside, Path)
        with (beside / MANIFEST).open("x", encoding="utf-8") as file:
            file.write(manifest)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(beside)
        # A damaged one of the same step may stand there, or one of a run that was resumed from before it.
        target = next(t for t in _names(self.folder / name) if not t.exists())
        beside.rename(target)
        sync_folder(self.folder)
        sync_folder(self.folder.parent)  # the first checkpoint's folder of checkpoints is new there
        return target

    def discard(self, beside: Folder) -> None:
        """See Place."""
        shutil.rmtree(beside, ignore_errors=True)

    def remove(self, folder: Folder) -> None:
        """See Place."""
        assert isinstance(folder, Path)
        if folder.exists():
            gone = folder.with_name(f"{REMOVING}{folder.name}")
            folder.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)  # what is left goes at the next start

    def set_aside(self, folder: Folder) -> str:
        """See Place."""
        assert isinstance(folder, Path)
        target = next(t for t in _names(folder.with_name(f"{SUSPECT}{folder.name}")) if not t.exists())
        folder.rename(target)
        sync_folder(self.folder)
        return target.name


class Remote(Place):
    """In an object store."""

    def __init__(self, folder: Url):
        self.folder: Url = folder

    def folders(self) -> list[Folder]:
        """See Place. One without a manifest does not exist."""
        return [folder for folder, names in self._all() if MANIFEST in names]

    def probe(self) -> None:
        """Tries whether objects can be written here, and removed. Raises ConfigError."""
        name = f"{_PROBE}{os.getpid()}"
        try:
            (self.folder / name).write_text("dist_train tries whether it can write here\n")
            (self.folder / name).remove()
        except FileNotFoundError as error:
            raise ConfigError(
                f"{KEY}: got {self.folder}, which cannot be written to ({error}), expected a bucket that is there"
            ) from None

    def clean(self) -> None:
        """See Place."""
        for folder, names in self._all():
            if MANIFEST not in names:
                folder.remove_below(names)

    def beside(self, start: str, name: str) -> Url:
        """See Place."""
        return self.folder / f"{name}-{start}"

    def commit(self, beside: Folder, name: str, manifest: str) -> Url:
        """See Place."""
        assert isinstance(beside, Url)
        (beside / MANIFEST).write_text(manifest)
        return beside

    def discard(self, beside: Folder) -> None:
        """See Place. The manifest too: that it was sent may be all that was not heard of."""
        self.remove(beside)

    def remove(self, folder: Folder) -> None:
        """See Place."""
        assert isinstance(folder, Url)
        with contextlib.suppress(Unreachable):  # what is left goes with a later one, or at the next start
            (folder / MANIFEST).remove()
            folder.remove_below(folder.names())

    def set_aside(self, folder: Folder) -> str:
        """See Place."""
        name = f"{SUSPECT}{folder.name}"
        (self.folder / name).write_text(f"An audit found that a device computed wrongly before {folder} was saved.\n")
        return name

    def _all(self) -> Iterator[tuple[Url, list[str]]]:
        """Folders of checkpoints, those that do not exist yet or any more among them, and the names of their files."""
        names = self.folder.names()
        for name in names:
            if STEP.fullmatch(name) and f"{SUSPECT}{name}" not in names:
                yield self.folder / name, (self.folder / name).names()


def at(text: str) -> Folder:
    """What a path or a URL names."""
    if is_url(text):
        return Url(text.rstrip("/"))
    return Path(text.partition("://")[2] if scheme(text) in LOCAL else text)


def place(folder: Folder) -> Place:
    """The folder as one of checkpoints."""
    return Local(folder) if isinstance(folder, Path) else Remote(folder)


def of_config(config: Config, run: Path | None) -> Place | None:
    """Where a run keeps its checkpoints; None where that depends on the name that its folder will have.

    Args:
        config: of the run.
        run: its folder; None if it has none yet.
    """
    if config.checkpoint.dir is not None:
        return place(at(config.checkpoint.dir))
    return None if run is None else Local(run / FOLDER)


def found_at(folder: Folder) -> Place:
    """The checkpoints of what a user names: a run's folder, or a folder of checkpoints. Raises ConfigError."""
    if not isinstance(folder, Path):
        return Remote(folder)
    kept, within = _kept(folder), Local(folder / FOLDER)
    if kept is not None:
        return place(at(kept))
    return Local(folder) if not within.folders() and Local(folder).folders() else within


def _kept(run: Path) -> str | None:
    """checkpoint.dir in the config that a run's folder holds; None without one."""
    try:
        tree = strict_yaml.parse((run / "config.yaml").read_text(encoding="utf-8"))
        kept = tree["checkpoint"]["dir"]
    except (OSError, ValueError, LookupError, TypeError, yaml.YAMLError):
        return None  # no run's folder, or one of before the key
    return expanded(kept, KEY) if isinstance(kept, str) else None


def sync_folder(folder: Path) -> None:
    """Makes names in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _names(path: Path) -> Iterator[Path]:
    yield path
    for i in itertools.count(2):
        yield path.with_name(f"{path.name}.{i}")
