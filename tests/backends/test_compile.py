"""Compiled is eager, faster: the same numbers under every backend, and nothing compiled twice."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from dist_train.config.tree import CompileConfig, Config, DataConfig, ModelConfig
from dist_train.data.order import Plan
from dist_train.loop.meter import Control, Meter, Result
from dist_train.ranks.dist import World
from dist_train.tools.agreement import Trajectory, difference
from dist_train.tools.trajectory import Recorder, measured

from parity_cells import ALONE, BACKENDS, config, this_world
from workers import run_ranks
from zygote import Ended, Run, Zygote

TOLERANCE = 1e-5


def cell(backend: str, mode: str, model: str | None = None, **settings) -> Config:
    """Three epochs with all that could compile again: a learning rate that changes every step, accumulation, a ragged
    last batch that leaves shares of one and of two samples, and an evaluation in every epoch, in uneven pieces."""
    whole = config(backend, "linear", micro_batch_size=8, clips=True)
    changes = {"max_steps": 9, "epochs": 3, "eval_every_epochs": 1, "eval_batch_size": 30}
    return dataclasses.replace(
        whole,
        data=DataConfig(name="synthetic", args=whole.data.args | {"shape": (36,)}),
        # One weight above the 100,000 elements below which ZeRO 3 leaves a weight whole. The same model everywhere, so
        # that torch's cache serves every backend that compiles the same part of it.
        model=ModelConfig(f"{__name__}:{model}") if model else ModelConfig(hidden=[2800], activation="Tanh"),
        train=dataclasses.replace(whole.train, **changes),
        compile=CompileConfig(mode, **settings),
    )


def run(cell: Config, world: World) -> tuple[Trajectory, Result]:
    """A run from a state in which nothing is compiled."""
    torch._dynamo.reset()
    return measured(cell, world)


def run_all(cells: list[Config]) -> list[tuple[Trajectory, Result]]:
    """In a worker: each config's run."""
    return [run(cell, this_world()) for cell in cells]


def same(compiled: tuple[Trajectory, Result], eager: tuple[Trajectory, Result]) -> None:
    """Also of the names of the weights: `difference` refuses others."""
    found = difference(compiled[0], eager[0])
    assert found.worst < TOLERANCE, found
    assert compiled[1].graphs > 0, "nothing was compiled"
    assert compiled[1].recompilations == 0
    assert eager[1].graphs == 0
    assert not any("_orig_mod" in name or name.startswith("module.") for name in compiled[0].weights)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_as_eager(backend: str):
    eager, compiled = run_ranks(run_all, 2, [cell(backend, mode) for mode in ("off", "default")], timeout_s=400)[0]
    same(compiled, eager)


@pytest.mark.parametrize("settings", [{}, {"fullgraph": True, "dynamic": True}], ids=str)
def test_compiled_as_eager_alone(settings: dict):
    same(run(cell("single", "default", **settings), ALONE), run(cell("single", "off"), ALONE))


def test_a_compiled_step_as_eager():
    """compile.scope: step, of whole batches, to spare the compiler."""
    whole = {"micro_batch_size": None}
    compiled, eager = (
        dataclasses.replace(c, train=dataclasses.replace(c.train, **whole))
        for c in (cell("single", "default", scope="step"), cell("single", "off"))
    )
    same(run(compiled, ALONE), run(eager, ALONE))


# -- what was compiled -------------------------------------------------------------------------------------------------


