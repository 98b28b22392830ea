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
    *("--train.global_batch_size", "8", "--train.epochs", "2"),
    *("--train.device", "cpu", "--train.threads", "1", "--track.every_steps", "1"),
)
MLP = ("--model.hidden", "[9, 7]")
AUDIT = ("--train.audit_every_steps", "2")
WHERE = r"\(host .+?, cpu \(1 threads\)\)"


def started(folder: Path, backend: str, ranks: int, *argv: str, plant=None, every: bool = False, **keys) -> Run:
    """A run whose rank 1 is planted something, or every one."""
    where = range(ranks) if every else [min(1, ranks - 1)]
    planted = dict.fromkeys(where, plant) if plant else None
    name, _, stage = backend.partition(":")
    argv = (*argv, "--backend.name", name, "--backend.zero_stage", stage or "null")
    return Run([*ARGV, *argv, "--run.dir", str(folder)], ranks, planted, **keys)


def found(ended: Ended) -> str:
    """What the run was ended by: said once, by rank 0."""
    assert set(ended.codes) == {1}, ended
    (line,) = [line for errors in ended.err for line in errors.splitlines() if "audit of step" in line]
    assert line.startswith("dist_train: audit of step 4: ")
    return line.removeprefix("dist_train: audit of step 4: ")


ONCE, ALWAYS, WEIGHT = ("flips_gradient", 4), ("flips_gradient", 3, True), ("flips_weight", 4)
TWO_AGREE = rf"the gradient that rank 1 {WHERE} computed is wrong, as rank \d and rank \d agree on another: "
TWO_DIFFER = rf"rank 0 {WHERE} and rank 1 {WHERE}"


OF_MOST = rf"the weights of rank 1 {WHERE} differ from those of most ranks: 1 of 6 tensors, layers\.1\.weight"
NAMED = {
    "ddp, once": ("ddp", 3, ONCE, TWO_AGREE + r"1 of 6 tensors, layers\.\d\.weight\. "),
    "ddp, always": ("ddp", 3, ALWAYS, TWO_AGREE + r"3 of 6 tensors, layers"),
    "ddp, weight": ("ddp", 3, WEIGHT, OF_MOST),
    "fsdp2, once": ("fsdp2", 3, ONCE, TWO_AGREE + r"1 of 6 tensors, layers\.\d\.weight\. "),
    "fsdp2, always": ("fsdp2", 3, ALWAYS, TWO_AGREE + r"3 of 6 tensors, layers"),
    # Two ranks: what does not repeat, its rank itself computes otherwise the second time.
    "two, once": ("ddp", 2, ONCE, rf"the gradient that rank 1 {WHERE} computed is wrong, as rank 0 and rank 1 itself"),
    "two, always": ("ddp", 2, ALWAYS, rf"the gradient that {TWO_DIFFER} computed differs: one of them is wrong, and"),
    "two, weight": ("ddp", 2, WEIGHT, rf"the weights of {TWO_DIFFER} differ, and no copy is that of most: 1 of 6"),
    "one, once": ("single", 1, ONCE, rf"the gradient that rank 0 {WHERE} computed was another when it was computed"),
}
OTHERS = {
    f"{backend}, {kind}": (backend, *NAMED[f"ddp, {kind}"][1:])
    for backend in ("accelerate", *(f"deepspeed:{stage}" for stage in range(4)))
    for kind in ("once", "always", "weight")
    if (backend, kind) != ("deepspeed:3", "weight")  # of which no rank has another's
}


@pytest.mark.parametrize("case", [*NAMED, *(pytest.param(name, marks=pytest.mark.full) for name in OTHERS)])
def test_a_flipped_bit_is_named(case: str, zygote: Zygote, tmp_path: Path):
    backend, ranks, plant, line = (NAMED | OTHERS)[case]
    run = started(tmp_path / "run", backend, ranks, *MLP, *AUDIT, plant=plant, timeout_s=200.0)
    (ended,) = zygote.run(run)
    assert re.match(line, found(ended)), found(ended)


