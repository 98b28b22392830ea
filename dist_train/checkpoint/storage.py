"""Shards to files and back, through torch.distributed.checkpoint (DCP) and in its format.

Other tools that read DCP read these files. What DCP leaves open is closed here: every byte is hashed on its way out,
and on the way in nothing is unpickled but what a list allows.
"""

import hashlib
import io
import os
import pickle
import warnings
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemBase, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from dist_train.backends.shards import Box, Shards
from dist_train.checkpoint.manifest import METADATA, NAME, Damaged, File
from dist_train.checkpoint.places import Folder
from dist_train.checkpoint.urls import Unreachable, Url
from dist_train.errors import OtherRankError


def write(folder: Folder, state: Mapping[str, Shards], group: torch_dist.ProcessGroup | None) -> dict[str, File]:
    """Writes what this rank holds; a box that several ranks hold is written by one of them. Collective in `group`.

    Returns:
        Size and hash of the files that this rank wrote, by name. They are synced, the folder is not; of an object
        store, they are there.

    Raises:
        OSError: a file could not be written here.
        Unreachable: an object could not be sent from here.
        OtherRankError: a file could not be written on another rank.
    """
    writer = _Writer(folder)
    try:
        with _quiet():
            dcp.save(
                dict(state), storage_writer=writer, planner=_SavePlanner(), process_group=group, no_dist=group is None
            )
    except (Exception, CheckpointException) as error:  # which is no Exception
        # torch.save hides the cause: it goes on to say that its file ends in the wrong place.
        if writer.files.error is not None:
            raise writer.files.error from error
        if not isinstance(error, CheckpointException):
            raise
        rank = torch_dist.get_rank() if group else 0
        if rank in error.failures:
            raise error.failures[rank][0] from error
        raise OtherRankError(f"rank {min(error.failures)}: {_root(error)}") from error
    return {path.name.removesuffix(".tmp"): file for path, file in writer.files.written.items()}


def tensors(folder: Folder) -> dict[str, TensorStorageMetadata]:
    """Shape and type of every tensor in a checkpoint, by name. Raises Damaged, Unreachable."""
    return _Reader(folder).read_metadata().state_dict_metadata


def check(folder: Folder, files: Container[str]) -> None:
    """That the metadata can be read, and names no file but these. Raises Damaged, Unreachable."""
    for info in _Reader(folder).read_metadata().storage_data.values():
        if info.relative_path not in files:
            raise Damaged(folder, f"{METADATA}: names the file {info.relative_path!r}, which {NAME} does not")


