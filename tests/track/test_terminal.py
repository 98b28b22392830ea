"""A terminal, a locale or a file's name that is not UTF-8: no error, and the files that a run writes are the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import dist_train

from checkpoint_runs import refused
from zygote import Ended, Run, Zygote

MINE = """
import torch
from dist_train.data.sets import Data, InMemory

def blobs(root, download):
    images, labels = torch.arange(90 * 16, dtype=torch.uint8).view(90, 1, 4, 4), torch.arange(90) % 3
    return Data(InMemory(images, labels), InMemory(images, labels), (1, 4, 4), ("größe", "数据", "x\\u2028y"))

def bad(root, download):
    raise ValueError("größe 数据")
"""
FOLDER = "läufe/数据"
CONFIG = f"""
run: {{dir: {FOLDER}}}
data: {{name: "mine:blobs"}}
model: {{hidden: [8]}}
train: {{epochs: 2, device: cpu}}
checkpoint: {{every_epochs: 1}}
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(MINE, encoding="utf-8")
    (tmp_path / "c.yaml").write_text(CONFIG, encoding="utf-8")
    return tmp_path


def started(zygote: Zygote, home: Path, *argv: str) -> Ended:
    """On a terminal that has ASCII alone."""
    return zygote.run(Run(list(argv), plant={0: ("ascii_terminal",)}, cwd=str(home)))[0]


def test_a_terminal_of_ascii_alone(home: Path, zygote: Zygote):
    out = started(zygote, home, "--config", "c.yaml").check().out[0]
    assert out.endswith("results in l\\xe4ufe/\\u6570\\u636e\n")
    assert f"dir: {FOLDER}" in (home / FOLDER / "config.yaml").read_text(encoding="utf-8")
    bar = ("--config", "c.yaml", "--run.dir", "läufe/ö", "--track.progress", "bar")
    assert "results in l\\xe4ufe/\\xf6" in started(zygote, home, *bar).check().out[0]
    assert "got l\\xe4ufe/\\u6570\\u636e, which holds a finished run" in refused(
        started(zygote, home, "--config", "c.yaml")
    )
    assert "ValueError: gr\\xf6\\xdfe" in refused(started(zygote, home, "--data.name", "mine:bad"))
    for command in (
        ("runs", "läufe"),
        ("inspect", FOLDER),
        ("report", FOLDER, "läufe/ö", "-o", "läufe/ü.html"),
        ("eval", "--run.dir", FOLDER),
        ("doctor", "--config", "c.yaml", "--only", "disk,data,config", "--run.dir", "läufe/neu"),
    ):
        assert started(zygote, home, *command).check().out[0].isascii(), command
    assert "größe" in (home / "läufe/ü.html").read_text(encoding="utf-8")


def test_a_folder_whose_name_is_no_text(home: Path, zygote: Zygote):
    name = os.fsdecode(b"run\xff")
    assert "results in run\\udcff" in started(zygote, home, "--config", "c.yaml", "--run.dir", name).check().out[0]
    again = started(
        zygote, home, "--config", f"{name}/config.yaml", "--run.dir", "b", "--model.init_from", name
    ).check()
    assert "model.init_from run\\udcff: 4 of 4 tensors loaded" in again.out[0]
    assert json.loads(started(zygote, home, "eval", "--run.dir", name).check().out[0])["eval/loss"] > 0
    for command in (("runs", "."), ("inspect", name), ("report", name)):
        started(zygote, home, *command).check()
    assert {b"run\xff", b"b"} <= set(os.listdir(os.fsencode(home)))


def test_a_locale_without_other_scripts(home: Path):
    """Python then takes names of files for ASCII as well, and gives those of the command line as bytes."""
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    paths = {"PYTHONPATH": str(Path(dist_train.__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    argv = ["--config", "c.yaml", "--run.name", "ñ"]
    done = subprocess.run(
        [sys.executable, "-m", "dist_train", *argv], cwd=home, env=os.environ | locale | paths, capture_output=True
    )
    assert done.returncode == 0 and done.stderr == b""
    written = (home / FOLDER / "ñ/config.yaml").read_text(encoding="utf-8")
    assert r'dir: "l\uDCC3\uDCA4ufe/' in written
