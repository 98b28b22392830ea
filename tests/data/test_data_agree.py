"""Every rank makes its own data set: where two differ, all ranks say so in the same line before anything is written."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dist_train.config.load import load
from dist_train.data.agree import Told, agree, difference, sketch
from dist_train.data.feed import Feed
from dist_train.data.sets import Columns, Data, FromFiles, InMemory
from dist_train.ranks.dist import World

import user_data
from workers import run_ranks
from zygote import Run, Zygote

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("what", "says"),
    [
        (
            "count",
            "rank 1 has 1,400 training samples, rank 0 1,438; expected the same data set on every rank; seed",
        ),
        ("test", "rank 1 has 5 test samples, rank 0 6"),
        ("classes", "rank 1 has 5 classes, rank 0 4"),
        ("names", "rank 1 has 'd' as class 0, rank 0 'a'"),
        ("shape", "rank 1 has samples of shape (1, 9), rank 0 of (1, 8)"),
        ("mean", "rank 1 has mean and std ((0.5,), (1.0,)), rank 0 ((0.0,), (1.0,))"),
        ("labels", "rank 1 has other training labels than rank 0, or the same in another order"),
        ("split", "rank 1 has other training labels than rank 0"),
        ("pixels", "rank 1 has another training sample 0 than rank 0"),
        ("kind", "rank 1 has its training samples as Samples, rank 0 as Columns"),
        ("identity", "rank 1 has other training files or labels (another Samples.identity) than rank 0"),
        ("items", "rank 1 has another training sample 0 than rank 0"),
        ("targets", "rank 1 has another training sample 0 than rank 0"),
        ("unreadable", "rank 1 has a training sample 1437 that cannot be read: it is gone"),
    ],
)
def test_ranks_with_other_data(zygote: Zygote, tmp_path: Path, what: str, says: str):
    argv = ["--data.name", "user_data:by_rank", "--data.args.what", what, "--model.name", "user_data:Any"]
    argv += ["--train.device", "cpu", "--train.epochs", "1", "--run.dir", str(tmp_path / "run")]
    (ended,) = zygote.run(Run(argv, ranks=2))
    assert ended.codes == [2, 2], ended
    for err in ended.err:
        (line,) = err.splitlines()
        assert line.startswith(f"dist_train: data.name: {says}") and len(line) < 400
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("what", ["none", "none in files", "not repeated"])
@pytest.mark.filterwarnings("ignore:data.name")
def test_ranks_with_the_same_data(zygote: Zygote, tmp_path: Path, what: str):
    argv = ["--data.name", "user_data:by_rank", "--data.args.what", what, "--model.name", "user_data:Any"]
    argv += ["--train.device", "cpu", "--train.max_steps", "2", "--run.dir", str(tmp_path / "run")]
    zygote.run(Run(argv, ranks=2))[0].check()


def agreed(what: str) -> str | None:
    """In a rank, for a tool: what is said."""
    from dist_train.errors import ConfigError
    from dist_train.tools.trajectory import trajectory

    rank = torch.distributed.get_rank()
    argv = ["--data.name", "user_data:by_rank", "--data.args.what", what, "--data.args.rank", str(rank)]
    argv += ["--model.name", "user_data:Any", "--train.max_steps", "1", "--track.every_steps", "1"]
    try:
        trajectory(load([*argv, "--train.device", "cpu", "--backend.name", "ddp"]), World(rank, 2, rank, 2, CPU, "x"))
    except ConfigError as error:
        return str(error)
    return None


def test_a_tool_that_joins_ranks():
    first, second = run_ranks(agreed, 2, "count")
    assert first == second and first.startswith("data.name: rank 1 has 1,400 training samples, rank 0 1,438")


def told(split: Columns | FromFiles) -> Told:
    data = Data(split, split, (1, 8), tuple("abcd"))
    feed = Feed(split, data, CPU, torch.float32, False, False)
    return Told((1, 8), tuple("abcd"), ((0.0,), (1.0,)), {name: sketch(feed, 3) for name in ("training", "test")})


def test_processors_of_other_kinds_may_round_otherwise():
    images = torch.rand(40, 1, 8, generator=torch.Generator().manual_seed(0))
    exact, near, far = (told(FromFiles(user_data.Rows(images + shift))) for shift in (0, 1e-5, 1e-2))
    assert difference([exact, near]) is None
    assert "rank 2 has another training sample 0 than rank 0" in difference([exact, near, far])
    images = (images * 200).to(torch.uint8)
    exact, near, far = (told(FromFiles(user_data.Rows(images + shift))) for shift in (0, 1, 5))
    assert difference([exact, near]) is None and difference([exact, far]) is not None
    memory = [told(InMemory(images + shift, torch.arange(40) % 4)) for shift in (0, 1)]  # of these none may
    assert difference(memory) is not None


def test_few_files_are_read():
    rows = user_data.Rows(torch.zeros(1000, 1, 8))
    before = told(FromFiles(rows)) and rows.reads
    sketch(
        Feed(FromFiles(rows), Data(*2 * [FromFiles(rows)], (1, 8), tuple("abcd")), CPU, torch.float32, False, False), 3
    )
    assert rows.reads - before == 3 + 3


def test_a_process_alone_compares_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("dist_train.data.agree.sketch", None)
    agree(user_data.by_rank("", False, rank=0), (), World(0, 1, 0, 1, CPU, "none"))


def test_every_row_that_is_looked_at_counts():
    images, labels = torch.zeros(100, 1, 8, dtype=torch.uint8), torch.arange(100) % 4
    first = told(InMemory(images, labels))
    for number in (0, 99):
        changed = images.clone()
        changed[number, 0, 3] = 1
        assert f"training sample {number} " in difference([first, told(InMemory(changed, labels))])
    for number in range(100):
        changed = labels.clone()
        changed[number] = (changed[number] + 1) % 4
        assert "labels" in difference([first, told(InMemory(images, changed))])
    assert np.all(np.diff(sorted(first.splits["test"].some)) <= 4)
