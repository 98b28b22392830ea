"""Audits: a rank that computes wrongly is named, and one that does not is not."""

import json
import re
from pathlib import Path

import pytest
import torch

from dist_train.config.load import load
from dist_train.errors import ConfigError
from dist_train.loop.digests import Sheet, digest
from dist_train.loop.verdicts import of_copies, of_shares
from dist_train.ranks.launcher import Launcher
from dist_train.run.check import check

from checkpoint_runs import same, steps, weights
from zygote import Ended, Run, Zygote

# 6 steps an epoch, of which the last has 2 samples: some of 3 ranks have none.
ARGV = (
    *("--data.name", "synthetic", "--data.args", "{n: 42, n_test: 9, shape: [1, 6, 6], classes: 5}"),
    *("--model.hidden", "[9, 7]", "--train.global_batch_size", "8", "--train.epochs", "2"),
    *("--train.device", "cpu", "--train.threads", "1", "--track.every_steps", "1"),
)
AUDIT = ("--train.audit_every_steps", "2")
WHERE = r"\(host .+?, cpu \(1 threads\)\)"


def started(folder: Path, backend: str, ranks: int, *argv: str, plant=None, every: bool = False) -> Run:
    """A run whose rank 1 is planted something, or every one."""
    where = range(ranks) if every else [min(1, ranks - 1)]
    planted = dict.fromkeys(where, plant) if plant else None
    return Run([*ARGV, *argv, "--backend.name", backend, "--run.dir", str(folder)], ranks, planted)


def found(ended: Ended) -> str:
    """What the run was ended by: said once, by rank 0."""
    assert set(ended.codes) == {1}, ended
    (line,) = [line for errors in ended.err for line in errors.splitlines() if "audit of step" in line]
    assert line.startswith("dist_train: audit of step 4: ")
    return line.removeprefix("dist_train: audit of step 4: ")


ONCE, ALWAYS, WEIGHT = ("flips_gradient", 4), ("flips_gradient", 3, True), ("flips_weight", 4)
TWO_AGREE = rf"the gradient that rank 1 {WHERE} computed is wrong, as rank 2 and rank 0 agree on another: "
TWO_DIFFER = rf"rank 0 {WHERE} and rank 1 {WHERE}"


