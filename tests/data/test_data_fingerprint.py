"""The hash over the data, by which a run knows that it resumes with the same: made while training goes on."""

import json
from pathlib import Path

import pytest
import torch

from dist_train.data.sets import Data, InMemory

from zygote import Run, Zygote

ARGV = ["--data.name", "user_data:by_rank", "--model.name", "user_data:Any", "--train.device", "cpu"]
ARGV += ["--train.epochs", "1", "--checkpoint.every_steps", "10"]


def saved(run: Path) -> list[dict]:
    """What the checkpoints of a run say of its data."""
    return [json.loads(path.read_text())["data"] for path in sorted(run.glob("checkpoints/*/manifest.json"))]


@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_the_first_step_does_not_wait_for_the_hash(zygote: Zygote, tmp_path: Path, asynchronous: str):
    argv = [*ARGV, "--checkpoint.asynchronous", asynchronous]
    plain, late = tmp_path / "plain", tmp_path / "late"
    plant = {0: ("fingerprint_during", 9), 1: ("fingerprint_during", None)}
    for ended in zygote.run(Run([*argv, "--run.dir", str(plain)], 2), Run([*argv, "--run.dir", str(late)], 2, plant)):
        ended.check()
    first, *others = saved(plain) + saved(late)
    assert len(others) == 3 and all(other == first for other in others)
    assert first["train"] == 1438 and first["test"] == 6 and len(first["fingerprint"]) == 64


@pytest.mark.parametrize("what", ["pixels", "labels"])
def test_a_run_does_not_resume_with_other_data(zygote: Zygote, tmp_path: Path, what: str):
    zygote.run(Run([*ARGV, "--run.dir", str(tmp_path / "run"), "--train.max_steps", "12"]))[0].check()
    more = [*ARGV, "--run.dir", str(tmp_path / "more"), "--checkpoint.resume", str(tmp_path / "run")]
    more += ["--train.max_steps", "20"]
    (ended,) = zygote.run(Run([*more, "--data.args.what", what, "--data.args.rank", "1"]))
    assert ended.codes == [2] and ended.err[0].startswith("dist_train: data: got "), ended
    zygote.run(Run(more))[0].check()


def test_rows_that_do_not_lie_in_a_row_have_the_same_hash():
    images = torch.randint(255, (3000, 2, 4), dtype=torch.uint8)
    labels = torch.arange(3000) % 4
    turned = images.transpose(1, 2).contiguous().transpose(1, 2)
    assert not turned.is_contiguous()
    one, other = (Data(InMemory(x, labels), InMemory(x, labels), (2, 4), tuple("abcd")) for x in (images, turned))
    assert one.fingerprint() == other.fingerprint()
    images[1500, 1, 3] += 1
    assert one.fingerprint() != other.fingerprint()