def read(folder: Folder, state: Mapping[str, Shards]) -> None:
    """Fills the boxes of this rank, whatever the ranks that wrote them held. Not collective. Raises Damaged,
    Unreachable."""
    reader = _Reader(folder)
    try:
        with _quiet():
            dcp.load(dict(state), storage_reader=reader, planner=_LoadPlanner(), no_dist=True)
    except (Exception, CheckpointException) as error:  # DCP wraps what was raised, in what is no Exception
        if isinstance(cause := _cause(error), Unreachable):
            raise cause from error
        raise Damaged(folder, f"cannot be read: {_root(error)}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without DCP's warnings that a process alone is alone, and of torch 2.8's own use of storages."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        warnings.filterwarnings("ignore", "TypedStorage is deprecated")
        yield


def _cause(error: BaseException) -> BaseException:
    failures = getattr(error, "failures", None)
    return next(iter(failures.values()))[0] if failures else error


def _root(error: BaseException) -> str:
    inner = _cause(error)
    return (str(inner).splitlines() or [type(inner).__name__])[0]


class _SavePlanner(DefaultSavePlanner):
    """Plans for Shards where DCP's own knows tensors."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        items = [_item(name, shards, box) for name, shards in self.state_dict.items() for box in shards.boxes]
        self.plan = SavePlan(items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        return _box(self.state_dict[index.fqn], index)


class _LoadPlanner(DefaultLoadPlanner):
    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def create_local_plan(self) -> LoadPlan:
        items = []
        for name, shards in self.state_dict.items():
            if not shards.boxes:
                continue  # this rank holds nothing of it
            saved = self.metadata.state_dict_metadata[name]
            assert tuple(saved.size) == shards.shape, f"{name}: got {shards.shape}, expected {tuple(saved.size)}"
            items += create_read_items_for_chunk_list(name, saved, [_chunk(box) for box in shards.boxes])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return _box(self.state_dict[index.fqn], index)


def _chunk(box: Box) -> ChunkStorageMetadata:
    at, part = box
    return ChunkStorageMetadata(torch.Size(at), part.size())


def _item(name: str, shards: Shards, box: Box) -> WriteItem:
    at, part = box
    properties = TensorProperties(dtype=part.dtype)  # the rest of them says how the tensor lay in memory
    data = TensorWriteData(_chunk(box), properties, torch.Size(shards.shape))
    return WriteItem(MetadataIndex(name, torch.Size(at)), WriteItemType.SHARD, tensor_data=data)


def _box(shards: Shards, index: MetadataIndex) -> torch.Tensor:
    return next(part for at, part in shards.boxes if at == tuple(index.offset))


class _Hashed(io.FileIO):
    """A new file whose bytes are hashed as they are written."""

    def __init__(self, path: Path):
        super().__init__(path, "xb")
        self.hash, self.size = hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            count = super().write(data)
        except OSError as error:
            self.error = error
            raise
        self.hash.update(memoryview(data).cast("B")[:count])
        self.size += count
        return count


class _Flushing(io.BufferedWriter):
    """Who asks for the descriptor, in order to sync, has everything in the file: torch 2.8 does not flush before."""

    def fileno(self) -> int:
        self.flush()
        return super().fileno()


class _HashedFiles(FileSystem):
    """Files as DCP's writer opens them."""

    def __init__(self) -> None:
        self.written: dict[Path, File] = {}
        self.error: OSError | None = None

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[io.IOBase]:
        assert mode == "wb"
        raw = None
        try:
            raw = _Hashed(Path(path))
            with _Flushing(raw) as stream:
                yield stream
        except BaseException as error:
            self.error = error if isinstance(error, OSError) else raw and raw.error
            raise
        self.written[Path(path)] = File(raw.size, raw.hash.hexdigest())


class _HashedStream(io.RawIOBase):
    """What is sent to an object store, hashed on its way."""

    def __init__(self, url: Url):
        self.inner = url.open("wb")
        self.hash, self.size = hashlib.sha256(), 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.size

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.inner.write(view)
        self.hash.update(view)
        self.size += len(view)
        return len(view)

    def close(self) -> None:
        if not self.closed:
            super().close()
            self.inner.close()


class _HashedObjects(FileSystemBase):
    """Objects as DCP's writer and reader open them. None of the same name is there before: its folder is new."""

    def __init__(self) -> None:
        self.written: dict[Url, File] = {}
        self.error: Exception | None = None

    @contextmanager
    def create_stream(self, path: str | os.PathLike | Url, mode: str) -> Iterator[Any]:
        assert isinstance(path, Url)
        if mode == "rb":
            yield path  # of which the reader takes parts
            return
        try:
            with _HashedStream(path) as stream:
                yield stream
        except Exception as error:
            self.error = error
            raise
        self.written[path] = File(stream.size, stream.hash.hexdigest())

    def concat_path(self, path: Any, suffix: str) -> Any:
        return path / suffix.removesuffix(".tmp")  # nothing can be renamed, so it gets its name at once

    def rename(self, path: Any, new_path: Any) -> None:
        assert path == new_path

    def init_path(self, path: Any) -> Any:
        return path

    def mkdir(self, path: Any) -> None:
        return

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return isinstance(checkpoint_id, Url)

    def exists(self, path: Any) -> bool:
        return False

    def rm_file(self, path: Any) -> None:
        raise AssertionError("what a checkpoint holds is written once")


class _Writer(FileSystemWriter):
    """One file a rank, and the metadata by rank 0, all synced."""

    def __init__(self, folder: Folder):
        super().__init__(str(folder), sync_files=isinstance(folder, Path))
        self.path: Any = folder
        self.fs = self.files = _HashedFiles() if isinstance(folder, Path) else _HashedObjects()

    def storage_meta(self) -> None:
        """Nothing: DCP's holds the folder's path as an object."""
        return


class _Reader(FileSystemReader):
    """Reads files, and of objects the parts that are asked for, each in one request."""

    def __init__(self, folder: Folder):
        super().__init__(str(folder))
        self.path: Any = folder
        if isinstance(folder, Url):
            self.fs = _HashedObjects()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        try:
            with (self.path / METADATA).open("rb") as file:
                metadata = _Metadata(file).load()
            _check(metadata)
        except Unreachable:
            raise
        except Exception as error:  # a damaged pickle raises anything
            raise Damaged(self.path, f"{METADATA}: {error}") from error
        return metadata

    def _slice_file(self, file: Any, sinfo: Any) -> Any:
        if isinstance(file, Url):
            return file.part(sinfo.offset, sinfo.length)
        return super()._slice_file(file, sinfo)


class _Metadata(pickle.Unpickler):
    """The classes of DCP's metadata, and nothing else: a pickle may name any function, and have it called."""

    ALLOWED = {
        "torch.distributed.checkpoint.metadata": {
            *("ChunkStorageMetadata", "Metadata", "MetadataIndex", "TensorProperties", "TensorStorageMetadata"),
            "_MEM_FORMAT_ENCODING",
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.serialization": {"_get_layout"},
        "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        if name not in self.ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"names {module}.{name}, which no checkpoint holds")
        return super().find_class(module, name)


def _member(of: Any, name: str) -> Enum:
    """A member of an enumeration, which Python 3.11.0 to 3.11.3 write as a call of getattr."""
    if not (isinstance(of, type) and issubclass(of, Enum)):
        raise pickle.UnpicklingError("names builtins.getattr of what is no enumeration, which no checkpoint holds")
    return of[name]


def _check(metadata: Metadata) -> None:
    """What the reader relies on: DCP unpickles freely what is not marked as a tensor, and follows any path."""
    for name, value in metadata.state_dict_metadata.items():
        if not isinstance(value, TensorStorageMetadata):
            raise ValueError(f"{name} is not a tensor")
    for info in metadata.storage_data.values():
        if Path(info.relative_path).name != info.relative_path or info.transform_descriptors:
            raise ValueError(f"names the file {info.relative_path!r}, expected one beside it and as it is")
