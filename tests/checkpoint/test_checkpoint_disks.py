"""Disks that are full, cannot be written, or are not the same on all ranks; two runs in one folder."""

import errno
import fcntl
import os
import platform
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dist_train.run import lock as locks
from dist_train.run.lock import LOCK, WRITER, BusyError, holder

from checkpoint_runs import (
    DDP,
    FSDP2,
    SAVE_9,
    SAVE_12,
    SINGLE,
    Kind,
    copy,
    leftovers,
    refused,
    resumed_from,
    root,
    same,
    steps,
    weights,
)
from zygote import Zygote

WRITING = ".writing-step-00000009"
OPEN_METADATA = ("open", f"{WRITING}/.metadata.tmp", "", 0)
OPEN_MANIFEST = ("open", f"{WRITING}/manifest.json", "", 0)
OPEN_RANK_1 = ("open", f"{WRITING}/__1_0.distcp", "", 0)
# Kind of run, the rank that finds the disk full, and when.
FULL = {
    "rank-file": (SINGLE, 0, SAVE_9),
    "metadata": (SINGLE, 0, OPEN_METADATA),
    "manifest": (SINGLE, 0, OPEN_MANIFEST),
    "asynchronous": (replace(SINGLE, asynchronous=True), 0, SAVE_9),
    "rank-0-of-2": (FSDP2, 0, OPEN_METADATA),
    "rank-1-of-2": (DDP, 1, OPEN_RANK_1),
    "rank-1-of-2-asynchronous": (replace(DDP, asynchronous=True), 1, OPEN_RANK_1),
}


@pytest.mark.parametrize("name", FULL)
def test_a_full_disk_is_named_and_the_run_goes_on_when_there_is_space(
    name: str, zygote: Zygote, references, mounts, tmp_path: Path
):
    kind, rank, moment = FULL[name]
    disk = mounts(tmp_path / "disk", "-t", "tmpfs", "-o", "size=4m", "none")
    folder, filler = disk / "run", disk / "filler"
    other = f"{WRITING}/__0_0.distcp" if moment == OPEN_RANK_1 else None
    (ended,) = zygote.run(kind.run(folder, plant={rank: ("fill_at", root(folder), moment, str(filler), other)}))
    assert ended.codes == [1] * kind.ranks, ended
    line = next(line for line in ended.err[rank].splitlines() if "SaveError: " in line)
    assert ": cannot be written, earlier checkpoints stand" in line and f"{folder}/checkpoints/.writing-" in line
    assert "No space left on device" in line
    if kind.ranks > 1:
        (echo,) = ended.err[1 - rank].splitlines()
        assert "lost another rank, whose own error stands above" in echo or "is gone" in echo
    assert steps(folder) == [6, 3] and not leftovers(folder)
    filler.unlink()
    again = zygote.run(kind.run(folder))[0].check()
    assert resumed_from(again) == 6 and same(weights(folder), references(kind).weights)


