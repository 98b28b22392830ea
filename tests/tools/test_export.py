"""The export command: files that other programs read, each held against the model, and a check that can fail."""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dist_train.checkpoint import weights
from dist_train.config.load import dump, load
from dist_train.config.tree import Config
from dist_train.errors import ConfigError
from dist_train.ranks.launcher import Launcher
from dist_train.run import assemble
from dist_train.tools import eval as eval_
from dist_train.tools import export

import zoo_cells
from parity_cells import ALONE, config, run_cells
from workers import run_ranks

FORMATS = [name for name in export.FORMATS if name != "hf"]  # of language models: test_export_hf.py
CPU = torch.device("cpu")


class Net(nn.Module):
    """Layers that compute otherwise in training."""

    def __init__(self, input_shape: tuple[int, ...], classes: int):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(input_shape[0], 3, 3), nn.BatchNorm2d(3)
        self.head = nn.Sequential(
            nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(), nn.Linear(12, classes)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.conv(x)))


class Branches(nn.Linear):
    """Depends on values, which no trace can follow."""

    def __init__(self, input_shape: tuple[int, ...], classes: int):
        super().__init__(36, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.flatten(1) if x.sum() > 0 else -x.flatten(1))


class Pairs(Branches):
    """Takes two samples at a time."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x.reshape(2, 36), self.weight, self.bias)


DATA = ["--data.name=synthetic", "--data.args.n=64", "--data.args.n_test=30", "--data.args.shape=[1,6,6]"]


def trained(folder: Path, *argv: str) -> Path:
    """A run with weights that its seed does not give."""
    cell = load([*DATA, "--model.hidden=[5]", *argv] if not any("model.name" in a for a in argv) else [*DATA, *argv])
    model = assemble.build(cell, CPU).model
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.add_(0.1)
    return write(folder, cell, model.state_dict())


def write(folder: Path, cell: Config, state: weights.State) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(dump(cell))
    weights.save_weights(folder, state)
    return folder


def exported(folder: Path, name: str, capsys: pytest.CaptureFixture, *argv: str) -> dict:
    assert export.run(["--run.dir", str(folder), "--format", name, *argv], Launcher()) == 0
    said = capsys.readouterr()
    assert said.err == ""
    return json.loads(said.out)


def model_and_samples(folder: Path) -> tuple[nn.Module, torch.Tensor]:
    cell = load(["--config", str(folder / "config.yaml"), "--backend.name=single"])
    parts = assemble.build(cell, CPU, trained=folder)
    inputs, _ = next(parts.test_feeds[""]([np.arange(7)]))
    return parts.model.eval(), inputs


@pytest.mark.parametrize("model", ["mlp", f"{__name__}:Net"])
@pytest.mark.parametrize("name", FORMATS)
def test_another_program_gets_the_model(name: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    folder = trained(tmp_path / "run", f"--model.name={model}")
    before = (folder / "weights.pt").read_bytes()
    line = exported(folder, name, capsys)
    path = Path(line["file"])
    assert path == folder / f"model{export.FORMATS[name].suffixes[0]}" and line["input_shape"] == [1, 6, 6]
    assert line["input"].startswith("float32 [batch, 1, 6, 6]: pixels in [0, 1], then minus mean and divided by std")
    assert line["verified"]["samples"] == 30
    assert line["verified"]["largest_relative_difference"] <= line["verified"]["tolerance"]
    model, inputs = model_and_samples(folder)
    expected = model(inputs).detach()
    if name == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path)
        got = torch.from_numpy(session.run(None, {"input": inputs.numpy()})[0])
        held = session.get_modelmeta().custom_metadata_map
        assert session.get_inputs()[0].shape == ["batch", 1, 6, 6]
        assert torch.allclose(export.onnx_reference(path)(inputs), expected, atol=1e-5)
    elif name == "torch_export":
        held = {"metadata.json": ""}
        got = torch.export.load(path, extra_files=held).module()(inputs)
        held = json.loads(held["metadata.json"])
    else:
        from safetensors import safe_open

        held = None
        if name == "safetensors":
            with safe_open(path, "pt") as file:
                held, state = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        else:
            state = torch.load(path, weights_only=True)
        for value in model.state_dict().values():
            value.zero_()
        model.load_state_dict(state)
        got = model(inputs)
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-5)
    if held is not None:
        kept = {key: json.loads(v) if name in ("onnx", "safetensors") else v for key, v in held.items() if key in HELD}
        assert kept == {key: line[key] for key in HELD}
    assert (folder / "weights.pt").read_bytes() == before
    assert path.stat().st_mode & 0o777 == (folder / "config.yaml").stat().st_mode & 0o777


HELD = ("classes", "input_shape", "mean", "std")


@pytest.mark.parametrize("name", FORMATS)
def test_the_check_can_fail(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    folder = trained(tmp_path / "run")
    before = sorted(folder.iterdir())
    written = export.written

    def planted(name: str, parts: assemble.Parts, about: dict, path: Path) -> None:
        other = copy.deepcopy(parts)
        with torch.no_grad():
            next(other.model.parameters())[0, 0] += 1e-2
        written(name, other, about, path)

    monkeypatch.setattr(export, "written", planted)
    assert export.run(["--run.dir", str(folder), "--format", name], Launcher()) == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith(f"export: {name} gives other outputs than the model, by ")
    assert sorted(folder.iterdir()) == before


def test_outputs_that_are_not_numbers_or_of_another_form_fail(tmp_path: Path):
    folder = trained(tmp_path / "run")
    parts = assemble.build(load(["--config", str(folder / "config.yaml")]), CPU, trained=folder)
    assert export.difference(parts.model, parts) == (0.0, 30)
    wrong: list[Callable] = [
        lambda x: parts.model(x) * float("nan"),
        lambda x: parts.model(x)[:, :1],
        lambda x: parts.model(x).double(),
    ]
    for function in wrong:
        far, _ = export.difference(function, parts)
        assert not far <= 1.0


@pytest.mark.parametrize("backend", ["fsdp2", "deepspeed:3"])
def test_a_run_of_another_backend_on_two_ranks(backend: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    cell = config(backend)
    (ran,) = run_ranks(run_cells, 2, [cell])[0]
    state = {name: torch.from_numpy(value).float() for name, value in ran.weights.items()}
    folder = write(tmp_path / "run", cell, state)
    line = exported(folder, "pt", capsys, "--output", str(tmp_path / "own.pth"))
    got = torch.load(line["file"], weights_only=True)
    assert got.keys() == state.keys() and all(torch.equal(got[name], state[name]) for name in state)


@pytest.mark.parametrize(("precision", "name"), [("float64", "onnx"), ("bfloat16", "torch_export")])
def test_the_types_of_weights(precision: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    folder = trained(tmp_path / "run", f"--train.precision={precision}", "--data.normalize=false")
    line = exported(folder, name, capsys)
    kind = "float64" if precision == "float64" else "float32"
    assert line["input"] == f"{kind} [batch, 1, 6, 6]: pixels in [0, 1]" and "mean" not in line


def test_the_command_says_a_line_and_nothing_else(tmp_path: Path):
    """The exporters speak of their progress, and of what they found on the machine."""
    folder = trained(tmp_path / "run")
    command = [sys.executable, "-m", "dist_train", "export", "--run.dir", str(folder), "--format=onnx"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["format"] == "onnx"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "--format: got nothing, expected one of safetensors, pt, onnx, torch_export, hf; for example"),
        (["--format"], "export: got --format without a value; for example --format onnx"),
        (["--format=onx"], "--format: got unknown format 'onx', expected one of"),
        (["--format=onnx", "--output=model.pt"], "--output: got model.pt, expected a file that ends in .onnx"),
        (["--format=pt", "--output=nope/model.pt"], "--output: got nope/model.pt, expected a file in a folder that is"),
        (["--format=pt", "--model.init_from=run"], "model.init_from: got run, but export takes the weights of the run"),
        (["--format=pt", "--model.hidden=[4]"], "model: got another model than the one in"),
        (["--format=pt", "--run.name=nope"], "run.dir: got "),
    ],
)
def test_a_bad_option_is_one_line(argv: list[str], said: str, tmp_path: Path):
    folder = trained(tmp_path / "run")
    with pytest.raises(ConfigError) as caught:
        export.run(["--run.dir", str(folder), *argv], Launcher())
    (line,) = caught.value.lines
    assert line.startswith(said)


def test_a_missing_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = trained(tmp_path / "run")
    monkeypatch.setattr(export, "find_spec", lambda package: None)
    for name, package in (("onnx", "onnx"), ("safetensors", "safetensors")):
        with pytest.raises(ConfigError, match=f"got {name}, but {package} is not installed; pip install 'dist-train"):
            export.run(["--run.dir", str(folder), "--format", name], Launcher())


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of PEFT, which asks transformers by an old name
@pytest.mark.parametrize("kind", ["Bert", "BertLora"])
def test_a_model_of_transformers(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    """Its samples are dicts, and its outputs are no tensor. What is written has all of its weights, also those that
    were frozen, and evaluates as the run did."""
    cell = zoo_cells.config(kind, n=24)
    model = assemble.build(cell, CPU).model
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.1)
    folder = write(tmp_path / "run", cell, model.state_dict())
    line = exported(folder, "safetensors", capsys)
    assert line["input"] == "input_ids int64 [batch, 8], attention_mask int64 [batch, 8]"
    assert line["output"] == "float32 [batch, 3]" and "mean" not in line
    assert line["verified"]["largest_relative_difference"] == 0
    from safetensors.torch import load_file

    written = load_file(line["file"])
    assert all(torch.equal(written[name], value) for name, value in model.state_dict().items())
    with pytest.raises(ConfigError, match="--format: got a model whose input is no single tensor"):
        export.run(["--run.dir", str(folder), "--format=onnx"], Launcher())
    assert eval_.run(["--run.dir", str(folder), "--backend.name=single"], Launcher()) == 0
    parts = assemble.build(cell, CPU, trained=folder)
    expected = parts.evaluation(cell, ALONE).run(model)
    assert json.loads(capsys.readouterr().out) == expected


@pytest.mark.parametrize("model", ["Branches", "Pairs"])
def test_a_model_that_cannot_be_traced_is_one_line(model: str, tmp_path: Path):
    folder = trained(tmp_path / "run", f"--model.name={__name__}:{model}")
    with pytest.raises(ConfigError) as caught:
        export.run(["--run.dir", str(folder), "--format=torch_export"], Launcher())
    (line,) = caught.value.lines
    assert line.startswith("--format: got a model that torch.export cannot trace for any batch size: ")
    assert not [name for name in os.listdir(folder) if "pt2" in name]
