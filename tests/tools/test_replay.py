"""Steps of a run that are taken again: on any backend they are what was recorded, and show what they were made of."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dist_train.config.load import dump, load
from dist_train.config.tree import BackendConfig
from dist_train.data.order import global_indices
from dist_train.run import assemble

from zygote import Ended, Run, Zygote

CPU = torch.device("cpu")
# 6 steps an epoch, the last of them with 6 samples of 8. A line every second step, checkpoints after steps 4 and 8.
ARGV = (
    *("--data.name", "synthetic", "--data.args", "{n: 46, n_test: 9, shape: [1, 4, 4], classes: 4}"),
    *("--model.hidden", "[9]", "--train.global_batch_size", "8", "--train.epochs", "2", "--train.device", "cpu"),
    *("--track.every_steps", "2", "--checkpoint.every_steps", "4", "--checkpoint.keep_last", "9"),
)
ELSEWHERE = [("ddp", 2), ("fsdp2", 3), ("accelerate", 2)]
FULL = [("deepspeed", 2, stage) for stage in range(4)]


@pytest.fixture(scope="module")
def recorded(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run in one process."""
    folder = tmp_path_factory.mktemp("replay") / "run"
    zygote.run(Run([*ARGV, "--run.dir", str(folder)]))[0].check()
    return folder


def replayed(zygote: Zygote, run: Path, out: Path, *argv: str, ranks: int = 1, **keys) -> tuple[dict, Ended]:
    """What a replay kept, and how it ended."""
    ended = zygote.run(Run(["replay", "--run.dir", str(run), "--json", str(out), *argv], ranks, **keys))[0]
    return (json.loads(out.read_text()) if out.exists() else {}), ended


def by_hand(run: Path, step: int) -> tuple[dict[int, float], dict[str, float]]:
    """The loss of each sample of a step, and the gradient norm of each parameter, without the loop."""
    from dist_train.checkpoint.manifest import listed
    from dist_train.checkpoint.resume import read_weights

    parts = assemble.build(load(["--config", str(run / "config.yaml")]), CPU)
    found = {what.step: folder for folder, what in listed(run)[0]}
    read_weights(found[step - 1], parts.model.state_dict())
    epoch, first = divmod(step - 1, 6)
    samples = global_indices(46, 0, epoch, first, 8)
    images, labels = parts.feed.of(samples)
    losses = F.cross_entropy(parts.model(images), labels, reduction="none")
    losses.mean().backward()
    norms = {name: float(p.grad.norm()) for name, p in parts.model.named_parameters()}
    return dict(zip(samples.tolist(), losses.tolist(), strict=True)), norms


def test_a_step_is_what_the_run_recorded_and_shows_what_it_was_made_of(recorded: Path, zygote: Zygote, tmp_path: Path):
    before = {path: path.stat().st_mtime_ns for path in recorded.rglob("*") if path.is_file()}
    found, ended = replayed(zygote, recorded, tmp_path / "r.json", "--step", "9", "--samples", "3")
    ended.check()
    assert found["from_step"] == 8
    assert [(one["step"], one["metric"], one["relative"]) for one in found["compared"]] == [
        (10, "train/loss", 0.0),
        (10, "train/grad_norm", 0.0),
    ]
    (step,) = found["steps"]
    losses, norms = by_hand(recorded, 9)
    assert {one["index"]: one["loss"] for one in step["samples"]} == pytest.approx(losses, rel=1e-6)
    assert [one["loss"] for one in step["samples"]] == sorted(losses.values(), reverse=True)
    assert step["layers"] == pytest.approx(norms, rel=1e-5)
    assert step["loss"] == pytest.approx(sum(losses.values()) / 8) and step["units"] == 8
    assert step["grad_norm"] == pytest.approx(math.hypot(*norms.values()))
    assert "step 9: loss" in ended.out[0] and "and 5 others" in ended.out[0] and "as recorded" in ended.out[0]
    assert ["png" in one for one in step["samples"]] == [True] * 3 + [False] * 5
    assert before == {path: path.stat().st_mtime_ns for path in recorded.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("backend", "ranks"), ELSEWHERE)
def test_elsewhere_it_is_the_same(recorded: Path, zygote: Zygote, tmp_path: Path, backend: str, ranks: int):
    argv = ["--step", "5", "--steps", "2", "--backend.name", backend, "--train.micro_batch_size", "2"]
    _same(*replayed(zygote, recorded, tmp_path / "r.json", *argv, ranks=ranks))


