"""Checkpoints that are damaged, nonsense or malicious: named, passed over, and never believed."""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from dist_train.checkpoint import manifest, places, storage
from dist_train.checkpoint.manifest import METADATA, NAME, Damaged
from dist_train.errors import ConfigError

from checkpoint_runs import DDP, SINGLE, checkpoint, copy, refused, resumed_from, same, weights
from zygote import Run, Zygote

RANK_FILE = "__0_0.distcp"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def to_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


HARM = {"flipped": flip, "cut": halve, "empty": empty, "missing": Path.unlink, "a-folder": to_folder}
SAID = {
    ("flipped", NAME): (f"{NAME} is not whole", f"the content of {NAME} does not fit its hash", "got schema"),
    ("cut", NAME): (f"{NAME} is not whole",),
    ("empty", NAME): (f"{NAME} is not whole",),
    **{("flipped", name): (f"the content of {name} does not fit its hash",) for name in (RANK_FILE, METADATA)},
    **{("cut", name): (f" bytes in {name}, expected ",) for name in (RANK_FILE, METADATA)},
    **{("empty", name): (f"got 0 bytes in {name}, expected ",) for name in (RANK_FILE, METADATA)},
    **{("missing", name): (f"{name} is missing",) for name in (RANK_FILE, METADATA, NAME)},
    **{("a-folder", name): (f"{name} cannot be read: Is a directory",) for name in (RANK_FILE, METADATA, NAME)},
}


