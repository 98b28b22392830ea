"""The disk that a run writes to: space, speed, the same one for all ranks; and a checkpoint that reads back."""

import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

from dist_train.backends.shards import Shards
from dist_train.checkpoint import manifest, places, storage
from dist_train.checkpoint.places import Folder, Remote
from dist_train.checkpoint.save import saves
from dist_train.checkpoint.urls import Unreachable, Url
from dist_train.config.tree import Config, run_folder
from dist_train.doctor.peers import Peers
from dist_train.doctor.report import Line, size
from dist_train.errors import ConfigError, OtherRankError
from dist_train.ranks.dist import World
from dist_train.run import folder

ANOTHER = "--run.dir FOLDER   on another disk"
STORE = "with the library's own tools: aws s3 ls URL   tells whether bucket and credentials are there"
TEST_BYTES = 64_000_000
BLOCK_BYTES = 4_000_000
WRITE_S = 5.0
SLOW_MB_PER_S = 20
ROWS = 512  # of the checkpoint's tensor on each rank: 512 x 1024 float32, 2 MB


def place_of(config: Config) -> Path:
    """The folder for checkpoints, or if they go to an object store the run's; or what of the way to it exists."""
    kept = places.of_config(config, None)
    wanted = kept.folder if kept and isinstance(kept.folder, Path) else run_folder(config) or Path("runs")
    return next(path for path in (wanted, *wanted.absolute().parents) if path.is_dir())


def space(config: Config, state_bytes: int | None) -> Iterator[Line]:
    """Free space, against the checkpoints that will stay.

    Args:
        config: the run.
        state_bytes: of weights and optimizer state; None if unknown.
    """
    place = place_of(config)
    disk = os.statvfs(place)
    free = disk.f_bavail * disk.f_frsize
    kept = config.checkpoint.keep_last + config.checkpoint.keep_best + 1  # the old one goes after the new one stands
    here = saves(config.checkpoint) and not isinstance(places.of_config(config, None), Remote)
    kept = kept if here else 1
    needed = (state_bytes or 0) * kept
    facts = {"folder": str(place), "free_bytes": free, "needed_bytes": needed}
    what = f"{size(free)} in {place}"
    if state_bytes is not None:
        what += f"; {kept} checkpoint{'s' * (kept > 1)} of {size(state_bytes)}"
    if free < max(needed, BLOCK_BYTES):
        mend = f"du -xh {place} | sort -h | tail   shows what takes it; or {ANOTHER}"
        yield Line("fail", "free space", f"{what}: not enough", mend, facts)
    elif free < 2 * needed:
        yield Line("warn", "free space", f"{what}: little more than that", ANOTHER, facts)
    else:
        yield Line("pass", "free space", what, facts=facts)
    if disk.f_files and not disk.f_favail:
        yield Line("fail", "free space", f"no file can be made in {place}: its inodes are used up", ANOTHER, facts)


def speed(config: Config) -> Iterator[Line]:
    """Writing and syncing a file of 64 MB, or what of it takes 5 s."""
    place, block, written = place_of(config), os.urandom(BLOCK_BYTES), 0
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".doctor-", buffering=0) as file:
            start = time.perf_counter()
            while written < TEST_BYTES and time.perf_counter() - start < WRITE_S:
                done = file.write(block)
                written += done
                if done < len(block):
                    file.write(block[done:])  # raises why
            os.fsync(file.fileno())
            took_s = time.perf_counter() - start
    except OSError as error:
        mend = f"df -h {place}   or {ANOTHER}"
        yield Line("fail", "write", f"{place} cannot be written to: {error.strerror}, after {size(written)}", mend)
        return
    rate = written / took_s / 1e6
    what, facts = f"{rate:,.0f} MB/s, synced, in {place}", {"bytes": written, "mb_per_s": rate}
    if rate < SLOW_MB_PER_S:
        yield Line("warn", "write", f"{what}: every checkpoint takes that long", ANOTHER, facts)
    else:
        yield Line("pass", "write", what, facts=facts)


