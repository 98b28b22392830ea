"""Checkpoints in an object store, and in a folder elsewhere: whole or absent there too. The server is a real one."""

import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from store import BUCKET, Store, alike, served

from checkpoint_runs import (
    DDP,
    FSDP2,
    SINGLE,
    Kind,
    refused,
    resumed_from,
    same,
    steps,
    weights,
)
from zygote import Run, Zygote

# What a single process does in the store in the save of step 9, which makes that of step 3 go.
OF_A_SAVE = (
    *("open step-00000009/__0_0.distcp", "send step-00000009/__0_0.distcp"),
    *("open step-00000009/.metadata", "send step-00000009/.metadata", "write step-00000009/manifest.json"),
    *("remove step-00000003/manifest.json", "empty step-00000003"),
)
AT_ONCE = 4
COMMITTED = OF_A_SAVE.index("write step-00000009/manifest.json") + 1


@pytest.fixture(scope="module")
def store():
    """The server, and an empty bucket."""
    with served() as one:
        yield one


def url(name: str) -> str:
    return f"s3://{BUCKET}/{name}"


def run(store: Store, kind: Kind, folder: Path, name: str, *more: str, fault: tuple = (), rank: int = 0, **keys) -> Run:
    """A run whose checkpoints are in the store."""
    plant = store.plant(*fault, ranks=kind.ranks, rank=rank)
    return kind.run(folder, "--checkpoint.dir", url(name), *more, plant=plant, **keys)


