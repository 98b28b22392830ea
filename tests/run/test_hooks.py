"""Hooks and early stopping: when they are called, what they agree on, and their state across backends and ranks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_train.config.load import load
from dist_train.errors import ConfigError
from dist_train.ranks.launcher import Launcher
from dist_train.run.check import check

from zygote import Ended, Run, Zygote

# 15 steps, saved after each fourth and evaluated after each fifth.
ARGV = (
    *("--data.name", "synthetic", "--data.args", "{n: 60, n_test: 13, shape: [1, 4, 4], classes: 4}"),
    *("--model.hidden", "[9]", "--train.global_batch_size", "12", "--train.epochs", "3", "--train.device", "cpu"),
    *("--train.precision", "float64", "--checkpoint.every_steps", "4", "--track.every_steps", "1"),
)


def run(folder: Path, hooks: str, backend: str = "single", ranks: int = 1, *more: str, **keys: Any) -> Run:
    asked = ["--train.hooks", hooks] if hooks else []
    argv = [*ARGV, *asked, "--backend.name", backend, "--run.dir", str(folder), *more]
    return Run(argv, ranks, **keys)


def killed(step: int) -> dict[str, Any]:
    return {"plant": {0: ("at_phase", "data", step, "kill")}, "kill_all": True}


def ledger(folder: Path, rank: int = 0) -> dict[str, Any]:
    return json.loads((folder / f"ledger{rank}.json").read_text())


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def test_a_hook_is_called_in_order_on_every_rank(zygote: Zygote, tmp_path: Path):
    zygote.run(run(tmp_path, "[user_hooks:Ledger]", "ddp", 2))[0].check()
    for rank in range(2):
        told = ledger(tmp_path, rank)
        assert told["calls"][:2] == [["start", 0], ["after_step", 1]]
        assert told["calls"][-3:] == [["after_evaluation", 15], ["after_step", 15], ["end", 15]]
        assert told["steps"] == 15 and told["stopped"] is None and told["epoch"] == 3
        assert [step for name, step in told["calls"] if name == "after_evaluation"] == [5, 10, 15]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["train/seen"]) for line in lines if "train/seen" in line] == [(6, 6.0)]
    assert "ended_early" not in summary(tmp_path)


def test_a_hook_may_be_called_less_often_and_has_arguments(zygote: Zygote, tmp_path: Path):
    zygote.run(run(tmp_path, "[{name: user_hooks:Ledger, every_steps: 4}]"))[0].check()
    assert [step for name, step in ledger(tmp_path)["calls"] if name == "after_step"] == [4, 8, 12]


@pytest.fixture(scope="module")
def average(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The mean of the weights of a run in one process that nothing disturbed."""
    folder = tmp_path_factory.mktemp("average")
    zygote.run(run(folder, "[user_hooks:Average]"))[0].check()
    return torch.load(folder / "average.pt", weights_only=True)


def largest_difference(folder: Path, average: dict[str, torch.Tensor]) -> float:
    mine = torch.load(folder / "average.pt", weights_only=True)
    assert mine.keys() == average.keys()
    return max((mine[name] - average[name]).abs().max().item() for name in mine)


@pytest.mark.parametrize(
    ("before", "after"),
    [(("fsdp2", 3), ("ddp", 2)), (("ddp", 2), ("fsdp2", 2)), (("fsdp2", 2), ("single", 1))],
    ids=lambda place: f"{place[0]}{place[1]}",
)
def test_state_resumes_on_another_backend_and_world_size(
    zygote: Zygote, tmp_path: Path, average: dict[str, torch.Tensor], before: tuple[str, int], after: tuple[str, int]
):
    both = "[user_hooks:Average, user_hooks:Ledger]"
    zygote.run(run(tmp_path, both, *before, **killed(9)))
    zygote.run(run(tmp_path, both, *after))[0].check()
    assert largest_difference(tmp_path, average) < 1e-9
    told = ledger(tmp_path)
    assert told["calls"][:3] == [["start", 8], ["load", 8], ["after_step", 9]] and told["steps"] == 15


