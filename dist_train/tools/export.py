"""python -m dist_train export --run.dir DIR --format safetensors|pt|onnx|torch_export|hf [--which best] [--output FILE]

Writes a finished run's model for other programs, reads the file back as they would, and holds its outputs against the
model's own on samples of the test split. Of hf, which is for language models, FILE is a folder. The other options are
the config's own, on top of the run's.
"""

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_train.config.tree import BackendConfig, CompileConfig, Config
from dist_train.config.values import unknown
from dist_train.errors import ConfigError
from dist_train.ranks.launcher import Launcher
from dist_train.run.check import check
from dist_train.tools.finished import finished, source_of
from dist_train.tools.options import split

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dist_train.run.assemble import Parts

SAMPLES = 64
ONNX_LIMIT_BYTES = 1_500_000_000  # above, torch writes a second file beside the first
OPTIONS = {"--format": ("", "onnx"), "--which": ("final", "best"), "--output": ("", "model.onnx")}


@dataclass(frozen=True)
class Format:
    """What is written, and how far its outputs may be from the model's, by the largest of them.

    Args:
        suffixes: of the file's name; the first is the default's. Of a folder none.
        packages: beside torch.
        tolerance: by the type of the weights. Weights alone come back bit by bit; another program sums otherwise.
    """

    suffixes: tuple[str, ...]
    packages: tuple[str, ...]
    tolerance: dict[str, float]


FORMATS = {
    "safetensors": Format((".safetensors",), ("safetensors",), {"float32": 0.0, "float64": 0.0}),
    "pt": Format((".pt", ".pth"), (), {"float32": 0.0, "float64": 0.0}),
    "onnx": Format((".onnx",), ("onnx", "onnxscript"), {"float32": 1e-4, "float64": 1e-9}),
    "torch_export": Format((".pt2",), (), {"float32": 1e-5, "float64": 1e-9}),
    "hf": Format((), ("safetensors", "transformers"), {"float32": 1e-5, "float64": 1e-9}),
}

Function = Callable[["torch.Tensor"], "torch.Tensor"]


def run(argv: list[str], launcher: Launcher) -> int:
    """Prints a line of JSON about the file. Returns 1, and leaves no file, if what it gives is not what the model
    gives."""
    options, rest = split(argv, OPTIONS, "export", paths=("--output",))
    folder, config = finished(rest, "export")
    if launcher.name != "none":
        raise ConfigError(f"export: got {launcher.name}, expected to be started alone: python -m dist_train export")
    name = options["--format"]
    path = _output(name, options["--output"], folder)
    source = source_of(options["--which"], folder, config)
    config = as_written(config)
    check(config, launcher, writes=False)

    import torch

    from dist_train.ranks import dist
    from dist_train.run import assemble

    dist.set_threads(config.train.threads, 1)
    parts = assemble.build(config, torch.device("cpu"), trained=source)
    parts.model.eval()
    if name == "hf":
        return _folder(path, parts, FORMATS[name].tolerance[config.train.precision], source)
    beside = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        about = describe(config, parts)
        written(name, parts, about, beside)
        far, samples = difference(read_back(name, beside, config, parts), parts)
        tolerance = FORMATS[name].tolerance[config.train.precision]
        if not far <= tolerance:  # a nan fails
            print(
                f"export: {name} gives other outputs than the model, by {far:.1e} of the largest on {samples} samples "
                f"of the test split, where {tolerance:g} is allowed; {path} was not written",
                file=sys.stderr,
            )
            return 1
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    checked = {"samples": samples, "largest_relative_difference": far, "tolerance": tolerance}
    print(json.dumps({"file": str(path), "format": name, "weights": str(source), **about, "verified": checked}))
    return 0


