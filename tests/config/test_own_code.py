"""Mistakes in the user's own code: her file and line, as Python says it, once, and not as if the config were wrong."""

import sys
from pathlib import Path

import pytest

from dist_train.config import own_code
from dist_train.config.tree import Config, ModelConfig
from dist_train.errors import ConfigError
from dist_train.run import assemble

from checkpoint_runs import ARGV, refused
from zygote import Ended, Run, Zygote

MINE = """
import math
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, input_shape, classes, width=8):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(input_shape), classes))

    def forward(self, x):
        return self.net(x)

class Typo(Net):
    def __init__(self, input_shape, classes):
        super().__init__(input_shape, classes)
        self.grid = [0] * (classes * 0.5)  # planted

class Within(nn.Module):
    def __init__(self, input_shape, classes):
        super().__init__()
        self.net = nn.Linear(0.5, classes)  # planted

class Forward(Net):
    fine_calls = 0

    def forward(self, x):
        if self.fine_calls > 0:
            self.fine_calls -= 1
            return self.net(x)
        return helper(self.net(x))

class Later(Forward):
    fine_calls = 2

def helper(x):
    return x @ x  # planted

class Plain:
    def __init__(self, input_shape, classes): pass

def nothing(input_shape, classes):
    Net(input_shape, classes)

def the_class(input_shape, classes):
    return Net

def leaves(input_shape, classes):
    raise SystemExit(0)  # planted

def data(root, download):
    try:
        {}["key"]
    except KeyError as error:
        raise ValueError("of two\\nlines") from error  # planted
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "broken.py").write_text("import torch\nfrom nested import x\nclass Net: pass\n")
    (tmp_path / "nested.py").write_text("def x(:\n")
    (tmp_path / "lacks.py").write_text("import torch\nimport not_installed\ndef net(input_shape, classes): pass\n")
    return tmp_path


def line_of(file: Path, text: str = "# planted", nth: int = 0) -> int:
    return [i for i, line in enumerate(file.read_text().splitlines(), start=1) if text in line][nth]


def run(zygote: Zygote, home: Path, *argv: str, ranks: int = 1) -> Ended:
    backend = "ddp" if ranks > 1 else "single"
    argv = (*ARGV[:4], "--train.device", "cpu", "--train.global_batch_size", "8", "--run.dir", "run", *argv)
    return zygote.run(Run([*argv, "--backend.name", backend], ranks, cwd=str(home)))[0]


# What leads to it, what is done, the file and which of its planted lines, and what Python says of it.
MISTAKES = [
    ("model", "mine:Typo", "called", "mine.py", 0, "TypeError: can't multiply sequence by non-int of type 'float'"),
    ("model", "mine:Within", "called", "mine.py", 1, "TypeError: "),
    ("model", "mine:leaves", "called", "mine.py", 3, "SystemExit: 0"),
    ("model", "mine:Forward", "called on the first samples", "mine.py", 2, "RuntimeError: "),
    ("data", "mine:data", "called", "mine.py", 4, "lines"),
    ("model", "lacks:net", "imported", "lacks.py", None, "ModuleNotFoundError: No module named 'not_installed'"),
    ("model", "broken:Net", "imported", "nested.py", None, "SyntaxError: "),
]


@pytest.mark.parametrize(("section", "name", "done", "file", "nth", "says"), MISTAKES)
def test_a_mistake_is_shown_where_it_is(
    section: str, name: str, done: str, file: str, nth: int | None, says: str, home: Path, zygote: Zygote
):
    if name == "mine:data":
        ended = zygote.run(Run(["--data.name", name, "--run.dir", "run"], cwd=str(home)))[0]
    else:
        ended = run(zygote, home, "--model.name", name)
    lines = [line.removeprefix("dist_train: ") for line in refused(ended).splitlines()]
    assert (
        lines[0] == f"{section}.name: got {name}, and your own code raises an error when it is {done}; mend it there:"
    )
    line = line_of(
        home / file, {"lacks:net": "import not_installed", "broken:Net": "def x"}.get(name, "# planted"), nth or 0
    )
    assert any(text.startswith(f'  File "{home / file}", line {line}') for text in lines), lines
    assert lines[-1].startswith(says)
    assert not any("dist_train/" in text or "site-packages" in text for text in lines), (
        lines
    )  # no frame of ours or torch's
    assert not (home / "run").exists()


def test_of_two_ranks_one_says_it(home: Path, zygote: Zygote):
    assert f'mine.py", line {line_of(home / "mine.py")}' in refused(
        run(zygote, home, "--model.name", "mine:Typo", ranks=2)
    )


@pytest.mark.parametrize(
    ("name", "gives"),
    [("nothing", "nothing"), ("Plain", "something of type Plain"), ("the_class", "something of type type")],
)
def test_what_is_no_model_is_one_line(name: str, gives: str, home: Path, zygote: Zygote):
    said = refused(run(zygote, home, "--model.name", f"mine:{name}"))
    assert said.startswith(f"dist_train: model.name: got mine:{name}, which gives {gives}, expected a torch.nn.Module")
    assert said.count("\n") == 1


def test_a_mistake_in_forward_keeps_its_traceback_and_names_the_line(home: Path, zygote: Zygote):
    ended = run(zygote, home, "--model.name", "mine:Later", ranks=2)
    assert ended.codes == [1, 1]
    for rank, said in enumerate(ended.err):
        lines = said.splitlines()
        assert f"[rank {rank}] Traceback (most recent call last):" in lines and "dist_train/loop/train.py" in said
        own = (
            f"in your code: {home}/mine.py, line {line_of(home / 'mine.py', nth=2)}, in helper: return x @ x  # planted"
        )
        assert lines[-1] == f"[rank {rank}] {own}"


def test_a_class_of_the_script_that_was_started(home: Path, zygote: Zygote):
    (home / "train.py").write_text(MINE + "\nfrom dist_train.__main__ import main\nmain()\n")
    argv = (*ARGV[:4], "--train.max_steps", "1", "--train.device", "cpu", "--run.dir", "run")
    zygote.run(Run([*argv, "--model.name", "__main__:Net"], cwd=str(home), script="train.py"))[0].check()
    ended = zygote.run(Run(["eval", "--run.dir", "run"], cwd=str(home)))[0]
    assert "got '__main__:Net'" in refused(ended) and "put it into a module of its own" in refused(ended)


def test_a_model_of_an_installed_package_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its frames are shown though it lies among the libraries."""
    monkeypatch.setattr(own_code, "LIBRARIES", (str(tmp_path),))
    (tmp_path / "installed_mine").mkdir()
    (tmp_path / "installed_mine/__init__.py").write_text("def net(input_shape, classes):\n    return [][0]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = Config(model=ModelConfig(name="installed_mine:net"))
    data = assemble.read_data(Config().data, False)
    with pytest.raises(ConfigError) as caught:
        assemble.maker(config, data)()
    assert f'  File "{tmp_path}/installed_mine/__init__.py", line 2, in net' in caught.value.lines
    sys.modules.pop("installed_mine")


def test_arguments_that_are_not_taken_are_the_configs_mistake():
    data = assemble.read_data(Config().data, False)
    with pytest.raises(ConfigError) as caught:
        assemble.maker(Config(model=ModelConfig(name="torch.nn:Flatten", args={"start": 1})), data)()
    assert (
        caught.value.lines[0].startswith("model.args: got {") and "torch.nn:Flatten refuses: " in caught.value.lines[0]
    )
    assert len(caught.value.lines) == 1


def test_a_wrong_value_of_one_of_our_own_is_the_configs_mistake(zygote: Zygote, tmp_path: Path):
    ended = zygote.run(Run(["--data.name", "synthetic", "--data.args.noise", "much"], cwd=str(tmp_path)))[0]
    said = refused(ended)
    assert (
        said.startswith("dist_train: data.args: got {")
        and "which synthetic refuses: " in said
        and said.count("\n") == 1
    )