def test_state_that_is_lost_is_seen(zygote: Zygote, tmp_path: Path, average: dict[str, torch.Tensor]):
    zygote.run(run(tmp_path, "[user_hooks:Average]", "fsdp2", 2, **killed(9)))
    zygote.run(run(tmp_path, "[user_hooks:Forgetful]", "fsdp2", 2))[0].check()  # planted
    assert largest_difference(tmp_path, average) > 1e-4


def test_hooks_that_come_and_go_are_told_of(zygote: Zygote, tmp_path: Path):
    zygote.run(run(tmp_path, "[user_hooks:Average]", **killed(9)))
    (ended,) = zygote.run(run(tmp_path, "[user_hooks:Ledger]"))
    assert "hook Ledger starts anew: the checkpoint has no state of it" in ended.check().out[0]
    assert "the checkpoint's state of hook average is not used" in ended.out[0]


def test_ranks_agree_on_what_one_of_them_wants(zygote: Zygote, tmp_path: Path):
    (ended,) = zygote.run(run(tmp_path, "[{name: user_hooks:Stopping, step: 7}, user_hooks:Ledger]", "ddp", 3))
    ended.check()
    told = summary(tmp_path)
    assert (told["status"], told["steps"], told["ended_early"]) == ("finished", 7, "enough is enough")
    assert "eval/loss" in told and (tmp_path / "weights.pt").exists()
    assert "ended early: enough is enough" in ended.out[0]
    assert all(ledger(tmp_path, rank)["stopped"] == "enough is enough" for rank in range(3))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000004", "step-00000007"]


def test_a_run_that_was_killed_after_its_early_end_has_ended(zygote: Zygote, tmp_path: Path):
    hooks = "[{name: user_hooks:Stopping, step: 7}, user_hooks:Ledger]"
    zygote.run(run(tmp_path, hooks, "ddp", 2))[0].check()
    first = summary(tmp_path)
    (tmp_path / "summary.json").unlink()  # as if it was killed before it had written this
    zygote.run(run(tmp_path, hooks))[0].check()
    told = summary(tmp_path)
    assert (told["steps"], told["ended_early"]) == (7, "enough is enough")
    assert told["eval/loss"] == pytest.approx(first["eval/loss"], rel=1e-12)
    assert ledger(tmp_path)["steps"] == 7


def test_a_stop_without_notice_is_refused(zygote: Zygote, tmp_path: Path):
    (ended,) = zygote.run(run(tmp_path, "[{name: user_hooks:Undeclared, step: 3}]"))
    assert ended.codes == [2] and "write stops = True in the class" in ended.err[0]


def test_an_error_in_a_hook_is_shown_and_ends_all(zygote: Zygote, tmp_path: Path):
    (ended,) = zygote.run(run(tmp_path, "[user_hooks:Raising]", "ddp", 2))
    assert ended.codes == [1, 1]
    last = ended.err[1].splitlines()[-1]
    assert "in your code:" in last and "user_hooks.py, line" in last and "in after_step: raise ValueError" in last
    assert "ValueError: a mistake of mine" in ended.err[1] and "ValueError" not in ended.err[0]


def test_state_that_no_checkpoint_holds_is_refused(zygote: Zygote, tmp_path: Path):
    (ended,) = zygote.run(run(tmp_path, "[user_hooks:Unfit]"))
    assert ended.codes == [2] and "got str as the state hook.Unfit.words, expected a number" in ended.err[0]


# -- early stopping ----------------------------------------------------------------------------------------------------

# The loss of random labels gets worse soon.
OVERFITS = ("--train.epochs", "40", "--optim.lr", "0.05", "--train.early_stopping", "{metric: eval/loss, patience: 3}")