def _folder(path: Path, parts: "Parts", tolerance: float, source: Path) -> int:
    """See `run`."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed, which transformers imports, says what it found
    from dist_train.tools import export_hf

    beside = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        model = export_hf.write(parts, beside)
        checked = export_hf.verify(beside, model, parts, tolerance)
        if path.is_dir():
            path.rmdir()  # which is empty
        beside.replace(path)
    except export_hf.Unlike as error:
        print(f"export: transformers {error}; {path} was not written", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    verified = checked | {"tolerance": tolerance}
    print(json.dumps({"folder": str(path), "format": "hf", "weights": str(source), "verified": verified}))
    return 0


def as_written(config: Config) -> Config:
    """The run in one process on the CPU, in the type of its weights: what a file of them holds."""
    precision = "float64" if config.train.precision == "float64" else "float32"
    train = dataclasses.replace(config.train, device="cpu", precision=precision)
    return dataclasses.replace(config, train=train, backend=BackendConfig("single"), compile=CompileConfig())


def _output(name: str, given: str, folder: Path) -> Path:
    """Where the file goes. Raises ConfigError for what can be known before there is one."""
    if not name:
        raise ConfigError(f"--format: got nothing, expected one of {', '.join(FORMATS)}; for example --format onnx")
    if name not in FORMATS:
        raise ConfigError(unknown("--format", name, list(FORMATS), "format"))
    for package in FORMATS[name].packages:
        if find_spec(package) is None:
            raise ConfigError(
                f"--format: got {name}, but {package} is not installed; pip install 'dist-train[export]', or write "
                f"--format pt"
            )
    suffixes = FORMATS[name].suffixes
    if not suffixes:
        return _new_folder(Path(given) if given else folder / name)
    path = Path(given) if given else folder / f"model{suffixes[0]}"
    if path.suffix not in suffixes:
        raise ConfigError(
            f"--output: got {path}, expected a file that ends in {' or '.join(suffixes)}, as --format {name} is read"
        )
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ConfigError(f"--output: got {path}, expected a file in a folder that is there and can be written to")
    return path


def _new_folder(path: Path) -> Path:
    """Where a folder may be written. Raises ConfigError."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"--output: got {path}, which is there, expected a new folder; for example {path}-2")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ConfigError(f"--output: got {path}, expected a folder to be made in one that can be written to")
    return path


def describe(config: Config, parts: "Parts") -> dict[str, Any]:
    """What a program that runs the model must know of it. `input` is what the model takes: the same as in training."""
    import numpy as np
    import torch

    from dist_train.run.look import LOOKED_AT
    from dist_train.tasks.base import inputs_and_targets

    data, feed = parts.data, parts.feed
    inputs = inputs_and_targets(feed.of(np.arange(min(LOOKED_AT, len(feed.split)))).tree)[0]
    with torch.no_grad():
        output = _called(parts.model, inputs)
    about: dict[str, Any] = {
        "input": _forms(inputs),
        "output": _form(output),
        "input_shape": list(data.input_shape or ()),
        "classes": list(data.classes),
    }
    if feed.pixels:
        about["input"] += ": pixels in [0, 1]"
    if config.data.normalize and feed.paired:
        then = ", then" if feed.pixels else ":"
        about["input"] += f"{then} minus mean and divided by std, which are a number for each channel or one for all"
        about |= {"mean": list(data.mean), "std": list(data.std)}
    return about


def _forms(inputs: Any) -> str:
    """The type and shape of what a model takes, of several by name."""
    if isinstance(inputs, Mapping):
        return ", ".join(f"{name} {_form(value)}" for name, value in inputs.items())
    return _form(inputs)


def _form(value: Any) -> str:
    import torch

    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} [{', '.join(['batch', *map(str, value.shape[1:])])}]"