@pytest.mark.parametrize("plant", [("compares_with_itself", 4), ("audits_itself", 3)], ids=lambda plant: plant[0])
def test_an_audit_of_itself_would_name_nobody(plant: tuple, zygote: Zygote, tmp_path: Path):
    """So the test above can fail: each rank has the planted audit, rank 1 the flipped bit as well."""
    run = started(tmp_path / "run", "ddp", 3, *MLP, *AUDIT, plant=(plant[0],), every=True)
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
    (ended,) = zygote.run(started(tmp_path / "run", "ddp", 3, *MLP, *AUDIT, *warns, plant=("flips_gradient", 7, True)))
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
    every = (*MLP, "--train.audit_every_steps", "5", "--checkpoint.every_steps", "1", "--checkpoint.keep_last", "2")
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
    "statistics": ("--model.name", "user_audit:Normed", "--train.grad_clip", "0.1", "--optim.ema", "0.9"),
    "of groups": ("--model.name", "user_audit:Normed", "--model.batch_statistics.group", "2")
    + ("--train.micro_batch_size", "2", "--train.precision", "bfloat16"),
    "ordered": (*MLP, "--backend.reduce", "ordered", "--train.micro_batch_size", "2", "--model.dropout", "0.3"),
    "odd weights": ("--model.name", "user_ordered:Uneven", "--train.micro_batch_size", "1"),
    "own units": ("--data.name", "user_tasks:sentences", "--data.args", "{}", "--task.name", "user_tasks:NextWord")
    + ("--model.name", "user_tasks:Words", "--train.micro_batch_size", "2"),
    "mixed samples": (*MLP, "--data.batch_transforms", "[{name: MixUp, alpha: 0.3}]"),
    "skips": (*MLP, "--train.nonfinite", "skip", "--train.precision", "float16", "--model.dropout", "0.3"),
}
EVERY_DAY = {("ddp", "statistics"), ("ddp", "of groups"), ("ddp", "own units"), ("ddp", "ordered")}
EVERY_DAY |= {("fsdp2", "statistics"), ("fsdp2", "ordered"), ("fsdp2", "odd weights")}


@pytest.mark.parametrize(
    ("backend", "case"),
    [
        pytest.param(backend, case, marks=() if (backend, case) in EVERY_DAY else pytest.mark.full)
        for backend in ("ddp", "fsdp2", "accelerate", *(f"deepspeed:{stage}" for stage in range(4)))
        for case in CASES
        if backend in ("ddp", "fsdp2") or case != "ordered"
        if "deepspeed" not in backend or case != "skips"
    ],
)
def test_an_audit_finds_nothing_and_leaves_no_trace(backend: str, case: str, zygote: Zygote, tmp_path: Path):
    """The same bits as without it."""
    argv = ("--optim.lr", "0.01", *CASES[case])
    ranks, keys = 2 if backend == "fsdp2" else 3, {"timeout_s": 200.0}
    runs = [started(tmp_path / f"{i}", backend, ranks, *argv, *more, **keys) for i, more in enumerate([(), AUDIT])]
    plain, audited = zygote.run(*runs)
    plain.check()
    assert re.search(r"audited \d+ steps: something was found in none", audited.check().out[0])
    assert same(weights(tmp_path / "0"), weights(tmp_path / "1"))


@pytest.mark.full
@pytest.mark.parametrize(("backend", "ranks"), [("single", 1), ("ddp", 2), ("accelerate", 2), ("fsdp2", 2)])
def test_10_000_audits_are_no_false_alarm(backend: str, ranks: int, zygote: Zygote, tmp_path: Path):
    """Of 10,000 steps, with batch statistics and dropout."""
    long = ("--train.audit_every_steps", "1", "--train.epochs", "10000", "--train.max_steps", "10000")
    quiet = ("--train.eval_every_epochs", "null", "--track.every_steps", "1000")
    model = CASES["statistics"]
    (ended,) = zygote.run(started(tmp_path / "run", backend, ranks, *model, *long, *quiet, timeout_s=7200.0))
    assert "audited 10000 steps: something was found in none" in ended.check().out[0]


def test_ranks_on_unlike_machines_are_refused(zygote: Zygote, tmp_path: Path):
    (ended,) = zygote.run(started(tmp_path / "run", "ddp", 2, *MLP, *AUDIT, plant=("other_processor",)))
    assert set(ended.codes) == {2}
    assert "but rank 0 has " in ended.err[0] and "and rank 1 has Another CPU (DEFAULT), 1 thread" in ended.err[0]


