"""The package as a Python program sees it: fit, session and launch, in scripts, on ranks and in a notebook."""

import ast
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dist_train
from dist_train.config.load import made
from dist_train.errors import ConfigError

import user_loops
from user_hooks import Ledger
from zygote import Run, Zygote

ROOT = Path(dist_train.__file__).parent.parent


def script(name: str, folder: Path, ranks: int = 1, **arguments: Any) -> Run:
    """A script that calls a loop of user_loops, on ranks."""
    folder.mkdir(exist_ok=True)
    lines = ["import os, user_loops"]
    if ranks == 1 and arguments.get("backend", {}).get("name") in ("ddp", "fsdp2"):  # a group of one
        place = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        lines.append(f"os.environ.update({place})")
    text = "\n".join(lines) + f"\nprint('outcome:', user_loops.{name}({str(folder)!r}, **{arguments!r}))\n"
    file = folder.parent / f"{folder.name}.py"
    file.write_text(text)
    return Run([], ranks, cwd=str(folder.parent), script=str(file))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "weights.pt", weights_only=True)


def apart(one: Path, other: Path) -> float:
    mine, others = weights(one), weights(other)
    assert mine.keys() == others.keys()
    return max((mine[name] - others[name]).abs().max().item() for name in mine)


def losses(folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


# -- names -------------------------------------------------------------------------------------------------------------


def test_the_import_is_light_and_all_names_are_there():
    code = "import sys, dist_train; print(sorted({'torch', 'numpy', 'yaml'} & sys.modules.keys()), len(sys.modules))"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("[] ")
    assert all(getattr(dist_train, name).__name__ == name for name in dist_train.__all__)
    assert set(dist_train.__all__) <= set(dir(dist_train))
    with pytest.raises(AttributeError, match="no attribute 'fitt'"):
        dist_train.fitt  # noqa: B018


def test_a_type_checker_sees_the_same_names():
    tree = ast.parse(Path(dist_train.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.asname: node.module for node in block.body for alias in node.names}
    assert seen == dist_train._HOMES and sorted(seen) == sorted(dist_train.__all__)
    assert (ROOT / "dist_train/py.typed").exists()


@pytest.mark.full
def test_the_type_checker_finds_a_mistake(tmp_path: Path):
    file = tmp_path / "program.py"
    file.write_text("import dist_train\nsteps: str = dist_train.fit('config.yaml').steps\n")
    options = ["--config-file", str(ROOT / "setup.cfg"), "--cache-dir", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, str(file)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and 'has type "int", variable has type "str"' in done.stdout


# -- what fit takes ----------------------------------------------------------------------------------------------------


def test_a_config_is_given_in_any_form(tmp_path: Path):
    file = tmp_path / "one.yaml"
    file.write_text("train: {epochs: 3}\noptim: {lr: 0.5}\n")
    expected = made(None, {"train": {"epochs": 3}}, {"optim": {"lr": 0.5}, "run": {"dir": "$x"[1:]}})
    over = {"run": {"dir": "x"}}
    assert made(file, over) == made(str(file), over) == made(made(file), over) == expected
    assert made({"train": {"epochs": 3}, "optim": {"lr": 0.5}}, over) == expected
    assert made(None, {"model": {"hidden": (3, 4)}, "run": {"dir": tmp_path}}).model.hidden == [3, 4]
    dollar = made(None, {"run": {"dir": "$$x"}})
    assert dollar.run.dir == "$x" and made(dollar) == dollar  # a path is not expanded twice


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"config": 7}, "config: got int, expected a Config, a dict of sections, or the path of a YAML file"),
        ({"config": {"trian": {}}}, "config: got unknown section 'trian'"),
        ({"train": {"epoch": 3}}, "train in config: got unknown key 'epoch'"),
        ({"train": {"epochs": "3"}}, "train.epochs: got '3' in config, expected an integer"),
        ({"train": {"loss": "mse"}}, "config: train.loss is now task.loss"),
        ({"config": "none.yaml"}, "--config: got 'none.yaml', expected a YAML file that can be read"),
        ({"model": nn.Linear(16, 4)}, "model: got Linear, expected a function or class that makes the model"),
        ({"hooks": [7]}, "train.hooks: got int, expected a class that is derived from dist_train.Hook"),
        ({"data": 7}, "data.name: got int from dist_train.config.given:data, expected"),
        ({"task": "none"}, "task.name: got none, which has no loss, for a loop of your own in dist_train.session"),
    ],
)
def test_mistakes_are_exceptions(arguments: dict[str, Any], said: str):
    with pytest.raises(ConfigError) as caught:
        dist_train.fit(**arguments)
    assert said in str(caught.value)