@pytest.mark.parametrize(
    ("backend", "ranks", "plant", "line"),
    [
        ("ddp", 3, ONCE, TWO_AGREE + r"1 of 6 tensors, layers\.\d\.weight\. "),
        ("ddp", 3, ALWAYS, TWO_AGREE + r"3 of 6 tensors, layers"),
        ("ddp", 3, WEIGHT, rf"the weights of rank 1 {WHERE} differ from those of most ranks: 1 of 6 tensors, layers\."),
        ("fsdp2", 3, ONCE, TWO_AGREE + r"1 of 6 tensors, layers\.\d\.weight\. "),
        ("fsdp2", 3, ALWAYS, TWO_AGREE + r"3 of 6 tensors, layers"),
        ("accelerate", 3, ALWAYS, TWO_AGREE + r"3 of 6 tensors, layers"),
        ("deepspeed", 3, ONCE, TWO_AGREE + r"1 of 6 tensors, layers\.\d\.weight\. "),
        ("deepspeed", 3, ALWAYS, TWO_AGREE + r"3 of 6 tensors, layers"),
        ("deepspeed", 3, WEIGHT, rf"the weights of rank 1 {WHERE} differ from those of most ranks: 1 of 6 tensors, "),
        # Two ranks: what does not repeat, its rank itself computes otherwise the second time.
        ("ddp", 2, ONCE, rf"the gradient that rank 1 {WHERE} computed is wrong, as rank 0 and rank 1 itself, when it"),
        ("ddp", 2, ALWAYS, rf"the gradient that {TWO_DIFFER} computed differs: one of them is wrong"),
        ("ddp", 2, WEIGHT, rf"the weights of {TWO_DIFFER} differ, and no copy is that of most: 1 of 6 tensors"),
        ("single", 1, ONCE, rf"the gradient that rank 0 {WHERE} computed was another when it was computed again: 1 of"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 12 else "",
)
def test_a_flipped_bit_is_named(
    backend: str, ranks: int, plant: tuple, line: str, zygote: Zygote, tmp_path: Path
):  # fmt: skip
    (ended,) = zygote.run(started(tmp_path / "run", backend, ranks, *AUDIT, plant=plant))
    assert re.match(line, found(ended)), found(ended)


@pytest.mark.parametrize("plant", [("compares_with_itself", 4), ("audits_itself", 3)], ids=lambda plant: plant[0])
def test_an_audit_of_itself_would_name_nobody(plant: tuple, zygote: Zygote, tmp_path: Path):
    """So the test above can fail: each rank has the planted audit, rank 1 the flipped bit as well."""
    run = started(tmp_path / "run", "ddp", 3, *AUDIT, plant=(plant[0],), every=True)
    run.plant[1] = plant
    (ended,) = zygote.run(run)
    with pytest.raises(AssertionError):
        found(ended)
    assert "audited 6 steps: something was found in none" in ended.check().out[0]


def events(folder: Path) -> list[dict]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line.get("event") == "audit"]


def test_a_warning_goes_on(zygote: Zygote, tmp_path: Path):
    warns = ("--train.audit_action", "warn")
    (ended,) = zygote.run(started(tmp_path / "run", "ddp", 3, *AUDIT, *warns, plant=("flips_gradient", 7, True)))
    said = [line for line in ended.check().out[0].splitlines() if "audit" in line]
    assert [re.search(r"warning: audit of step (\d+): the gradient that rank 1 ", line)[1] for line in said[:-1]] == [
        "8", "10", "12",
    ]  # fmt: skip
    assert said[-1].endswith("audited 6 steps: something was found in 3")
    assert [(line["audit/step"], line["audit/ranks"]) for line in events(tmp_path / "run")] == [
        (8, [1.0]), (10, [1.0]), (12, [1.0]),
    ]  # fmt: skip


def test_the_run_goes_on_from_before_the_fault(zygote: Zygote, tmp_path: Path):
    """Checkpoints from after the last audit that found nothing are set aside; the one from before it is kept, though
    two newer ones have come."""
    every = ("--train.audit_every_steps", "5", "--checkpoint.every_steps", "1", "--checkpoint.keep_last", "2")
    clean, (ended,) = tmp_path / "clean", zygote.run(
        started(tmp_path / "run", "ddp", 3, *every, plant=("flips_gradient", 10))
    )  # fmt: skip
    assert set(ended.codes) == {1} and "audit of step 10: the gradient that rank 1 " in ended.err[0]
    aside = "Set aside, as saved after step 5, the last that was found right: "
    assert f"{aside}suspect-step-00000008, suspect-step-00000009. Started again" in ended.err[0]
    assert ended.err[0].strip().endswith("checkpoints/step-00000005") and steps(tmp_path / "run") == [5]
    zygote.run(started(tmp_path / "run", "ddp", 3, *every), started(clean, "ddp", 3, *every))[0].check()
    assert same(weights(tmp_path / "run"), weights(clean))


CASES = {
    "micro-batches": ("--train.micro_batch_size", "1", "--train.grad_clip", "0.1", "--optim.ema", "0.9"),
    "dropout": ("--model.dropout", "0.3"),
    "ordered": ("--backend.reduce", "ordered", "--train.micro_batch_size", "2"),
    "statistics": ("--model.name", "audited:Normed"),
    "of groups": ("--model.name", "audited:Normed", "--model.batch_statistics.group", "2"),
    "odd weights": ("--model.name", "user_ordered:Uneven", "--model.dropout", "null"),
    "own units": ("--data.name", "user_tasks:sentences", "--data.args", "{}", "--task.name", "user_tasks:NextWord")
    + ("--model.name", "user_tasks:Words", "--model.hidden", "null"),
    "noise": ("--data.batch_transforms", "[{name: MixUp, alpha: 0.3}]"),
    "bfloat16": ("--train.precision", "bfloat16"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("backend", "ranks"), [("ddp", 3), ("fsdp2", 2)])
def test_an_audit_finds_nothing_and_leaves_no_trace(
    case: str, backend: str, ranks: int, zygote: Zygote, tmp_path: Path
):  # fmt: skip
    """The same bits as without it."""
    argv = ("--optim.lr", "0.01", *CASES[case])
    runs = [started(tmp_path / f"{i}", backend, ranks, *argv, *more) for i, more in enumerate([(), AUDIT])]
    plain, audited = zygote.run(*runs)
    plain.check()
    assert re.search(r"audited \d+ steps: something was found in none", audited.check().out[0])
    assert same(weights(tmp_path / "0"), weights(tmp_path / "1"))