def shared(config: Config, world: World, peers: Peers) -> Iterator[Line]:
    """That all ranks see the folder of rank 0. Collective."""
    place = Path(peers.gather(str(place_of(config).absolute()))[0])
    if not peers.gather(_can_write(place) if world.is_main else None)[0]:
        return  # which another line says
    try:
        folder.check_shared(place, world)
    except ConfigError as error:
        yield Line("fail", "same folder", error.lines[0], "--run.dir FOLDER   on a file system that all nodes mount")
    else:
        yield Line("pass", "same folder", f"{peers.size} ranks see {place}")


def _can_write(place: Path) -> bool:
    try:
        tempfile.TemporaryFile(dir=place).close()
    except OSError:
        return False
    return True


def checkpoint(config: Config, peers: Peers | None) -> Iterator[Line]:
    """A checkpoint, written as a run writes it and read back from the disk, bit by bit. Collective."""
    rank, ranks, group = (peers.rank, peers.size, peers.hosts) if peers else (0, 1, None)
    made, problem = _made(config) if rank == 0 else (None, "")
    made, problem = (peers.gather((made, problem)) if peers else [(made, problem)])[0]
    if made is None:
        yield Line("fail", "checkpoint", problem, _mend(places.of_config(config, None) or place_of(config)))
        return
    try:
        yield from _there_and_back(made, rank, ranks, group)
    finally:
        if peers:
            peers.gather(None)  # all have read
        if rank == 0 and isinstance(made, Path):
            shutil.rmtree(made, ignore_errors=True)
        elif rank == 0:
            with suppress(Unreachable):
                made.remove_below(made.names())


def _made(config: Config) -> tuple[Folder | None, str]:
    """Where a checkpoint can be tried; or None, and why there is none."""
    kept = places.of_config(config, None)
    try:
        if isinstance(kept, Remote):
            kept.probe()
            return kept.folder / f".doctor-{secrets.token_hex(4)}", ""
        return Path(tempfile.mkdtemp(dir=place_of(config).absolute(), prefix=".doctor-")), ""
    except OSError as error:
        return None, f"no folder can be made in {place_of(config)}: {error.strerror}"
    except ConfigError as error:
        return None, error.lines[0]


def _mend(place: Folder | places.Place) -> str:
    return STORE if isinstance(place, Remote | Url) else f"df -h {place}   or {ANOTHER}"


def _there_and_back(place: Folder, rank: int, ranks: int, group) -> Iterator[Line]:
    generator = torch.Generator().manual_seed(rank)
    mine = torch.randn(ROWS, 1024, generator=generator)
    at, shape = (rank * ROWS, 0), (ranks * ROWS, 1024)
    start = time.perf_counter()
    try:
        files = storage.write(place, {"doctor": Shards(shape, ((at, mine),))}, group)
    except OSError as error:
        yield Line("fail", "checkpoint", f"cannot be written in {place.parent}: {error.strerror}", _mend(place.parent))
        return
    except Unreachable as error:
        yield Line("fail", "checkpoint", error.lines[0], _mend(place))
        return
    except OtherRankError:
        return  # which says it
    written_s = time.perf_counter() - start
    mend = STORE if isinstance(place, Url) else f"dmesg | tail   for errors of the disk; then {ANOTHER}"
    back = torch.zeros_like(mine)
    try:
        for name, file in files.items():
            if isinstance(place, Path):
                _forget(place / name)
            manifest.verify_file(place, name, file)
        storage.read(place, {"doctor": Shards(shape, ((at, back),))})
    except (manifest.Damaged, Unreachable) as error:
        yield Line("fail", "checkpoint", f"does not read back as it was written: {error.problem}", mend)
        return
    if not torch.equal(mine, back):
        yield Line("fail", "checkpoint", "reads back other values than were written", mend)
        return
    read_s = time.perf_counter() - start - written_s
    what = f"{size(mine.nbytes)} a rank written in {written_s:.2f} s, read back and compared in {read_s:.2f} s"
    what += f", in {place.parent}" if isinstance(place, Url) else ""
    yield Line("pass", "checkpoint", what, facts={"bytes": mine.nbytes, "write_s": written_s, "read_s": read_s})


def _forget(path: Path) -> None:
    """Takes a file out of the memory of the system, so that it is read from the disk."""
    with suppress(OSError), path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
