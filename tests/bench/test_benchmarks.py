"""The scripts of benchmarks/ run, on little. What needs a GPU runs where there is none, too: nothing in it is broken
when one comes."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from data_files import needs_real_data

ROOT = Path(__file__).parents[2]
RECIPE = """
data: {name: synthetic, args: {n: 140, n_test: 50}}
model: {hidden: [8]}
train: {epochs: 2}
compile: {mode: default, scope: step}
"""


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu", ROOT / "benchmarks/gpu.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "gpu", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "EVERY_STEPS", 5)
    return module


def test_it_measures_and_shows(gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    small = ["--data=synthetic", "--batch=16", "--rounds=2", "--steps=20", "--seeds=2", "--mode=off"]
    gpu.main([*small, "--precision=float32", f"--record={recipe}", f"--json={tmp_path / 'gpu.json'}"])
    shown, written = capsys.readouterr().out, json.loads((tmp_path / "gpu.json").read_text())
    rates = written["throughput"]["float32"]
    assert list(rates) == [gpu.TUTORIAL, "in memory", "on the device", gpu.GRAPH, gpu.BARE]
    assert all(len(values) == 2 and min(values) > 0 for values in rates.values())
    assert all(f"| {name} |" in shown for name in rates)
    assert len(written["record"]["train_s"]) == len(written["record"]["accuracy"]) == 2
    assert written["record"]["accuracy_mean"] > 10 and f"## {recipe}" in shown


def test_ratios_are_those_of_each_round(gpu: ModuleType):
    """A machine that is slower in the second round does not show in them."""
    rates = {gpu.TUTORIAL: [10.0, 5.0], gpu.GRAPH: [30.0, 15.0], gpu.BARE: [40.0, 20.0]}
    lines = gpu.table(rates)
    assert lines[3] == f"| {gpu.GRAPH} | 22 | 3.00 | 3.00 |" and lines[4] == f"| {gpu.BARE} | 30 | 1.33 | 4.00 |"
    assert "reaches 0.75 of" in lines[-1]


def script(*words: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=120, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_a_checkpoint_costs(tmp_path: Path):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    words = ("benchmarks/checkpoint.py", "--dir", str(tmp_path / "saved"), "--repeats=1", "--width=16")
    said = script(*torchrun, str(ROOT / words[0]), *words[1:])
    assert [line.split("  ")[0] for line in said.splitlines()] == [
        *("plain torch.save + sync", "synchronous save", "asynchronous save, stall", "copy to host memory"),
    ]


def test_what_the_orthogonalisation_costs():
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    said = script(*torchrun, str(ROOT / "benchmarks/muon.py"), "--rounds=2", "--sizes=4x1").splitlines()
    assert "2 ranks of 1 thread" in said[0] and [line.split(" | ")[1] for line in said[3:]] == ["whole", "rows"]


@pytest.mark.full
def test_what_the_start_costs():
    said = script(str(ROOT / "benchmarks/startup.py"), "--libraries", "alone", "--repeats=1")
    assert "| digits |" in said


@pytest.mark.full
def test_what_images_in_files_cost():
    needs_real_data("mnist_png.tar.gz")
    said = script(str(ROOT / "benchmarks/files.py"), "--repeats=1", "--batch_size=1000")
    assert "ours" in said and "kept" in said


@pytest.mark.full
def test_what_sums_in_a_fixed_order_cost(tmp_path: Path):
    words = ("--rounds=1", "--layers=2", "--width=64", "--slices=2", f"--json={tmp_path / 'ordered.json'}")
    script(str(ROOT / "benchmarks/ordered.py"), *words)
    rows = json.loads((tmp_path / "ordered.json").read_text())
    assert list(rows) == ["single:1", "ddp:2", "fsdp2:2"]  # a time of so small a model is noise
    assert all(row["times"].keys() == {"slices", "whole"} and min(row["times"].values()) > 0 for row in rows.values())


@pytest.mark.full
def test_what_a_rank_holds(tmp_path: Path):
    """Of a model large enough to be seen beside the libraries: what is shared out is less."""
    words = ("--layers=8", "--width=1024", "--backends=single,deepspeed:3", f"--json={tmp_path / 'memory.json'}")
    said = script(str(ROOT / "benchmarks/memory.py"), *words)
    assert "8,396,800 weights on 2 ranks" in said and "| deepspeed:3 | 0.07 |" in said
    single, shared = json.loads((tmp_path / "memory.json").read_text()).values()
    assert shared["theory"] == single["theory"] / 2 == 8 * 8_396_800
    assert single["theory"] * 0.6 < single["steady"] <= single["peak"] < single["theory"] * 1.4
    assert shared["steady"] < 0.8 * single["steady"]