def test_a_run_of_many_ranks_is_taken_by_one_that_is_started_alone(recorded: Path, zygote: Zygote, tmp_path: Path):
    """A laptop after a cluster. A backend that the command line names is refused as ever."""
    run = tmp_path / "run"
    shutil.copytree(recorded, run)
    config = load(["--config", str(run / "config.yaml")])
    sharded = dataclasses.replace(config, backend=BackendConfig("deepspeed", zero_stage=3))
    (run / "config.yaml").write_text(dump(sharded))
    found, ended = replayed(zygote, run, tmp_path / "r.json", "--step", "9")
    ended.check()
    assert {one["relative"] for one in found["compared"]} == {0.0}
    assert "replay: backend single, as it was started alone; the run had deepspeed" in ended.out[0] + ended.err[0]
    evaluated, refused = zygote.run(
        Run(["eval", "--run.dir", str(run)]), Run(["eval", "--run.dir", str(run), "--backend.name", "ddp"])
    )
    evaluated.check()
    assert refused.codes == [2] and "got ddp in a process that was started alone" in refused.out[0] + refused.err[0]


@pytest.mark.full
@pytest.mark.parametrize(("backend", "ranks", "stage"), FULL)
def test_under_deepspeed_it_is_the_same(
    recorded: Path, zygote: Zygote, tmp_path: Path, backend: str, ranks: int, stage: int
):
    argv = ["--step", "5", "--steps", "2", "--backend.name", backend, "--backend.zero_stage", str(stage)]
    _same(*replayed(zygote, recorded, tmp_path / "r.json", *argv, ranks=ranks))


def _same(found: dict, ended: Ended) -> None:
    ended.check()
    assert [one["metric"] for one in found["compared"]] == ["train/loss", "train/grad_norm"]
    assert max(one["relative"] for one in found["compared"]) < 1e-5
    first, last = found["steps"]
    for step, epoch, of_epoch, count in ((first, 0, 4, 8), (last, 0, 5, 6)):
        samples = global_indices(46, 0, epoch, of_epoch, 8).tolist()
        assert sorted(one["index"] for one in step["samples"]) == sorted(samples) and len(samples) == count
        assert sum(one["loss"] for one in step["samples"]) / count == pytest.approx(step["loss"], rel=1e-5)
        assert math.hypot(*step["layers"].values()) == pytest.approx(step["grad_norm"], rel=1e-5)


@pytest.mark.parametrize(("backend", "ranks"), [("single", 1), ("ddp", 2)])
def test_with_dropout_and_batch_statistics_it_is_the_same(zygote: Zygote, tmp_path: Path, backend: str, ranks: int):
    run = [
        *ARGV,
        "--model.name",
        "user_replay:Normed",
        "--model.hidden",
        "null",
        "--optim.ema",
        "0.9",
        "--run.dir",
        str(tmp_path / "run"),
    ]
    zygote.run(Run(run))[0].check()
    argv = ["--step", "5", "--steps", "2", "--backend.name", backend]
    found, ended = replayed(zygote, tmp_path / "run", tmp_path / "r.json", *argv, ranks=ranks)
    _same(found, ended)
    assert ranks > 1 or max(one["relative"] for one in found["compared"]) == 0.0


def test_clipping_does_not_change_the_norms_by_layer(zygote: Zygote, tmp_path: Path):
    run = [*ARGV, "--train.grad_clip", "0.01", "--run.dir", str(tmp_path / "run")]
    zygote.run(Run(run))[0].check()
    found, ended = replayed(zygote, tmp_path / "run", tmp_path / "r.json", "--step", "9")
    ended.check()
    _, norms = by_hand(tmp_path / "run", 9)
    assert found["steps"][0]["layers"] == pytest.approx(norms, rel=1e-4)


def test_without_a_checkpoint_before_it_begins_at_the_start(recorded: Path, zygote: Zygote, tmp_path: Path):
    found, ended = replayed(zygote, recorded, tmp_path / "r.json", "--step", "3")
    ended.check()
    assert found["from_step"] == 0 and len(found["compared"]) == 4 and "from the start" in ended.out[0]


@pytest.mark.parametrize("ranks", [1, 2])
def test_another_epochs_order_is_noticed(recorded: Path, zygote: Zygote, tmp_path: Path, ranks: int):
    plant = dict.fromkeys(range(ranks), ("another_epochs_order",))
    found, ended = replayed(zygote, recorded, tmp_path / "r.json", "--step", "9", ranks=ranks, plant=plant)
    assert ended.codes == [1] * ranks, ended
    assert "differs from what was recorded at step 10: train/loss" in ended.out[0]
    assert any(one["differs"] for one in found["compared"])