@pytest.fixture(scope="module")
def cut(store: Store, zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A name in the bucket where the checkpoints of steps 6 and 9 are, and half of step 12: to be copied."""
    run_of = run(store, SINGLE, tmp_path_factory.mktemp("cut"), "cut", fault=("kill_in_store", 12, 2))
    assert zygote.run(run_of)[0].codes == [-9]
    store.delete("cut/.writer")
    return "cut"


def test_a_run_saves_in_a_store_in_an_order_that_keeps_the_promise(
    store: Store, zygote: Zygote, references, tmp_path: Path
):
    trace = tmp_path / "trace"
    kinds = {"one": (SINGLE, ("trace_store", str(trace))), "two": (replace(DDP, asynchronous=True), ())}
    ended = zygote.run(*(run(store, kind, tmp_path / name, name, fault=fault) for name, (kind, fault) in kinds.items()))
    for each, (name, (kind, _)) in zip(ended, kinds.items(), strict=True):
        each.check()
        assert same(weights(tmp_path / name), references(kind).weights)
        assert store.steps(name) == [12, 9] and not store.leftovers(name)
        assert not (tmp_path / name / "checkpoints").exists()
    done = [alike(line).replace(f"{url('one')}/", "") for line in trace.read_text().splitlines()]
    third = done.index(OF_A_SAVE[0])
    assert tuple(done[third : third + len(OF_A_SAVE)]) == OF_A_SAVE


def batched(moments: Sequence[int]) -> list[Sequence[int]]:
    return [moments[i : i + AT_ONCE] for i in range(0, len(moments), AT_ONCE)]


def test_a_kill_at_any_moment_of_a_save_in_a_store_loses_nothing(
    store: Store, zygote: Zygote, references, tmp_path: Path
):
    moments = range(len(OF_A_SAVE) + 1)
    cut, again = [], []
    for some in batched(moments):
        faults = {n: ("kill_in_store", 9, n) for n in some}
        cut += zygote.run(*(run(store, SINGLE, tmp_path / f"{n}", f"kill{n}", fault=faults[n]) for n in some))
    for n, ended in zip(moments, cut, strict=True):
        assert ended.codes == [-signal.SIGKILL], (n, ended)
        left = store.steps(f"kill{n}")  # all of them whole
        assert left == ([6, 3] if n < COMMITTED else [9, 6, 3] if n == COMMITTED else [9, 6]), n
    for some in batched(moments):
        again += zygote.run(*(run(store, SINGLE, tmp_path / f"{n}", f"kill{n}") for n in some))
    for n, ended in zip(moments, again, strict=True):
        assert resumed_from(ended.check()) == (6 if n < COMMITTED else 9), n
        assert same(weights(tmp_path / f"{n}"), references(SINGLE).weights), n
        assert store.steps(f"kill{n}") == [12, 9] and not store.leftovers(f"kill{n}"), n


def test_a_manifest_that_is_sent_first_is_seen(store: Store, zygote: Zygote, references, tmp_path: Path):
    """The fault that the order is there against: a kill leaves a checkpoint that says that it is whole, and is not."""
    zygote.run(run(store, SINGLE, tmp_path / "run", "first", fault=("manifest_first", 9)))
    with pytest.raises(AssertionError, match="step-00000009.* has .*manifest.json"):
        store.steps("first")
    (ended,) = zygote.run(run(store, SINGLE, tmp_path / "run", "first"))
    assert "passed over a damaged checkpoint: s3://bucket/first/step-00000009-" in ended.check().out[0]
    assert resumed_from(ended) == 6 and same(weights(tmp_path / "run"), references(SINGLE).weights)
    assert store.steps("first") == [12, 9]


def test_a_rank_that_is_killed_between_two_parts_of_its_upload(store: Store, zygote: Zygote, tmp_path: Path):
    """Its object is not there, so the checkpoint is not; the run goes on elsewhere, in one process on a new disk."""
    wide = ("--model.hidden", "[1100, 1100]", "--train.epochs", "1", "--checkpoint.every_steps", "2")
    fault = ("kill_between_parts", 4)
    (ended,) = zygote.run(run(store, FSDP2, tmp_path / "a", "parts", *wide, fault=fault, rank=1, kill_all=True))
    assert ended.codes[1] == -signal.SIGKILL and store.steps("parts") == [2]
    assert not any("__1_0" in key for key in store.leftovers("parts"))
    (ended,) = zygote.run(run(store, SINGLE, tmp_path / "b", "parts", *wide))
    assert resumed_from(ended.check()) == 2
    assert store.steps("parts") == [6, 4] and not store.leftovers("parts")


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


HARM = {
    "truncated": ("__0_0.distcp", lambda content: content[:-100], "bytes in __0_0.distcp, expected"),
    "flipped": (".metadata", flip, "the content of .metadata does not fit its hash"),
    "no manifest": ("manifest.json", None, ""),
    "half a manifest": ("manifest.json", lambda content: content[: len(content) // 2], "manifest.json is not whole"),
}


def test_what_is_damaged_in_a_store_is_named_and_what_is_absent_is_not(
    store: Store, zygote: Zygote, cut: str, references, tmp_path: Path
):
    names = {harm: f"harm{i}" for i, harm in enumerate(HARM)}
    for harm, name in names.items():
        file, change, _ = HARM[harm]
        store.copy(cut, name)
        key = f"{store.folder(name, 9)}/{file}"
        if change is None:
            store.delete(key)
        else:
            store.put(key, change(store.get(key)))
    looked = zygote.run(*(Run(["inspect", url(name)], plant=store.plant()) for name in names.values()))
    ended = zygote.run(*(run(store, SINGLE, tmp_path / name, name) for name in names.values()))
    for (harm, name), seen, each in zip(names.items(), looked, ended, strict=True):
        said = HARM[harm][2]
        assert seen.codes == [1 if said else 0] and "step-00000006-" in seen.out[0], seen
        assert (f"damaged: {url(name)}/step-00000009-" in seen.out[0]) == bool(said) and said in seen.out[0], seen
        assert ("passed over a damaged" in each.check().out[0]) == bool(said) and said in each.out[0], each
        assert resumed_from(each) == 6 and same(weights(tmp_path / name), references(SINGLE).weights)
        assert store.steps(name) == [12, 9] and not store.leftovers(name)


def test_a_store_that_does_not_answer_is_not_one_that_is_damaged(
    store: Store, zygote: Zygote, cut: str, tmp_path: Path
):
    """Of two ranks one cannot read its files: both end, nothing is passed over, and nothing is removed."""
    store.copy(cut, "silent")
    before = store.keys("silent")
    (ended,) = zygote.run(run(store, DDP, tmp_path / "run", "silent", fault=("store_is_gone",), rank=1))
    assert "which cannot be reached (planted: no route to host)" in refused(ended)
    store.steps("silent")
    assert [key for key in before if "step-00000012" not in key] == store.keys("silent")


def test_an_upload_that_fails_on_one_rank_fails_on_all(store: Store, zygote: Zygote, tmp_path: Path):
    (ended,) = zygote.run(run(store, DDP, tmp_path / "run", "failed", fault=("store_is_gone", 9), rank=1))
    assert ended.codes == [1, 1], ended
    assert "SaveError: s3://bucket/failed/step-00000009-" in ended.err[1]
    assert "earlier checkpoints stand: checkpoint: got" in ended.err[1] and "planted: no route" in ended.err[1]
    assert store.steps("failed") == [6, 3] and set(store.leftovers("failed")) <= {".writer"}


def test_what_two_ranks_saved_goes_on_under_other_backends(store: Store, zygote: Zygote, references, tmp_path: Path):
    zygote.run(run(store, DDP, tmp_path / "ddp", "ddp", fault=("kill_in_store", 12, 0), kill_all=True))
    assert store.steps("ddp") == [9, 6]
    kinds = {"ddp": DDP, "fsdp2": replace(FSDP2, asynchronous=True), "single": SINGLE}
    for name in ("fsdp2", "single"):
        store.copy("ddp", name)
    folders = {name: tmp_path / f"new-{name}" for name in kinds}  # another machine, which has no folder of the run
    ended = zygote.run(*(run(store, kinds[name], folder, name) for name, folder in folders.items()))
    expected = references(DDP).weights
    for (name, folder), each in zip(folders.items(), ended, strict=True):
        assert resumed_from(each.check()) == 9 and store.steps(name) == [12, 9]
        if name == "ddp":
            assert same(weights(folder), expected)
        for key, value in weights(folder).items():
            torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-6)


def test_ranks_that_share_no_disk_save_in_a_store(store: Store, zygote: Zygote, references, mounts, tmp_path: Path):
    """Without the store they are refused; see test_checkpoint_disks.py."""
    mounts(tmp_path / "probe", "-t", "tmpfs", "none")  # or it skips
    disk = tmp_path / "disk"
    disk.mkdir()
    traced = ("--track.profile", "{start_step: 2, steps: 1}")
    fault = ("own_folder", str(disk))
    (ended,) = zygote.run(run(store, DDP, disk / "run", "nodes", *traced, fault=fault, rank=1))
    ended.check()
    assert same(weights(disk / "run"), references(DDP).weights) and store.steps("nodes") == [12, 9]
    assert [path.name for path in (disk / "run" / "profile").glob("rank*")] == ["rank0.json"]


def test_the_commands_read_a_store(store: Store, zygote: Zygote, cut: str, references, tmp_path: Path):
    """By the config in the run's folder, or by the URL."""
    folder, best = tmp_path / "run", ("--checkpoint.keep_best", "1", "--train.eval_every_steps", "3")
    zygote.run(run(store, SINGLE, folder, "whole", *best))[0].check()
    newest = store.folder("whole", 12).removeprefix("whole/")
    plant = store.plant()
    commands = {
        "inspect the run": ["inspect", str(folder)],
        "inspect one": ["inspect", f"{url('whole')}/{newest}"],
        "replay": ["replay", "--run.dir", str(folder), "--step", "11", "--steps", "2"],
        "export": [
            "export",
            "--run.dir",
            str(folder),
            "--which",
            "best",
            "--format",
            "pt",
            "--output",
            str(tmp_path / "best.pt"),
        ],
        "resume": [*SINGLE.run(tmp_path / "on").argv, "--checkpoint.resume", url(cut)],
        "init_from": [*SINGLE.run(tmp_path / "warm").argv, "--model.init_from", url("whole"), "--train.max_steps", "1"],
        "eval": ["eval", "--run.dir", str(folder)],
    }
    found = dict(zip(commands, zygote.run(*(Run(c, plant=plant) for c in commands.values())), strict=True))
    for name, ended in found.items():
        assert ended.codes == [0], (name, ended)
    assert newest in found["inspect the run"].out[0] and "whole" in found["inspect one"].out[0]
    assert f"from {url('whole')}/step-0000000" in found["replay"].out[0] and "as recorded" in found["replay"].out[0]
    assert resumed_from(found["resume"]) == 9 and same(weights(tmp_path / "on"), references(SINGLE).weights)
    assert steps(tmp_path / "on") == [12] and store.steps(cut) == [9, 6], "its own are on its disk"
    assert f"model.init_from {url('whole')}: 4 of 4 tensors loaded" in found["init_from"].out[0]
    assert (tmp_path / "best.pt").exists()


def test_checkpoints_that_an_audit_suspects_are_set_aside_in_a_store(store: Store, zygote: Zygote, tmp_path: Path):
    kind = Kind("ddp", 3)
    every = ("--train.audit_every_steps", "5", "--checkpoint.every_steps", "1", "--train.draws", "keyed")
    fault = ("flips_gradient", 10)
    (ended,) = zygote.run(run(store, kind, tmp_path / "run", "audit", *every, fault=fault, rank=1))
    assert set(ended.codes) == {1} and "audit of step 10: the gradient that rank 1 " in ended.err[0], ended
    said = alike(ended.err[0])
    assert "Set aside, as saved after step 5" in said and "suspect-step-00000008, suspect-step-00000009." in alike(said)
    assert alike(said.strip()).endswith(f"{url('audit')}/step-00000005")
    (ended,) = zygote.run(run(store, kind, tmp_path / "run", "audit", *every))
    assert resumed_from(ended.check()) == 5
    kept = {alike(key.partition("/")[0]) for key in store.keys("audit") if key.startswith("s")}
    assert {"suspect-step-00000008", "step-00000008", "suspect-step-00000009", "step-00000009"} <= kept


def test_one_run_at_a_time_has_a_place(store: Store, zygote: Zygote, tmp_path: Path):
    held, go = str(tmp_path / "held"), str(tmp_path / "go")
    kind = SINGLE
    first, second = zygote.run(
        run(store, kind, tmp_path / "a", "held", fault=("wait_in_store", 6, held, go)),
        run(store, kind, tmp_path / "b", "held", fault=("start_after", held, go)),
    )
    assert "checkpoint.dir: got s3://bucket/held, in which another run writes (process " in refused(second)
    first.check()
    assert store.steps("held") == [12, 9] and not store.leftovers("held")
    # Of a machine that is gone: it does not beat, and after a while counts no longer.
    store.put("held/.writer", b"process 7 on there\nanother-boot pid:[1] 7 100 abc\n3\n")
    (third,) = zygote.run(run(store, kind, tmp_path / "c", "held", "--train.epochs", "3", fault=("stale_soon", 0.5)))
    assert resumed_from(third.check()) == 12 and not store.leftovers("held")


BAD = {
    "sss://bucket/path": "checkpoint.dir: got sss://bucket/path, whose sss:// fsspec does not know, expected s3://",
    "memory://path": "checkpoint.dir: got memory://path, which ends with the process, expected a place that stays",
    "s3://bucket/a*": "checkpoint.dir: got s3://bucket/a*, with one of * ? [ ] in it",
    "": "checkpoint.dir: got '', expected a folder, or a URL such as s3://bucket/path",
    "/proc/none": "checkpoint.dir: got /proc/none, which cannot be written to",
    "s3://none/path": "checkpoint.dir: got s3://none/path, which cannot be written to (The specified bucket does not",
}


def test_a_place_that_cannot_be_is_refused_before_training(store: Store, zygote: Zygote, tmp_path: Path):
    runs = [SINGLE.run(tmp_path / "run", "--checkpoint.dir", place, plant=store.plant()) for place in BAD]
    two = DDP.run(tmp_path / "two", "--checkpoint.dir", "s3://none/path", plant=store.plant(ranks=2))
    no_keys = {"HOME": str(tmp_path), "AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}
    plant = {0: ("placed", store.environment | no_keys)}
    keyless = SINGLE.run(tmp_path / "run", "--checkpoint.dir", url("keyless"), plant=plant)
    without = SINGLE.run(tmp_path / "run", "--checkpoint.dir", "gs://bucket/path", plant=store.plant())
    resume = SINGLE.run(tmp_path / "run", "--checkpoint.resume", url("nothing"), plant=store.plant())
    warm = SINGLE.run(tmp_path / "run", "--model.init_from", url("nothing"), plant=store.plant())
    said = [refused(ended) for ended in zygote.run(*runs)]
    for text, expected in zip(said, BAD.values(), strict=True):
        assert expected in text and text.count("\n") == 1, text
    rest = {
        "got s3://none/path, which cannot be written to": two,
        f"checkpoint: got {url('keyless')}, which cannot be reached (Unable to locate credentials)": keyless,
        "got gs://bucket/path, whose library is not installed (": without,
        f"checkpoint.resume: got {url('nothing')}, expected auto, never, or the folder": resume,
        f"model.init_from: got {url('nothing')}, where no checkpoint is": warm,
    }
    for expected, ended in zip(rest, zygote.run(*rest.values()), strict=True):
        text = refused(ended)
        assert expected in text and text.count("\n") == 1, text
    assert not any(path.name == "metrics.jsonl" for path in tmp_path.rglob("*"))


def test_checkpoints_are_kept_in_a_folder_elsewhere(zygote: Zygote, references, tmp_path: Path):
    """By a rename, as in the run's own folder."""
    place, go = tmp_path / "place", (str(tmp_path / "held"), str(tmp_path / "go"))
    elsewhere = ("--checkpoint.dir", f"file://{place}")
    moment = ("mkdir", ".writing-step-00000012", "", 0)
    kill = SINGLE.run(tmp_path / "a", *elsewhere, plant={0: ("kill_at", str(place), moment)})
    assert zygote.run(kill)[0].codes == [-9]
    assert not (tmp_path / "a" / "checkpoints").exists() and steps(tmp_path / "a") == steps(place) == [9, 6]
    (place / ".writing-0-step-00000012").mkdir()  # of the one that was killed
    (ended,) = zygote.run(SINGLE.run(tmp_path / "b", *elsewhere))
    assert resumed_from(ended.check()) == 9 and same(weights(tmp_path / "b"), references(SINGLE).weights)
    assert sorted(os.listdir(place)) == [".lock", "step-00000009", "step-00000012"]
    first, second = zygote.run(
        SINGLE.run(tmp_path / "c", "--checkpoint.dir", str(tmp_path / "other"),
                   plant={0: ("wait_at", str(tmp_path / "other"), ("mkdir", ".writing-step-00000003", "", 0), *go)}),
        SINGLE.run(tmp_path / "d", "--checkpoint.dir", str(tmp_path / "other"), plant={0: ("start_after", *go)}),
    )  # fmt: skip
    assert f"checkpoint.dir: got {tmp_path / 'other'}, in which another run writes (process " in refused(second)
    first.check()