def written(name: str, parts: "Parts", about: dict[str, Any], path: Path) -> None:
    """Writes the file. Raises ConfigError for a model that the format does not take."""
    import torch

    if name in ("safetensors", "pt"):
        # a copy of each: a tensor under two names would be refused
        state = {key: value.detach().clone().contiguous() for key, value in parts.model.state_dict().items()}
        if name == "pt":
            torch.save(state, path)
        else:
            from safetensors.torch import save_file

            save_file(state, path, metadata={key: _text(value) for key, value in about.items()})
            path.chmod(0o666 & ~_umask())  # it writes for the owner alone
        return
    program = _traced(parts)
    if name == "torch_export":
        torch.export.save(program, path, extra_files={"metadata.json": json.dumps(about)})
        return
    size = sum(value.nbytes for value in parts.model.state_dict().values())
    if size > ONNX_LIMIT_BYTES:
        raise ConfigError(
            f"--format: got onnx for a model of {size / 1e9:.1f} GB, expected at most {ONNX_LIMIT_BYTES / 1e9:g} GB, "
            f"what one such file holds; write --format torch_export"
        )
    onnx = torch.onnx.export(
        program, dynamo=True, verbose=False, input_names=["input"], output_names=["output"],
        dynamic_shapes=({0: "batch"},),
    )  # fmt: skip
    onnx.model.metadata_props.update({key: _text(value) for key, value in about.items()})
    onnx.save(path)


def _traced(parts: "Parts") -> "torch.export.ExportedProgram":
    import numpy as np
    import torch

    from dist_train.data.batch import like

    if not parts.feed.paired:
        raise ConfigError(
            "--format: got a model whose input is no single tensor, expected one for torch.export; write --format "
            "safetensors or pt"
        )
    inputs = like(parts.feed.of(np.zeros(1, np.int64)), 2).tree[0]
    try:
        return torch.export.export(parts.model, (inputs,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    except Exception as error:  # of the user's model, or of torch's where it cannot follow it
        said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConfigError(
            f"--format: got a model that torch.export cannot trace for any batch size: {said.strip()}; write --format "
            f"safetensors or pt"
        ) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def read_back(name: str, path: Path, config: Config, parts: "Parts") -> Function:
    """The file as a function from inputs to outputs, loaded as another program would."""
    import torch

    if name == "torch_export":
        return torch.export.load(path).module()
    if name == "onnx":
        return onnx_runtime(path) if find_spec("onnxruntime") else onnx_reference(path)
    if name == "pt":
        state = torch.load(path, weights_only=True)
    else:
        from safetensors.torch import load_file

        state = load_file(path)
    return _filled(config, parts, state)


def _filled(config: Config, parts: "Parts", state: dict[str, "torch.Tensor"]) -> "nn.Module":
    from dist_train.run import assemble

    model, _ = assemble.build_model(config, parts.data, parts.precision.dtype)
    model.load_state_dict(state)
    return model.eval()


def onnx_runtime(path: Path) -> Function:
    """An ONNX file in onnxruntime."""
    import onnxruntime
    import torch

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda inputs: torch.from_numpy(session.run(None, {"input": inputs.numpy()})[0])


def onnx_reference(path: Path) -> Function:
    """An ONNX file in the evaluator of the onnx package itself, slow: for machines that have no onnxruntime."""
    import onnx.reference
    import torch

    session = onnx.reference.ReferenceEvaluator(str(path))
    return lambda inputs: torch.from_numpy(session.run(None, {"input": inputs.numpy()})[0])


def _called(model: Any, inputs: Any) -> "torch.Tensor":
    from dist_train.tasks.base import tensor_of

    return tensor_of(model(**inputs) if isinstance(inputs, Mapping) else model(inputs))


def difference(function: Function, parts: "Parts") -> tuple[float, int]:
    """How far the outputs are from the model's, by the largest of these; and on how many samples of the test split, in
    two batches, of one and of the others."""
    import numpy as np
    import torch

    from dist_train.tasks.base import inputs_and_targets

    feed = next(iter(parts.test_feeds.values()), parts.feed)
    samples = np.arange(min(SAMPLES, len(feed.split)))
    differences, outputs = [], []
    with torch.no_grad():
        for batch in feed(batch for batch in (samples[:1], samples[1:]) if len(batch)):
            inputs = inputs_and_targets(batch.tree)[0]
            expected, got = (_called(model, inputs) for model in (parts.model, function))
            if got.shape != expected.shape or got.dtype != expected.dtype:
                return float("nan"), len(samples)
            differences.append(float((got - expected).abs().max()))
            outputs.append(float(expected.abs().max()))
    far, largest = np.max(differences), np.max(outputs)  # numpy's max keeps a nan
    return float(far / largest if largest else far), len(samples)