def test_the_sample_that_made_a_spike_is_found_among_ten_thousand(zygote: Zygote, tmp_path: Path):
    argv = [
        *("--data.name", "user_replay:spiked", "--model.name", "user_replay:Line", "--task.name", "regression"),
        *("--train.global_batch_size", "100", "--train.epochs", "1", "--optim.name", "SGD", "--optim.lr", "0.01"),
        *("--train.device", "cpu", "--track.every_steps", "1", "--run.dir", str(tmp_path / "run")),
    ]
    zygote.run(Run(argv))[0].check()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    norms = {line["step"]: line["train/grad_norm"] for line in lines if "train/grad_norm" in line}
    spike = max(norms, key=norms.__getitem__)
    shutil.rmtree(tmp_path / "run" / "checkpoints", ignore_errors=True)
    found, ended = replayed(zygote, tmp_path / "run", tmp_path / "r.json", "--step", str(spike), ranks=2)
    ended.check()
    first, second = found["steps"][0]["samples"][:2]
    assert first["index"] == 7654 and first["loss"] > 1000 * second["loss"]
    assert "row 7654 of the table" in first["what"] and "row 7654 of the table" in ended.out[0]


def test_a_loss_of_tokens_is_shown_by_sample(zygote: Zygote, tmp_path: Path):
    argv = [
        *("--data.name", "user_replay:ragged", "--model.name", "user_replay:Words", "--task.name", "user_replay:Next"),
        *("--train.global_batch_size", "6", "--train.epochs", "1", "--train.device", "cpu"),
        *("--track.every_steps", "1", "--run.dir", str(tmp_path / "run")),
    ]
    zygote.run(Run(argv))[0].check()
    found, ended = replayed(zygote, tmp_path / "run", tmp_path / "r.json", "--step", "2", ranks=2)
    ended.check()
    (step,) = found["steps"]
    units = {i: 1 + i % 5 for i in range(30)}
    whole = sum(one["loss"] * units[one["index"]] for one in step["samples"])
    assert step["units"] == sum(units[one["index"]] for one in step["samples"])
    assert whole / step["units"] == pytest.approx(step["loss"], rel=1e-5) and not step["unknown"]


def test_of_a_loss_that_compares_samples_the_samples_are_shown_alone(zygote: Zygote, tmp_path: Path):
    argv = [*ARGV, "--task.name", "user_replay:Compared", "--run.dir", str(tmp_path / "run")]
    zygote.run(Run(argv))[0].check()
    found, ended = replayed(zygote, tmp_path / "run", tmp_path / "r.json", "--step", "9")
    ended.check()
    (step,) = found["steps"]
    assert {one["loss"] for one in step["samples"]} == {None} and len(step["samples"]) == 8
    assert "no loss of each sample, as its loss compares samples with each other" in ended.out[0]


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ([], "--step: got nothing"),
        (["--step", "0"], "--step: got '0'"),
        (["--step", "13"], "--step: got 13, expected at most 12, which the run has"),
        (["--step", "3", "--tolerance", "much"], "--tolerance: got much"),
        (["--step", "9", "--train.global_batch_size", "4"], "train.global_batch_size: got 4, expected 8"),
    ],
)
def test_mistakes(recorded: Path, zygote: Zygote, tmp_path: Path, argv: list[str], line: str):
    found, ended = replayed(zygote, recorded, tmp_path / "r.json", *argv)
    assert ended.codes == [2] and ended.err[0].startswith(f"dist_train: {line}"), ended
    assert not found


def test_a_folder_that_is_no_runs(zygote: Zygote, tmp_path: Path):
    _, ended = replayed(zygote, tmp_path / "nothing", tmp_path / "r.json", "--step", "3")
    assert ended.codes == [2] and "expected the folder of a run" in ended.err[0]


def test_the_report_shows_it(recorded: Path, zygote: Zygote, tmp_path: Path):
    run = Path(shutil.copytree(recorded, tmp_path / "run"))
    kept = run / "replay" / "step-00000009.json"
    zygote.run(Run(["replay", "--run.dir", str(run), "--step", "9"]))[0].check()
    zygote.run(Run(["report", str(run)]))[0].check()
    page = (run / "report.html").read_text()
    tree = json.loads(kept.read_text())
    assert "Step 9, taken again" in page and f"#{tree['steps'][0]['samples'][0]['index']}" in page
    assert tree["steps"][0]["samples"][0]["png"] in page and "layers.1.weight" in page
    kept.write_text('{"steps": [{"step": 9}], "compared": []}')
    zygote.run(Run(["report", str(run)]))[0].check()
    page = (run / "report.html").read_text()
    assert "replay/step-00000009.json cannot be read" in page and "taken again" not in page
