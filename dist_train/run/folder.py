"""The folder of a run: one run at a time writes in it, and all ranks see it."""

import contextlib
import itertools
import os
import platform
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from dist_train.checkpoint import places
from dist_train.checkpoint.places import Local, Place, Remote
from dist_train.config.given import HOME
from dist_train.config.load import dump
from dist_train.config.tree import Config, run_folder
from dist_train.errors import ConfigError
from dist_train.models.llama import filled
from dist_train.ranks import dist, ending
from dist_train.ranks.dist import World
from dist_train.ranks.speech import prefix
from dist_train.run import lock
from dist_train.track.status import status_of
from dist_train.whole import write_text

# A killed run's process may take this long to be gone.
LOCK_WAIT_S = 5.0
# A network file system may show a new file this much later on another node.
SEEN_WITHIN_S = 10.0


@contextlib.contextmanager
def opened(config: Config, world: World) -> Iterator[Path]:
    """The run's folder, made and locked by rank 0, with the config in it. Collective. Raises ConfigError."""
    locks: list[Callable[[], None]] = []
    try:
        folder = dist.on_main(lambda: _open(config, locks, prefix(world.rank, world.size)))
        place = place_of(config, folder)
        if world.size > 1 and isinstance(place, Local):  # else rank 0 alone writes on a disk
            check_shared(folder, world)
            if config.checkpoint.dir is not None:
                check_shared(place.folder, world, places.KEY)
        yield folder
    finally:
        for free in locks:
            free()


def _open(config: Config, locks: list[Callable[[], None]], rank: str) -> Path:
    folder = run_folder(config) or _before_restart()
    if folder is None:
        data, model = (name.removeprefix(f"{HOME}:") for name in (config.data.name, config.model.name))
        folder = _new_folder(Path("runs"), f"{data}-{model}-{time.strftime('%Y%m%d-%H%M%S')}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _take(folder, locks, rank)
        _take_place(config, folder, locks, rank)
        write_text(folder / "config.yaml", dump(filled(config)))
        if run_folder(config) is None and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
            write_text(_mark(), str(folder))
    except OSError as error:
        raise ConfigError(
            f"run.dir: got {folder}, which cannot be written to ({error.strerror}), expected a folder of your own on a "
            f"disk with space"
        ) from error
    return folder


def _before_restart() -> Path | None:
    """The folder that the ranks had before torchrun started them again; None at the first start."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return None
    with contextlib.suppress(OSError):
        return Path(_mark().read_text(encoding="utf-8"))
    return None


def _mark() -> Path:
    """Where the name of a folder is kept for torchrun's next start of the same ranks."""
    return Path("runs") / f".torchrun-{os.environ.get('TORCHELASTIC_RUN_ID', '')}"


def _take(folder: Path, locks: list[Callable[[], None]], rank: str) -> None:
    """Locks the folder and tidies it up. What it says starts with `rank`."""
    locks.append(_lock(folder, rank))
    if status_of(folder) == "finished":  # since its status was looked at before, while that run had the lock
        raise ConfigError(
            f"run.dir: got {folder}, which holds a finished run; expected a new folder, for example --run.dir "
            f"{folder}-2"
        )
    (folder / "summary.json").unlink(missing_ok=True)  # of a run that was stopped


def place_of(config: Config, folder: Path) -> Place:
    """Where a run in a folder keeps its checkpoints."""
    place = places.of_config(config, folder)
    assert place is not None
    return place


def _take_place(config: Config, folder: Path, locks: list[Callable[[], None]], rank: str) -> None:
    """Locks where the checkpoints are, if that is elsewhere, and tidies it up."""
    place = place_of(config, folder)

    def lost(other: str) -> None:
        sys.stderr.write(f"{rank}{places.KEY}: another run ({other}) has taken this one for dead, so this one ends\n")
        ending.leave(ending.FAILED)

    try:
        if isinstance(place, Remote):
            place.probe()
            locks.append(lock.take_in_store(place.folder, LOCK_WAIT_S, lost))
        elif config.checkpoint.dir is not None:
            place.folder.mkdir(parents=True, exist_ok=True)
            if not place.folder.samefile(folder):
                locks.append(lock.take(place.folder, LOCK_WAIT_S, lost)[0])
    except lock.BusyError as busy:
        raise ConfigError(
            f"{places.KEY}: got {place.folder}, in which another run writes ({busy}), expected a place of its own"
            f"{lock.how_to_end(str(busy))}"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"{places.KEY}: got {place.folder}, which cannot be written to ({error.strerror}), expected a folder of "
            f"your own on a disk with space"
        ) from error
    if (folder / "metrics.jsonl").exists() and not place.folders():
        print(f"{rank}{folder} holds a run that did not finish; it starts anew", flush=True)
    place.clean()


def _lock(folder: Path, rank: str) -> Callable[[], None]:
    """Held until what it returns is called, or the process ends, however it ends."""

    def lost(other: str) -> None:
        sys.stderr.write(
            f"{rank}run.dir: another run ({other}) has taken this one for dead and writes in {folder} now, so this one "
            f"ends\n"
        )
        ending.leave(ending.FAILED)

    try:
        free, without = lock.take(folder, LOCK_WAIT_S, lost)
    except lock.BusyError as busy:
        raise ConfigError(
            f"run.dir: got {folder}, in which another run writes ({busy}), expected a folder of its own; for example "
            f"--run.dir {folder}-2{lock.how_to_end(str(busy))}"
        ) from None
    if without is not None:
        print(
            f"{rank}{folder} is on a file system without locks ({without}); instead, its file {lock.WRITER} tells "
            f"other runs that this one writes there",
            flush=True,
        )
    return free


def check_shared(folder: Path, world: World, key: str = "run.dir") -> None:
    """Refuses a folder that is another one on another node: a checkpoint there would be a part of one. Collective.

    Args:
        folder: made by rank 0.
        world: this rank's place.
        key: the config path that named it.
    """
    name = dist.on_main(lambda: f".seen-{secrets.token_hex(8)}")
    mark = folder / name
    if world.is_main:
        mark.touch()
    dist.gather(None)
    deadline = time.monotonic() + SEEN_WITHIN_S
    while not (seen := mark.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    blind = [place for place in dist.gather(None if seen else (world.rank, platform.node())) if place is not None]
    if world.is_main:
        mark.unlink()
    if blind:
        rank, host = blind[0]
        raise ConfigError(
            f"{key}: got {folder}, which rank {rank} on {host} does not share with rank 0, expected a folder on a "
            f"file system that all nodes mount, as every rank writes its part of a checkpoint there"
        )


def _new_folder(parent: Path, name: str) -> Path:
    """A folder that no other run has, also if several start in the same second."""
    parent.mkdir(parents=True, exist_ok=True)
    name = name.replace(":", ".").replace("/", ".")
    for attempt in itertools.count(1):
        folder = parent / (name if attempt == 1 else f"{name}-{attempt}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder
    raise AssertionError