def test_objects_stand_in_the_place_of_names(tmp_path: Path):
    generator = torch.Generator().manual_seed(0)
    columns = dist_train.Columns((torch.randn(40, 5, generator=generator), torch.randn(40, 1, generator=generator)))

    class Squares(dist_train.Task):
        def sums(self, model: nn.Module, batch: dist_train.Batch) -> dict[str, torch.Tensor]:
            inputs, targets = batch
            return {"loss": (model(inputs) - targets).square().sum()}

    before = signal.getsignal(signal.SIGTERM), torch.get_num_threads(), sys.stdout
    hook = Ledger()
    told = dist_train.fit(
        data=dist_train.Data(columns, columns), model=lambda: nn.Linear(5, 1), task=Squares(), hooks=[hook],
        train={"epochs": 2, "global_batch_size": 10, "threads": 2, "device": "cpu"}, run={"dir": tmp_path / "run"},
    )  # fmt: skip
    assert (told.status, told.code, told.steps, told.why, told.folder) == ("finished", 0, 8, None, tmp_path / "run")
    assert set(told.metrics) == {"eval/loss"} and hook.steps == 8
    assert set(torch.load(told.weights, weights_only=True)) == {"weight", "bias"}
    assert (signal.getsignal(signal.SIGTERM), torch.get_num_threads(), sys.stdout) == before
    text = (told.folder / "config.yaml").read_text()
    assert "dist_train.config.given:model" in text and "dist_train.config.given:hook0" in text
    # What another process can import is called by its own name.
    found = dist_train.fit(user_loops.settings(str(tmp_path / "two"), {}), data=user_loops.DATA, hooks=[Ledger])
    assert "user_hooks:Ledger" in (found.folder / "config.yaml").read_text()
    assert json.loads((found.folder / "ledger0.json").read_text())["steps"] == 15
    with pytest.raises(ConfigError, match="no 'model' in"):  # known while the run went on
        dist_train.fit(model="dist_train.config.given:model")


# -- a loop of one's own -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the package's own loop on one process."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    zygote.run(script("whole", folder))[0].check()
    return folder


@pytest.mark.parametrize(
    ("backend", "ranks"),
    [("single", 1), ("ddp", 1), ("ddp", 2), ("ddp", 3), ("fsdp2", 1), ("fsdp2", 2), ("fsdp2", 3), ("accelerate", 2)],
)
def test_an_own_loop_agrees_with_the_packages(
    zygote: Zygote, tmp_path: Path, reference: Path, backend: str, ranks: int
):
    (ended,) = zygote.run(script("own", tmp_path / "run", ranks, backend={"name": backend}))
    assert "outcome: Outcome(status='finished', why=None" in ended.check().out[0]
    assert apart(tmp_path / "run", reference) < 1e-9
    mine, expected = losses(tmp_path / "run"), losses(reference)
    assert mine == pytest.approx(expected, rel=1e-9) and len(mine) == 15


