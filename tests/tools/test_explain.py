"""The explain command shows where a model's graph breaks."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn


class Clean(nn.Linear):
    def __init__(self, input_shape, classes):
        super().__init__(*input_shape, classes)

    def forward(self, x):
        return super().forward(x).relu()


class Broken(Clean):
    def forward(self, x):
        y = super().forward(x)
        print("planted")  # break 1
        return y * torch.sum(y).item()  # break 2


def explain(model: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])}
    options = ["--data.name=synthetic", "--data.args.n=70", "--data.args.shape=[36]", "--train.device=cpu"]
    command = [sys.executable, "-m", "dist_train", "explain", *options, f"--model.name={__name__}:{model}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)


def test_both_breaks_with_their_places():
    done = explain("Broken")
    assert (done.returncode, done.stderr) == (0, "")
    assert "graphs 3, breaks 2" in done.stdout
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    for number in (1, 2):
        place = next(i for i, line in enumerate(lines, 1) if line.endswith(f"# break {number}"))
        assert f"{os.path.relpath(__file__)}:{place} in forward" in done.stdout
    assert "Broken" not in done.stdout.partition("break 1")[0]


def test_a_clean_model_is_one_graph():
    done = explain("Clean")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("graphs 1, breaks 0")
    assert len(done.stdout.splitlines()) == 1