def linear(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    return nn.Linear(*input_shape, classes)


def sequential(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    return nn.Sequential(nn.Linear(*input_shape, classes))


@pytest.mark.parametrize("model", ["linear", "sequential"])
def test_a_forward_of_torchs_own_is_compiled(model: str):
    """torch.compile passes over it in silence."""
    same(run(cell("single", "default", model), ALONE), run(cell("single", "off", model), ALONE))


@pytest.mark.parametrize("backend", ["fsdp2", "deepspeed:3"])
def test_a_model_that_is_one_layer_is_compiled(backend: str):
    """These compile layer by layer, and it has none within it."""
    eager, compiled = run_ranks(run_all, 1, [cell(backend, mode, "linear") for mode in ("off", "default")])[0]
    same(compiled, eager)


def plain(x: torch.Tensor) -> torch.Tensor:
    return x + 1


def test_what_is_a_recompilation():
    """After the first epoch in a step, after the first evaluation in an evaluation, and no graph counts twice."""
    torch._dynamo.reset()
    compiled = torch.compile(plain, backend="eager", dynamic=False)  # a graph for every new size
    plan = Plan(n=2, seed=0, global_batch_size=1, micro_batch_size=None, drop_last=False, rank=0, world_size=1)
    meter = Meter(Recorder(), 4, plan, every_steps=1, device=torch.device("cpu"), control=Control())

    def step(size: int) -> None:
        meter.add(compiled(torch.ones(size)).sum())
        meter.step(1, 1, 0.1, None)

    def evaluate(size: int) -> None:
        with meter.evaluating():
            compiled(torch.ones(size))

    step(2), evaluate(3), step(4), evaluate(3)
    assert meter.compiled.counts()[:2] == (3, 0)
    step(2), step(5), evaluate(6)
    result = meter.finish()
    assert (result.graphs, result.recompilations) == (5, 2)
    assert result.first_step_s > 0


# -- what a user sees --------------------------------------------------------------------------------------------------

OPTIONS = [
    *("--data.name=synthetic", "--data.args.n=131", "--data.args.n_test=101", "--data.args.shape=[36]"),
    *("--train.epochs=2", "--train.device=cpu", "--train.threads=1", "--compile.mode=default"),
]


def start(folder: Path, *options: str) -> subprocess.CompletedProcess:
    """The real command."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "dist_train", *OPTIONS, *options, f"--run.dir={folder}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=environment)


def forked(zygote: Zygote, folder: Path, *options: str) -> Ended:
    """The same of a process that has imported torch."""
    return zygote.run(Run([*OPTIONS, *options, f"--run.dir={folder}"], timeout_s=240))[0]


class Prints(nn.Linear):
    """A graph cannot hold the print."""

    def __init__(self, input_shape, classes):
        super().__init__(*input_shape, classes)

    def forward(self, x):
        print(end="")
        return super().forward(x)


class Breaks(nn.Linear):
    """torch.compile's own planted mistake: C++ that no compiler takes."""

    def __init__(self, input_shape, classes):
        super().__init__(*input_shape, classes)
        torch._inductor.config.cpp.inject_relu_bug_TESTING_ONLY = "compile_error"

    def forward(self, x):
        return super().forward(x).relu()


class Restless(nn.Linear):
    """A number that each graph is made for, and that changes with every change to evaluation and back."""

    def __init__(self, input_shape, classes):
        super().__init__(*input_shape, classes)
        self.name = ""

    def forward(self, x):
        return super().forward(x) * len(self.name + "x")

    def train(self, mode=True):
        self.name += "x"
        return super().train(mode)


def test_the_summary_and_no_noise(tmp_path: Path):
    done = start(tmp_path / "r", "--model.hidden=[8]")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert summary["compile"]["graphs"] > 0
    assert summary["compile"]["recompilations"] == 0
    assert summary["compile"]["first_step_s"] == summary["first_step_s"]
    assert "compile:" not in done.stdout


def test_recompilations_are_in_the_last_lines(zygote: Zygote, tmp_path: Path):
    done = forked(zygote, tmp_path / "r", f"--model.name={__name__}:Restless", "--train.epochs=3").check()
    count = json.loads((tmp_path / "r" / "summary.json").read_text())["compile"]["recompilations"]
    assert count > 0
    assert any(f"{count} after the first epoch" in line for line in done.out[0].splitlines()[-3:])


@pytest.mark.parametrize(("model", "options"), [("Prints", ["--compile.fullgraph=true"]), ("Breaks", [])])
def test_a_compilers_failure_says_how_to_reproduce_it(zygote: Zygote, model: str, options: list[str], tmp_path: Path):
    done = forked(zygote, tmp_path / "r", f"--model.name={__name__}:{model}", *options)
    assert done.codes == [1]
    assert "TORCHDYNAMO_REPRO_AFTER=aot" in done.err[0].splitlines()[-1]


def test_another_failure_does_not(zygote: Zygote, tmp_path: Path):
    done = forked(zygote, tmp_path / "r", f"--model.name={__name__}:Raises")
    assert done.codes == [2]
    assert "planted" in done.err[0]
    assert "TORCHDYNAMO" not in done.err[0]


class Raises(nn.Linear):
    """A mistake of the model's own."""

    def __init__(self, input_shape, classes):
        super().__init__(*input_shape, classes)
        raise RuntimeError("planted")