def test_dropout_in_an_own_loop_is_that_of_the_packages(tmp_path: Path):
    given = {"data": user_loops.DATA, "model": {"hidden": [9], "dropout": 0.4}}
    found = {}
    for draws in ("keyed", "torch"):
        folders = tmp_path / f"{draws}-fit", tmp_path / f"{draws}-own"
        settings = [user_loops.settings(str(folder), {"train": {"draws": draws}}) for folder in folders]
        dist_train.fit(settings[0], **given)
        with dist_train.session(settings[1], **given) as run:
            for step in run.steps():
                for images, labels in step:
                    step.backward(nn.functional.cross_entropy(run.model(images), labels, reduction="sum"))
                step.update()
        found[draws] = [losses(folder) for folder in folders]
    assert found["keyed"][0] == found["keyed"][1] != found["torch"][1]


def test_a_mean_in_the_place_of_a_sum_is_seen(zygote: Zygote, tmp_path: Path, reference: Path):
    zygote.run(script("own", tmp_path / "run", unscaled=True))[0].check()  # planted
    assert apart(tmp_path / "run", reference) > 1e-8


@pytest.mark.parametrize(("first", "then"), [(("ddp", 2), ("single", 1)), (("fsdp2", 3), ("ddp", 2))])
def test_an_own_loop_resumes_after_a_kill(
    zygote: Zygote, tmp_path: Path, reference: Path, first: tuple[str, int], then: tuple[str, int]
):
    folder = tmp_path / "run"
    (killed,) = zygote.run(script("own", folder, first[1], act_at=10, act="SIGKILL", backend={"name": first[0]}))
    assert -signal.SIGKILL in killed.codes
    (ended,) = zygote.run(script("own", folder, then[1], backend={"name": then[0]}))
    assert "step-00000008: step 8, written by" in ended.check().out[0]
    assert apart(folder, reference) < 1e-9
    assert losses(folder) == pytest.approx(losses(reference), rel=1e-9)


def test_an_own_loop_is_stopped_by_a_signal_and_goes_on(zygote: Zygote, tmp_path: Path, reference: Path):
    folder = tmp_path / "run"
    (ended,) = zygote.run(script("own", folder, 2, act_at=1, act="SIGTERM"))
    assert "Outcome(status='preempted', why='SIGTERM on rank " in ended.check().out[0]
    assert json.loads((folder / "summary.json").read_text())["status"] == "preempted"
    zygote.run(script("own", folder))[0].check()
    assert apart(folder, reference) < 1e-9


def test_a_loop_that_is_left_has_finished(zygote: Zygote, tmp_path: Path):
    folder = tmp_path / "run"
    (ended,) = zygote.run(script("own", folder, 2, act_at=7, act="leave"))
    assert "Outcome(status='finished', why='the loop was left'" in ended.check().out[0]
    told = json.loads((folder / "summary.json").read_text())
    assert told["steps"] == 7 and told["ended_early"] == "the loop was left" and "eval/loss" in told