@pytest.mark.parametrize(
    ("argv", "ranks", "line"),
    [
        (["--train.audit_every_steps", "0"], 1, "train.audit_every_steps: got 0, expected at least 1"),
        (["--compile.scope", "step"], 1, "train.audit_every_steps: got 2 with compile.scope step"),
        (["--task.name", "none"], 1, "train.audit_every_steps: got 2 with task.name none"),
    ],
)
def test_refused(argv: list[str], ranks: int, line: str):
    launcher = Launcher("torchrun" if ranks > 1 else "none", 0, ranks, 0, ranks)
    with pytest.raises(ConfigError) as caught:
        check(load([*ARGV, *AUDIT, *argv]), launcher, writes=False)
    assert caught.value.lines[0].startswith(line), caught.value.lines


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (("--model.name", "draw_cells:Noisy"), "got 2, but the model draws by "),
        ((*MLP, "--model.dropout", "0.1", "--train.draws", "torch"), "got 2, but the model draws by "),
        ((*MLP, "--task.name", "user_tasks:Contrastive"), "got 2 with a task whose loss compares the samples of all"),
    ],
    ids=["noise", "torch's draws", "contrastive"],
)
def test_what_no_other_rank_can_repeat_is_refused(argv: tuple[str, ...], why: str, zygote: Zygote, tmp_path: Path):
    (ended,) = zygote.run(started(tmp_path / "run", "single", 1, *AUDIT, *argv))
    assert ended.codes == [2] and f"train.audit_every_steps: {why}" in ended.err[0], ended


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_digest_sees_every_bit(dtype: torch.dtype):
    """Of sizes that are no whole words, wherever the tensor begins, and however it lies in memory."""
    for shape in ((), (1,), (3,), (4, 5), (2, 3, 3)):
        size = torch.Size(shape).numel()
        for start in (0, 1, 2):
            memory = (torch.arange(size + start) % 2).to(dtype)
            tensor = memory[start:].view(shape)
            before = int(digest(tensor))
            assert before == int(digest(tensor.clone()))
            raw, seen = tensor.clone(), set()
            flat = (torch.view_as_real(raw) if dtype.is_complex else raw).view(-1).view(torch.uint8)
            for i in range(len(flat)):
                for bit in range(1 if dtype == torch.bool else 8):
                    flat[i] ^= 1 << bit
                    seen.add(int(digest(raw)) - before)
                    flat[i] ^= 1 << bit
            assert 0 not in seen and int(digest(raw)) == before
    lying = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    assert int(digest(lying)) == int(digest(lying.contiguous()))
    nan = torch.tensor([float("nan")])
    assert int(digest(nan)) == int(digest(nan.clone())) and int(digest(torch.empty(0))) == 0


def test_a_sheet_goes_by_name():
    a, b, cpu = torch.randn(5), torch.randn(5), torch.device("cpu")
    one, other, swapped = Sheet({"a": a, "b": b}), Sheet({"b": b, "a": a}), Sheet({"a": b, "b": a})
    totals = [int(sheet.total(cpu)) for sheet in (one, other, swapped)]
    of_a, of_b = int(digest(a)), int(digest(b))
    assert totals[0] == totals[1] != totals[2] and one.rows() == other.rows() == {"a": of_a, "b": of_b}
    one.add("a", b)
    assert (one.rows()["a"] - of_a - of_b) % 2**64 == 0


def test_who_is_wrong():
    places, right, bad, worse = [f"host {i}" for i in range(5)], {"w": 1, "b": 2}, {"w": 3, "b": 2}, {"w": 4, "b": 2}

    def named(rows: list[dict], ranks: tuple[int, int, int] = (1, 2, 3)) -> tuple[int, ...]:
        (finding,) = of_shares(places, {ranks: rows})
        assert finding.line.endswith(": 1 of 2 tensors, w")
        return finding.ranks

    assert named([bad, right, right]) == (1,) and named([right, bad, right]) == (2,)
    assert named([bad, right, worse]) == (1, 2, 3)
    assert named([bad, right, right], (1, 0, 1)) == (1,)  # of two ranks
    assert named([bad, right, bad], (1, 0, 1)) == (0, 1)
    assert named([bad, right, right], (0, 0, 0)) == (0,)
    # One that is always wrong is named once, though it found its neighbour's share to be wrong as well.
    both = {(1, 2, 0): [bad, right, right], (0, 1, 2): [right, worse, right]}
    assert [finding.ranks for finding in of_shares(places, both)] == [(1,)]
    copies = [right, bad, right, right, worse]
    told = dict(enumerate(zip([0, 1, 0, 0, 2], copies, strict=True)))
    assert [finding.ranks for finding in of_copies(places, told)] == [
        (1,),
        (4,),
    ]
    assert [finding.ranks for finding in of_copies(places, {3: (0, copies[0]), 4: (1, bad)})] == [(3, 4)]