def rewrite(folder: Path, change: Callable[[dict], None] = lambda tree: None) -> None:
    """Changes a manifest, with the hashes of the files as they are now, and the right hash of itself."""
    tree = json.loads((folder / NAME).read_text())
    del tree["sha256"]
    for name in tree["files"]:
        content = (folder / name).read_bytes()
        tree["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    change(tree)
    (folder / NAME).write_text(json.dumps(tree | {"sha256": manifest._digest(tree)}))


def test_what_is_damaged_is_named_and_the_one_before_it_is_used(zygote: Zygote, references, cut, tmp_path: Path):
    folders = {}
    for harm, name in SAID:
        folders[harm, name] = copy(cut(SINGLE), tmp_path / harm / name)
        HARM[harm](checkpoint(folders[harm, name], 9) / name)
    for (harm, name), folder in folders.items():
        ended = zygote.run(SINGLE.run(folder))[0].check()
        line = next(line for line in ended.out[0].splitlines() if "passed over a damaged checkpoint" in line)
        assert str(checkpoint(folder, 9)) in line and any(said in line for said in SAID[harm, name]), line
        assert resumed_from(ended) == 6 and same(weights(folder), references(SINGLE).weights)
        # It went when a newer one stood.
        names = [path.name for path in places.found_at(folder).folders()]
        assert sorted(names) == ["step-00000009.2", "step-00000012"], (harm, name)


def test_a_file_that_one_rank_finds_damaged_is_passed_over_by_all(zygote: Zygote, references, cut, tmp_path: Path):
    folder = copy(cut(DDP), tmp_path)
    flip(checkpoint(folder, 9) / "__1_0.distcp")
    ended = zygote.run(DDP.run(folder))[0].check()
    assert "the content of __1_0.distcp does not fit its hash" in ended.out[0]
    assert resumed_from(ended) == 6 and same(weights(folder), references(DDP).weights)


def test_where_all_are_damaged_the_run_stops_and_says_so(zygote: Zygote, cut, tmp_path: Path):
    for kind in (SINGLE, DDP):
        folder = copy(cut(kind), tmp_path / kind.backend)
        flip(checkpoint(folder, 9) / RANK_FILE)
        (checkpoint(folder, 6) / NAME).unlink()
        before = {path: path.read_bytes() for path in (folder / "checkpoints").rglob("*") if path.is_file()}
        text = refused(zygote.run(kind.run(folder))[0])
        assert f"step-00000009: the content of {RANK_FILE} does not fit" in text and f"{NAME} is missing" in text
        assert "are all damaged" in text and "give another --run.dir" in text
        assert before == {path: path.read_bytes() for path in (folder / "checkpoints").rglob("*") if path.is_file()}


def test_an_unknown_schema_is_passed_over_and_another_file_beside_is_no_harm(zygote: Zygote, cut, tmp_path: Path):
    folder = copy(cut(SINGLE), tmp_path)
    rewrite(checkpoint(folder, 9), lambda tree: tree.update(schema=2, more=1))
    (checkpoint(folder, 6) / "notes.txt").write_text("mine")
    ended = zygote.run(SINGLE.run(folder))[0].check()
    assert "got schema 2, expected 1, the one that this version knows" in ended.out[0] and resumed_from(ended) == 6


def test_a_manifest_from_before_runs_had_an_id_at_wandb_is_whole(cut, tmp_path: Path):
    folder = copy(checkpoint(cut(SINGLE), 9), tmp_path)
    rewrite(folder, put("wandb_id", value=...))
    assert manifest.read(folder).wandb_id is None
    rewrite(folder, put("wandb_id", value="abc"))
    assert manifest.read(folder).wandb_id == "abc"


# -- nonsense with the right hash ------------------------------------------------------------------------------------


def put(*path: str | int, value) -> Callable[[dict], None]:
    """Sets what is at a path of the tree; removes it if the value is ...."""

    def change(tree: dict) -> None:
        node = functools.reduce(lambda node, key: node[key], path[:-1], tree)
        if value is ...:
            del node[path[-1]]
        else:
            node[path[-1]] = value

    return change


NONSENSE = [
    put("step", value=0),
    put("step", value=-3),
    put("step", value=8),
    put("step", value=True),
    put("step", value=10**30),
    put("sequence", value=-1),
    put("world_size", value=0),
    put("epoch", value=-1),
    put("global_batch_size", value=0),
    put("data", "train", value=-46),
    put("progress", value={}),
    put("progress", "steps", value=9.5),
    put("progress", "steps", value=12),
    put("progress", "samples", value=-1),
    put("progress", "logged_steps", value=10),
    put("progress", "interval_samples", value=float("nan")),
    put("progress", "interval_loss", value="much"),
    put("progress", "interval_loss", value=10**400),
    put("progress", "time_s", value=float("inf")),
    put("progress", "train_s", value=...),
    put("evaluation", value={"accuracy": 0.5}),
    put("loss_scale", value={"factor": 0.0, "finite_steps": 1}),
    put("loss_scale", value={"factor": float("nan"), "finite_steps": 1}),
    put("wandb_id", value=3),
    put("config", value={}),
    put("config", "train", value=...),
    put("config", "train", "drop_last", value=...),
    put("config", "optim", "name", value=...),
    put("config", "data", value=3),
    put("backend", value="ddp\ud800"),
    put("model", "layers.1.weight", "shape", value=[-1, 2]),
    put("files", value={}),
    put("files", METADATA, value=...),
    put("files", METADATA, "size", value=-1),
    put("files", "../weights.pt", value={"size": 1, "sha256": ""}),
    put("files", "/etc/passwd", value={"size": 1, "sha256": ""}),
    put("files", "..", value={"size": 1, "sha256": ""}),
    put("files", "a\0b", value={"size": 1, "sha256": ""}),
    put("files", "a\ud800b", value={"size": 1, "sha256": ""}),
    put("files", NAME, value={"size": 1, "sha256": ""}),
    put("files", RANK_FILE, value="here"),
]


def test_nonsense_with_the_right_hash_is_damaged(cut, tmp_path: Path):
    for i, change in enumerate(NONSENSE):
        folder = copy(checkpoint(cut(SINGLE), 9), tmp_path / str(i))
        rewrite(folder, change)
        found, damaged = manifest.listed(folder)
        assert not found, (folder / NAME).read_text()
        assert damaged[0].problem.startswith(f"{NAME} is not a manifest: got ")


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[]", b"null", b"{\xff}", b'{"sha256": 1}', b"[" * 100_000, b'{"sha256": ' + b"[" * 800 + b"]" * 800],
)
def test_what_is_no_manifest_is_refused_by_the_command(content: bytes, zygote: Zygote, cut, tmp_path: Path):
    folder = copy(checkpoint(cut(SINGLE), 9), tmp_path)
    (folder / NAME).write_bytes(content)
    text = refused(zygote.run(Run(["--checkpoint.resume", str(folder), "--run.dir", str(tmp_path / "new")]))[0])
    assert f"{folder}: " in text and "are all damaged" in text


# Values that JSON can hold, with those that break what is careless.
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.floats()
    | st.integers()
    | st.sampled_from([-1, 0, 2**63, 10**400, float("nan"), "", "..", "a/b", "\0", "\ud800", METADATA])
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
FUZZ = settings(
    max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


def paths(tree) -> list[tuple]:
    """Every path in a tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path for key, value in items for path in [(key,), *((key, *rest) for rest in paths(value))]]


@pytest.fixture
def victim(cut, tmp_path: Path) -> Path:
    """A checkpoint whose manifest may be overwritten."""
    return copy(checkpoint(cut(SINGLE), 9), tmp_path)


def believed(folder: Path) -> manifest.Manifest | None:
    """The manifest, if it and its files are whole. Whatever stands there, nothing is raised but Damaged."""
    with contextlib.suppress(Damaged):
        what = manifest.read(folder)
        manifest.verify(folder, what, what.files)
        assert manifest.listed(folder) == ([(folder, what)], []) or "nan" in repr(what)
        return what
    found, _ = manifest.listed(folder)
    assert all(path == folder for path, _ in found)
    return None


@FUZZ
@given(data=st.data())
def test_fuzzed_bytes_are_believed_only_where_they_say_the_same(data, victim: Path, cut):
    original = (checkpoint(cut(SINGLE), 9) / NAME).read_bytes()
    content = bytearray(original)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    (victim / NAME).write_bytes(content)
    what = believed(victim)
    assert what is None or json.loads(content) == json.loads(original)


@FUZZ
@given(data=st.data())
def test_fuzzed_trees_are_believed_only_with_the_right_hash_and_types(data, victim: Path, cut):
    tree = json.loads((checkpoint(cut(SINGLE), 9) / NAME).read_text())
    right = tree.pop("sha256")
    if data.draw(st.integers(0, 3)):
        for _ in range(data.draw(st.integers(1, 3))):
            put(*data.draw(st.sampled_from(paths(tree))), value=data.draw(VALUES | st.just(...)))(tree)
    else:
        tree = data.draw(st.dictionaries(st.sampled_from(["schema", "step", "files"]), VALUES))
    digest = right if data.draw(st.integers(0, 4)) == 0 else manifest._digest(tree)
    (victim / NAME).write_text(json.dumps(tree | {"sha256": digest}))
    what = believed(victim)
    if what is not None:
        assert digest == manifest._digest(tree)
        assert repr(dataclasses.asdict(what)) == repr({name: tree[name] for name in dataclasses.asdict(what)})
        assert what.step == what.progress["steps"] > 0 and METADATA in what.files


def test_the_command_never_ends_in_a_traceback_over_a_manifest(zygote: Zygote, cut, tmp_path: Path):
    """Every single value of a manifest replaced by another, with the right hash: refused, or the run goes on."""
    source = checkpoint(cut(SINGLE), 9)
    every = [p for p in paths(json.loads((source / NAME).read_text())) if p[0] not in ("sha256", "versions")]
    values = (-1, 7, 2**62, 0.5, "", "x", None, True, [], {}, ...)
    runs = []
    for i, path in enumerate(every[::3]):
        folder = tmp_path / str(i) / "checkpoints" / "step-00000009"
        shutil.copytree(source, folder)
        rewrite(folder, put(*path, value=values[i % len(values)]))
        runs.append(SINGLE.run(tmp_path / str(i)))
    for begin in range(0, len(runs), 4):
        for path, ended in zip(every[::3][begin : begin + 4], zygote.run(*runs[begin : begin + 4]), strict=True):
            if ended.codes != [0]:
                assert refused(ended), path


# -- malice ----------------------------------------------------------------------------------------------------------


class Evil:
    """Makes a file where it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def metadata(folder: Path):
    """DCP's description of a checkpoint."""
    return pickle.loads((folder / METADATA).read_bytes())


def evil_metadata(folder: Path, marker: Path) -> None:
    (folder / METADATA).write_bytes(pickle.dumps(Evil(marker)))


def evil_within_metadata(folder: Path, marker: Path) -> None:
    content = metadata(folder)
    content.planner_data = Evil(marker)
    (folder / METADATA).write_bytes(pickle.dumps(content))


class Method:
    """Pickles as one of a class that a checkpoint may hold."""

    def __reduce__(self) -> tuple:
        return getattr, (torch.Size, "numel")


def evil_getattr(folder: Path, marker: Path) -> None:
    content = metadata(folder)
    content.planner_data = Method()
    (folder / METADATA).write_bytes(pickle.dumps(content))


def evil_tensor(folder: Path, marker: Path) -> None:
    payload = io.BytesIO()
    torch.save(Evil(marker), payload)
    content = metadata(folder)
    for index, info in content.storage_data.items():
        content.storage_data[index] = dataclasses.replace(info, offset=0, length=len(payload.getvalue()))
    (folder / METADATA).write_bytes(pickle.dumps(content))
    (folder / RANK_FILE).write_bytes(payload.getvalue())


def evil_bytes(folder: Path, marker: Path) -> None:
    evil_tensor(folder, marker)
    content = metadata(folder)
    content.state_dict_metadata = {name: BytesStorageMetadata() for name in content.state_dict_metadata}
    (folder / METADATA).write_bytes(pickle.dumps(content))


def elsewhere(path: str) -> Callable[[Path, Path], None]:
    """The tensors in a file of another place, where they really are."""

    def change(folder: Path, marker: Path) -> None:
        shutil.copy(folder / RANK_FILE, marker.parent / "elsewhere")
        content = metadata(folder)
        for index, info in content.storage_data.items():
            there = path.format(place=marker.parent)
            content.storage_data[index] = dataclasses.replace(info, relative_path=there)
        (folder / METADATA).write_bytes(pickle.dumps(content))

    return change


def unlisted(folder: Path, marker: Path) -> None:
    elsewhere("other")(folder, marker)
    shutil.copy(folder / RANK_FILE, folder / "other")


MALICE = {
    "metadata": (evil_metadata, ".metadata: names posix.mkdir, which no checkpoint holds"),
    "within-metadata": (evil_within_metadata, ".metadata: names posix.mkdir, which no checkpoint holds"),
    "getattr": (evil_getattr, ".metadata: names builtins.getattr of what is no enumeration"),
    "tensor": (evil_tensor, "cannot be read: Weights only load failed"),
    "bytes": (evil_bytes, "BytesStorageMetadata, which no checkpoint holds"),
    "upwards": (elsewhere("../../../elsewhere"), "names the file '../../../elsewhere', expected one beside it"),
    "absolute": (elsewhere("{place}/elsewhere"), "/elsewhere', expected one beside it"),
    "unlisted": (unlisted, "names the file 'other', which manifest.json does not"),
}


@pytest.mark.parametrize("name", MALICE)
def test_a_malicious_checkpoint_is_refused_and_nothing_of_it_runs(name: str, zygote: Zygote, cut, tmp_path: Path):
    plant, said = MALICE[name]
    folder = copy(cut(SINGLE), tmp_path)
    shutil.rmtree(checkpoint(folder, 6))
    plant(checkpoint(folder, 9), tmp_path / "marker")
    rewrite(checkpoint(folder, 9))
    manifest.verify(checkpoint(folder, 9), manifest.read(checkpoint(folder, 9)), [METADATA, RANK_FILE])  # hashes fit
    text = refused(zygote.run(SINGLE.run(folder))[0])
    assert said in text and str(checkpoint(folder, 9)) in text
    assert not (tmp_path / "marker").exists(), "its code ran"


class AsPython3112(pickle.Pickler):
    """Writes enumerations as Python 3.11.0 to 3.11.3 do."""

    def reducer_override(self, value: Any) -> Any:
        return (getattr, (type(value), value.name)) if isinstance(value, Enum) else NotImplemented


def test_enumerations_of_an_older_python_are_read(cut, tmp_path: Path):
    folder = copy(checkpoint(cut(SINGLE), 9), tmp_path)
    before, payload = storage.tensors(folder), io.BytesIO()
    AsPython3112(payload).dump(metadata(folder))
    assert b"getattr" in payload.getvalue()
    (folder / METADATA).write_bytes(payload.getvalue())
    assert storage.tensors(folder) == before


def test_the_malice_is_real(cut, tmp_path: Path):
    folder = copy(checkpoint(cut(SINGLE), 9), tmp_path)
    evil_tensor(folder, tmp_path / "marker")
    torch.load(folder / RANK_FILE, weights_only=False)
    assert (tmp_path / "marker").exists()


def test_a_run_folder_may_be_named_as_a_checkpoint_is(tmp_path: Path):
    run = tmp_path / "step-00000001"
    run.mkdir()
    assert manifest.listed(run) == ([], [])
    lost = run / "checkpoints" / "step-00000003"
    lost.mkdir(parents=True)
    assert [error.problem for error in manifest.listed(lost)[1]] == [f"{NAME} is missing"]


def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(tmp_path: Path):
    with pytest.raises(ConfigError, match="cannot be listed"):
        manifest.listed(tmp_path / ("x" * 300))
    assert manifest.listed(tmp_path / "a\0b") == ([], [])