@pytest.fixture(scope="module")
def single_gan(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gan") / "run"
    zygote.run(script("gan", folder, backend={"name": "single"}))[0].check()
    assert {name.split(".")[0] for name in weights(folder)} == {"generator", "discriminator"}
    return folder


@pytest.mark.parametrize(("backend", "ranks"), [("ddp", 2), pytest.param("fsdp2", 3, marks=pytest.mark.full)])
def test_two_optimizers_agree_with_one_process(
    zygote: Zygote, tmp_path: Path, single_gan: Path, backend: str, ranks: int
):
    zygote.run(script("gan", tmp_path / "run", ranks, backend={"name": backend}))[0].check()
    assert apart(tmp_path / "run", single_gan) < 1e-9
    assert losses(tmp_path / "run") == pytest.approx(losses(single_gan), rel=1e-9)


def test_two_optimizers_resume_elsewhere(zygote: Zygote, tmp_path: Path, single_gan: Path):
    folder = tmp_path / "run"
    zygote.run(script("gan", folder, 2, kill_at=10, backend={"name": "fsdp2"}))
    (ended,) = zygote.run(script("gan", folder, 2, backend={"name": "ddp"}))
    assert "step-00000008: step 8, written by fsdp2 on 2 ranks" in ended.check().out[0]
    assert apart(folder, single_gan) < 1e-9


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"mixed": True}, "got a backward of generator while gradients of discriminator wait for their update"),
        ({"backend": {"name": "deepspeed"}}, "got deepspeed with optimizers of discriminator, generator, but"),
        ({"train": {"precision": "float16"}}, "train.precision: got float16 with several optimizers"),
    ],
)
def test_what_several_optimizers_cannot_is_refused(tmp_path: Path, arguments: dict[str, Any], said: str):
    with pytest.raises(ConfigError) as caught:
        user_loops.gan(str(tmp_path / "run"), **arguments)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("optimizers", "said"),
    [
        ({"generator": {}}, "optimizers: got no optimizer for discriminator.0.weight"),
        ({"generator": {}, "critic": {}}, "optimizers: got 'critic', expected children of the model: generator, disc"),
        ({"generator": {"rate": 1}}, "optim in config: got unknown key 'rate'"),
        ({"generator": {"name": "Adan"}}, "optim.name: got unknown optimizer 'Adan'"),
    ],
)
def test_parts_and_optimizers_fit(tmp_path: Path, optimizers: dict[str, Any], said: str):
    given = user_loops.settings(str(tmp_path / "run"), {})
    with pytest.raises(ConfigError) as caught:  # noqa: SIM117
        with dist_train.session(given, data=user_loops.DATA, model=user_loops.Gan, task="none", optimizers=optimizers):
            pass
    assert said in str(caught.value)


def test_a_loss_over_the_whole_batch_and_an_evaluation_of_its_own(zygote: Zygote, tmp_path: Path):
    whole = {"train": user_loops.SETTINGS["train"] | {"micro_batch_size": None}, "checkpoint": {"every_steps": 1}}
    whole["checkpoint"] |= {"keep_best": 1, "best_metric": "eval/loss"}
    one, ranks = tmp_path / "one", tmp_path / "ranks"
    for ended in zygote.run(script("contrastive", one, **whole), script("contrastive", ranks, 3, **whole)):
        ended.check()
    assert apart(one, ranks) < 1e-9
    told = json.loads((ranks / "summary.json").read_text())
    assert told["eval/loss"] == 1 / 16 and "ended_early" not in told
    early = {"train": whole["train"] | {"early_stopping": {"patience": 2}}}
    zygote.run(script("contrastive", tmp_path / "early", 2, worse_after=6, **early))[0].check()
    told = json.loads((tmp_path / "early" / "summary.json").read_text())
    assert told["steps"] == 8 and told["ended_early"].endswith("was not better than 0.142857, of step 6")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("for batch in step: pass", "got a step without update()"),
        ("for x, y in step: step.backward(F.cross_entropy(run.model(x), y, reduction='sum'))", "without update()"),
        ("step.backward(torch.zeros(()))", "got backward outside of a batch"),
        ("for x, y in step: step.backward(F.cross_entropy(run.model(x), y, reduction='none'))", "expected a scalar"),
        (
            "for x, y in step: step.backward(run.model(x).sum(), 'critic')",
            "got the part 'critic', but the model has one",
        ),
    ],
)
def test_a_step_that_is_not_taken_whole_is_refused(tmp_path: Path, body: str, said: str):
    code = "with dist_train.session(given, data=data) as run:\n    for step in run.steps():\n        " + body
    names = {"dist_train": dist_train, "F": nn.functional, "torch": torch, "data": user_loops.DATA}
    names["given"] = user_loops.settings(str(tmp_path / "run"), {})
    with pytest.raises(ConfigError) as caught:
        exec(code, names)
    assert said in str(caught.value)


# -- ranks -------------------------------------------------------------------------------------------------------------


def test_launched_ranks_give_answers_and_join_more_than_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    answers = dist_train.launch(user_loops.twice, str(tmp_path), ranks=2)
    assert answers[0] == answers[1] == [pytest.approx(answers[0][0], rel=1e-9)] * 2
    said = capfd.readouterr().out
    assert said.count("[rank 0] finished: ") == 2 and "[rank 1] finished" not in said