def test_a_disk_that_is_full_at_the_start_is_one_line(zygote: Zygote, mounts, tmp_path: Path):
    disk = mounts(tmp_path / "disk", "-t", "tmpfs", "-o", "size=64k", "none")
    with pytest.raises(OSError), (disk / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    for kind in (SINGLE, DDP):
        (ended,) = zygote.run(kind.run(disk / "run"))
        text = refused(ended)
        assert text.count("\n") == 1 and f"run.dir: got {disk / 'run'}" in text and "No space left on device" in text


@pytest.mark.parametrize("there", [True, False], ids=["run-folder", "parent"])
def test_a_read_only_folder_is_refused_before_training(there: bool, zygote: Zygote, cut, mounts, tmp_path: Path):
    if there:
        copy(cut(SINGLE), tmp_path)
    else:
        (tmp_path / "run").mkdir()
    mounts(tmp_path / "run", "--bind", str(tmp_path / "run"))
    mounts(tmp_path / "run", "-o", "remount,bind,ro")
    folder = tmp_path / "run" if there else tmp_path / "run" / "new"
    for kind in (SINGLE, DDP):
        (ended,) = zygote.run(kind.run(folder))
        text = refused(ended)
        assert text.count("\n") == 1 and f"run.dir: got {folder}" in text and "cannot be written to" in text
        assert "step " not in "".join(ended.out)


@pytest.mark.parametrize("resumed", [False, True], ids=["new", "resumed"])
def test_a_folder_of_one_rank_alone_is_refused(resumed: bool, zygote: Zygote, cut, mounts, tmp_path: Path):
    mounts(tmp_path / "probe", "-t", "tmpfs", "none")  # or it skips
    disk = tmp_path / "disk"
    folder = disk / "run"
    disk.mkdir()
    if resumed:
        shutil.copytree(cut(DDP), folder)
    (ended,) = zygote.run(DDP.run(folder, plant={0: ("blind_soon",), 1: ("own_folder", str(disk))}))
    assert ended.seconds < 5
    text = refused(ended)
    assert text.count("\n") == 1 and "which rank 1 on" in text and "does not share with rank 0" in text
    assert "all nodes mount" in text
    assert [path for path in sorted(disk.rglob("*")) if ".seen" in path.name] == []
    assert not resumed or steps(folder) == [9, 6]


@pytest.mark.parametrize("kind", [SINGLE, DDP], ids=["one-process", "two-ranks"])
def test_a_second_run_in_a_folder_is_refused(kind: Kind, zygote: Zygote, references, tmp_path: Path):
    folder, paused, go = tmp_path / "run", tmp_path / "paused", tmp_path / "go"
    first, second = zygote.run(
        kind.run(folder, plant={0: ("wait_at", root(folder), SAVE_9, str(paused), str(go))}),
        SINGLE.run(folder, plant={0: ("start_after", str(paused), str(go))}),
    )
    text, holder = refused(second), (folder / ".lock").read_text().strip()
    assert text.count("\n") == 1 and f"in which another run writes ({holder})" in text
    assert f"0     {os.uname().nodename}  " in first.check().out[0] and holder.split()[1] in first.out[0]
    assert same(weights(folder), references(kind).weights) and resumed_from(first) is None


def test_of_two_runs_that_start_at_once_one_is_refused(zygote: Zygote, references, tmp_path: Path):
    for attempt in range(3):
        folder, ended = tmp_path / str(attempt), str(tmp_path / f"ended{attempt}")
        run = SINGLE.run(folder, plant={0: ("race", root(folder), ended)})
        both = sorted(zygote.run(run, run), key=lambda ended: ended.codes)
        assert "in which another run writes (process " in refused(both[1])
        assert both[0].codes == [0] and same(weights(folder), references(SINGLE).weights)


def test_who_holds_a_folder_is_named_though_it_has_not_said_so_yet(tmp_path: Path):
    with (tmp_path / LOCK).open("a+", encoding="utf-8", buffering=1) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        saying = threading.Timer(0.2, lock.write, ["process 7 on here\n"])
        saying.start()
        assert holder(tmp_path) == "process 7 on here"
        saying.join()
    assert holder(tmp_path) is None


# -- file systems without locks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_run_on_a_file_system_without_locks(error: int, zygote: Zygote, references, tmp_path: Path):
    kind = DDP if error == errno.ENOLCK else SINGLE
    folder = tmp_path / "run"
    (ended,) = zygote.run(kind.run(folder, plant=dict.fromkeys(range(kind.ranks), ("without_locks", error))))
    said = f"{folder} is on a file system without locks ({os.strerror(error)}); instead, its file .writer tells"
    assert ended.check().out[0].count(said) == 1 and said not in "".join(ended.out[1:])
    assert same(weights(folder), references(kind).weights)
    assert not (folder / WRITER).exists()


def test_of_two_runs_one_is_refused_also_without_locks(zygote: Zygote, references, tmp_path: Path):
    folder, ended = tmp_path / "run", str(tmp_path / "ended")
    run = SINGLE.run(folder, plant={0: ("without_locks", errno.ENOLCK, "race", root(folder), ended)})
    both = sorted(zygote.run(run, run), key=lambda ended: ended.codes)
    assert "in which another run writes (process " in refused(both[1])
    assert both[0].codes == [0] and same(weights(folder), references(SINGLE).weights)


def test_a_killed_run_without_locks_is_gone_on_from(zygote: Zygote, references, tmp_path: Path):
    """Its file is there still, and tells of a process that is gone."""
    folder = tmp_path / "run"
    without = ("without_locks", errno.ENOLCK)
    kill = {0: (*without, "kill_at", root(folder), SAVE_12)}
    zygote.run(SINGLE.run(folder, plant=kill, kill_all=True))
    assert (folder / WRITER).read_text().startswith("process ")
    (ended,) = zygote.run(SINGLE.run(folder, plant={0: without}))
    assert resumed_from(ended.check()) == 9 and ended.seconds < locks.STALE_S
    assert same(weights(folder), references(SINGLE).weights) and not (folder / WRITER).exists()


ELSEWHERE = "process 7 on there\nanother-boot pid:[1] 7 100 abc\n"


def without_locks(monkeypatch: pytest.MonkeyPatch, **settings: float) -> None:
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    for name, value in settings.items():
        monkeypatch.setattr(locks, name, value)


def test_a_writer_on_another_machine_counts_as_long_as_it_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    without_locks(monkeypatch, STALE_S=1.5)
    writer = tmp_path / WRITER
    (tmp_path / LOCK).touch()
    writer.write_text(ELSEWHERE)
    assert holder(tmp_path) == "process 7 on there"
    ended = threading.Event()

    def beats() -> None:
        while not ended.wait(0.05):
            os.utime(writer)

    beating = threading.Thread(target=beats)
    beating.start()
    with pytest.raises(BusyError, match="process 7 on there"):
        locks.take(tmp_path, 0.5, print)
    ended.set()
    beating.join()
    assert writer.read_text() == ELSEWHERE
    free, why = locks.take(tmp_path, 0.5, print)  # it has stopped
    assert why == os.strerror(errno.ENOLCK) and holder(tmp_path) == f"process {os.getpid()} on {platform.node()}"
    free()
    assert not writer.exists() and holder(tmp_path) is None


def test_a_writer_that_was_taken_for_dead_hears_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    without_locks(monkeypatch, BEAT_S=0.05)
    heard, told = threading.Event(), []
    free, _ = locks.take(tmp_path, 0.5, lambda other: (told.append(other), heard.set()))
    before = (tmp_path / WRITER).stat().st_mtime_ns
    assert _within(10, lambda: (tmp_path / WRITER).stat().st_mtime_ns > before)
    (tmp_path / "other").write_text(ELSEWHERE)
    (tmp_path / "other").replace(tmp_path / WRITER)
    assert heard.wait(10) and told == ["process 7 on there"]
    free()
    assert (tmp_path / WRITER).read_text() == ELSEWHERE  # the other's is left


def test_of_two_that_take_a_stale_file_one_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The other took it in the moment after."""
    without_locks(monkeypatch, STALE_S=0.1)
    (tmp_path / WRITER).write_text(ELSEWHERE)
    sleep = time.sleep

    def other_takes(seconds: float) -> None:
        if seconds == locks.SETTLE_S:
            (tmp_path / WRITER).write_text(ELSEWHERE)
        sleep(seconds)

    monkeypatch.setattr(time, "sleep", other_takes)
    with pytest.raises(BusyError, match="process 7 on there"):
        locks.take(tmp_path, 0.1, print)


def _within(seconds: float, true: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.01)
    return true()


def test_a_run_that_waited_for_another_to_end_does_not_overwrite_it(zygote: Zygote, references, tmp_path: Path):
    """Its command line was looked at before the other took the folder."""
    folder, checked, go = tmp_path / "run", str(tmp_path / "checked"), str(tmp_path / "go")
    first, second = zygote.run(
        SINGLE.run(folder, plant={0: ("start_after", checked, go)}),
        SINGLE.run(folder, plant={0: ("lock_after", checked, go)}),
    )
    assert "which holds a finished run" in refused(second)
    first.check()
    assert steps(folder) == [12, 9] and same(weights(folder), references(SINGLE).weights)