@pytest.fixture(scope="module")
def stopped(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The summary of a run in one process that ended early."""
    folder = tmp_path_factory.mktemp("stopped")
    zygote.run(run(folder, "", "single", 1, *OVERFITS))[0].check()
    losses = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["eval/loss"] for line in losses if "eval/loss" in line]
    told = summary(folder)
    assert min(losses) == losses[-4] and min(losses[-3:]) > losses[-4] and told["steps"] == 5 * len(losses) < 200
    return told


def test_early_stopping_says_why(stopped: dict[str, Any]):
    best = stopped["steps"] - 15
    assert stopped["status"] == "finished"
    said = stopped["ended_early"]
    assert said.startswith("train.early_stopping: in 3 evaluations eval/loss was not better than ")
    assert said.endswith(f", of step {best}")


def test_early_stopping_is_the_same_on_more_ranks_and_after_a_kill(
    zygote: Zygote, tmp_path: Path, stopped: dict[str, Any]
):
    resumed, ranks = tmp_path / "resumed", tmp_path / "ranks"
    late = stopped["steps"] - 4  # between the last evaluations
    zygote.run(
        run(ranks, "", "fsdp2", 3, *OVERFITS), run(resumed, "", "ddp", 2, *OVERFITS, **killed(late))
    )  # fmt: skip
    zygote.run(run(resumed, "", "single", 1, *OVERFITS))[0].check()
    for folder in (ranks, resumed):
        told = summary(folder)
        assert (told["steps"], told["ended_early"]) == (stopped["steps"], stopped["ended_early"])


def test_early_stopping_whose_state_is_lost_ends_later(zygote: Zygote, tmp_path: Path, stopped: dict[str, Any]):
    late = stopped["steps"] - 4
    zygote.run(run(tmp_path, "", "single", 1, *OVERFITS, **killed(late)))
    keys = {"plant": {0: ("forgets_early_stopping",)}}
    zygote.run(run(tmp_path, "", "single", 1, *OVERFITS, **keys))[0].check()
    assert summary(tmp_path)["steps"] > stopped["steps"]


def test_a_metric_that_is_not_there_is_named(zygote: Zygote, tmp_path: Path):
    (ended,) = zygote.run(run(tmp_path, "", "single", 1, "--train.early_stopping.metric", "eval/los"))
    assert ended.codes == [2] and "got the metric eval/los, expected one of eval/loss, eval/accuracy" in ended.err[0]


# -- the config --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--train.hooks", "[7]"], "train.hooks: got 7, expected SampleText or module:Class"),
        (["--train.hooks", "[Ledger]"], "train.hooks: got 'Ledger', expected SampleText or module:Class"),
        (["--train.hooks", "[user_hooks:Leger]"], "no 'Leger' in"),
        (["--train.hooks", "[{name: user_hooks:Ledger, steps: 3}]"], "got steps of user_hooks:Ledger, expected one of"),
        (["--train.hooks", "[user_hooks:Stopping]"], "got no step of user_hooks:Stopping, which needs it"),
        (["--train.early_stopping.patience", "0"], "train.early_stopping.patience: got 0, expected a whole number"),
        (["--train.early_stopping.min_delta", "-1"], "train.early_stopping.min_delta: got -1, expected a number of 0"),
        (["--train.early_stopping", "{patients: 1}"], "got unknown key 'patients', expected one of metric, patience"),
        (["--train.early_stopping.metric", "3"], "train.early_stopping.metric: got 3, expected the name of a metric"),
    ],
)
def test_mistakes_are_said_before_torch_is_imported(argv: list[str], said: str):
    with pytest.raises(ConfigError) as caught:
        check(load(argv), Launcher())
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("hooks", "said"),
    [
        ("[user_hooks:NoHook]", "train.hooks: got NoHook, expected a class that is derived from dist_train.Hook"),
        ("[user_hooks:Ledger, user_hooks:Ledger]", "train.hooks: got the name 'Ledger' twice"),
        ("[{name: user_hooks:Ledger, every_steps: 0}]", "got every_steps 0 of Ledger, expected at least 1"),
    ],
)
def test_mistakes_are_said_before_ranks_join(zygote: Zygote, tmp_path: Path, hooks: str, said: str):
    (ended,) = zygote.run(run(tmp_path / "run", hooks))
    assert ended.codes == [2] and said in ended.err[0] and not (tmp_path / "run").exists()


def test_without_hooks_a_step_calls_nothing_more(zygote: Zygote, tmp_path: Path):
    keys = {"plant": {0: ("tells_what_follows_a_step",)}}
    ended: list[Ended] = zygote.run(
        run(tmp_path / "none", "", **keys), run(tmp_path / "one", "[user_hooks:Ledger]", **keys)
    )
    assert "after a step: Checkpoints.after_step" in ended[0].check().out[0]
    assert "after a step: Training._with_hooks" in ended[1].check().out[0]