@pytest.mark.parametrize("error", ["raised", "killed"])
def test_an_error_of_a_rank_comes_back_and_ends_the_others(
    tmp_path: Path, error: str, capfd: pytest.CaptureFixture[str]
):
    with pytest.raises(dist_train.RankError) as caught:
        dist_train.launch(lambda: user_loops.fails(str(tmp_path / "run"), error))  # by fork: it is faster
    said = str(caught.value)
    if error == "killed":
        assert said == "rank 1: was ended by SIGKILL, and left no error"
    else:
        assert said.startswith("rank 1: KeyError: 'a mistake of mine'") and isinstance(caught.value.__cause__, KeyError)
        assert "user_loops.py" in said and 'raise KeyError("a mistake of mine")' in said


def test_a_mistake_in_the_config_of_ranks_is_one(tmp_path: Path):
    with pytest.raises(ConfigError, match="model: got Linear, expected a function or class"):
        dist_train.launch(lambda: user_loops.refused(str(tmp_path / "run")))
    with pytest.raises(ConfigError, match="got ranks=0, expected at least 1"):
        dist_train.launch(user_loops.refused, ranks=0)


def test_under_torchrun(tmp_path: Path, reference: Path):
    # A line in one piece: both ranks write into one pipe.
    calls = [f"user_loops.{name}({str(tmp_path / name)!r}).steps" for name in ("whole", "own")]
    text = "\n".join(f"os.write(1, b'outcome: %d\\n' % {call})" for call in calls)
    (tmp_path / "train.py").write_text(f"import os, user_loops\n{text}\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    command = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc_per_node=2", "train.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.count("outcome: 15") == 4, done.stderr
    assert apart(tmp_path / "whole", reference) < 1e-9 and apart(tmp_path / "own", reference) < 1e-9


NOTEBOOK = """
import code, signal, sys
console = code.InteractiveConsole()
cells = [
    "import dist_train, torch",
    "class Net(torch.nn.Sequential):\\n    def __init__(self, input_shape, classes):\\n"
    "        super().__init__(torch.nn.Flatten(), torch.nn.Linear(16, classes))\\n",
    "data = {'name': 'synthetic', 'args': {'n': 24, 'n_test': 4, 'shape': [1, 4, 4], 'classes': 4}}",
    "def trained(name):\\n    return dist_train.fit(data=data, model=Net, run={'dir': name}, train={'max_steps': 3,"
    " 'device': 'cpu'}).metrics['eval/loss']\\n",
    "ranks = dist_train.launch(trained, 'ranks', ranks=2)",
    "alone = trained('alone')",
    "again = trained('again')",
    "print('same:', alone == again, all(abs(one - alone) < 1e-6 for one in ranks))",
    "trained('alone')",
    "dist_train.launch(lambda: 1 / 0, ranks=2)",
    "print('left:', signal.getsignal(signal.SIGINT) is signal.default_int_handler, sys.stdout is sys.__stdout__)",
]
sys.modules["__main__"].__dict__.update(signal=signal)
console.locals = sys.modules["__main__"].__dict__
for cell in cells:
    console.runsource(cell + "\\n", symbol="exec")
"""


def test_in_the_cells_of_a_notebook(tmp_path: Path):
    """A fresh interpreter whose classes and functions stand in cells, in no file."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", NOTEBOOK]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert "same: True True" in done.stdout and "left: True True" in done.stdout, done.stdout + done.stderr
    assert "ConfigError: run.dir: got alone, which holds a finished run" in done.stderr
    assert "RankError: rank 0: ZeroDivisionError" in done.stderr or "RankError: rank 1: ZeroDiv" in done.stderr
    assert done.stderr.count("ZeroDivisionError: division by zero") >= 2  # the traceback of the rank, and the cause
