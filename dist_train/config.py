"""The configuration: one tree of typed dataclasses. Defaults < --config FILE.yaml < --section.key value.

No torch here: `--help` and a mistake in a config answer at once. A config is never changed after it is loaded.
What the values must satisfy stands in `check.py`.
"""

import dataclasses
import difflib
import re
import sys
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from dist_train.errors import ConfigError


@dataclass(frozen=True)
class RunConfig:
    """Where the run's files go."""

    dir: str | None = None
    """Folder of the run; with run.name, the folder that holds it (null: runs)."""
    name: str | None = None
    """Name of the run, a folder within run.dir (null: run.dir itself, or DATA-MODEL-TIME within runs)."""


@dataclass(frozen=True)
class DataConfig:
    """The data set and how it is read."""

    name: str = "digits"
    """digits, mnist, fashion_mnist, kmnist, cifar10, synthetic, csv_images, or your own function as module:function."""
    root: str = "data"
    """Folder with the data; downloads go there, in torchvision's layout."""
    download: bool = True
    """Download what is missing, where the data set can be had."""
    workers: int = 0
    """DataLoader processes per rank, for data sets that are read from files (data in memory needs none)."""
    normalize: bool = True
    """Subtract the data set's mean and divide by its deviation; false leaves pixels in [0, 1]."""
    one_hot: bool = False
    """Give targets as vectors of class probabilities instead of class numbers."""
    args: dict[str, Any] = field(default_factory=dict)
    """Arguments that only this data set has, such as data.args.n of synthetic."""


@dataclass(frozen=True)
class ModelConfig:
    """The model. A null is the model's own default."""

    name: str = "mlp"
    """mlp, or your own class as module:Class."""
    hidden: list[int] | None = None
    """Sizes of the hidden layers (mlp: [512, 512])."""
    activation: str | None = None
    """Name of a class in torch.nn (mlp: ReLU)."""
    dropout: float | None = None
    """Probability of dropping a hidden unit (mlp: 0)."""
    args: dict[str, Any] = field(default_factory=dict)
    """Arguments that only this model has."""


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and the schedule of its learning rate. A null is torch's own default."""

    name: str = "AdamW"
    """A class of torch.optim: SGD, AdamW, ..."""
    lr: float = 1e-3
    """Peak learning rate, the same at every world size."""
    weight_decay: float | None = None
    """Weight decay, if the optimizer has it."""
    momentum: float | None = None
    """Momentum, if the optimizer has it."""
    args: dict[str, Any] = field(default_factory=dict)
    """The optimizer's other arguments, such as optim.args.betas."""
    schedule: Literal["constant", "linear", "cosine", "step"] = "constant"
    """Learning rate after the warm-up: constant; linear or cosine to lr_final at the last step; step: times gamma."""
    warmup_steps: int = 0
    """Optimizer steps over which the learning rate rises from 0 to lr."""
    lr_final: float = 0.0
    """Learning rate at the end of the linear and cosine schedules."""
    step_size: int | None = None
    """Optimizer steps between two decays of the step schedule."""
    gamma: float | None = None
    """Factor of each decay of the step schedule."""


@dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    epochs: int = 20
    """Passes over the training data."""
    max_steps: int | None = None
    """End after this many optimizer steps, if that comes before the last epoch's end."""
    global_batch_size: int = 64
    """Samples of one optimizer step, over all ranks. Divisible by the world size."""
    micro_batch_size: int | None = None
    """At most this many samples at once on a rank; a larger share is accumulated in pieces."""
    drop_last: bool = False
    """Leave out the last batch of an epoch if it is smaller than global_batch_size."""
    loss: Literal["cross_entropy", "nll", "mse"] = "cross_entropy"
    """cross_entropy takes logits, nll log-probabilities, mse one-hot targets (data.one_hot)."""
    label_smoothing: float = 0.0
    """Share of the target that is spread over all classes (cross_entropy)."""
    grad_clip: float | None = None
    """Largest global gradient norm; a larger gradient is scaled down to it."""
    precision: Literal["float32", "tf32", "bfloat16", "float16", "float64"] = "float32"
    """tf32, bfloat16 and float16 are the matrix products' alone; parameters and sums stay float32 (see the README)."""
    seed: int = 0
    """Decides the initial weights and the order of the samples."""
    device: str = "auto"
    """auto, cpu, cuda, ...: auto takes the accelerator that torch finds, else the CPU."""
    threads: int | None = None
    """CPU threads of a rank (null: OMP_NUM_THREADS, else the cores divided by the ranks on the node)."""
    eval_every_epochs: int | None = 1
    """Evaluate after every so many epochs (null: only at the end and by eval_every_steps)."""
    eval_every_steps: int | None = None
    """Evaluate after every so many optimizer steps."""
    eval_batch_size: int = 2048
    """Samples at once on a rank during evaluation. Does not change the result."""


@dataclass(frozen=True)
class BackendConfig:
    """The library that moves gradients and shards state. It changes speed and memory, not the result."""

    name: str = "auto"
    """single, ddp, fsdp2, accelerate, deepspeed, or auto: that of the launcher, ddp under torchrun, srun and mpirun,
    single alone."""
    zero_stage: int | None = None
    """deepspeed: what is shared out among the ranks; 0 nothing (also null), 1 optimizer state, 2 and gradients,
    3 and weights."""
    offload: bool = False
    """fsdp2, and deepspeed at stages 1 to 3: keep the optimizer's state on the CPU, and compute its step there."""
    config: str | None = None
    """deepspeed: JSON file with more of its own settings, for what has no place in this config."""


@dataclass(frozen=True)
class CompileConfig:
    """torch.compile."""

    mode: Literal["off", "default", "reduce-overhead", "max-autotune"] = "off"
    """off runs the model as written; the others are torch.compile's own."""
    fullgraph: bool = False
    """Fail where the model cannot be one graph."""
    dynamic: bool | None = None
    """Sizes as variables: true from the start, false never, null once a size has changed."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Saving during the run. The final weights are always saved."""

    every_steps: int | None = None
    """Save after every so many optimizer steps."""
    keep_last: int = 1
    """How many checkpoints stay."""
    resume: str = "never"
    """never: start anew."""
    asynchronous: bool = False
    """Write in the background."""


@dataclass(frozen=True)
class TrackConfig:
    """What is recorded. metrics.jsonl and the console always are."""

    every_steps: int = 50
    """Optimizer steps between two lines of metrics. Between them nothing waits for the device."""
    wandb: bool = False
    """Also record to Weights & Biases."""
    tensorboard: bool = False
    """Also record for TensorBoard."""


@dataclass(frozen=True)
class Config:
    """A training run."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    backend: BackendConfig = field(default_factory=BackendConfig)
    compile: CompileConfig = field(default_factory=CompileConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    track: TrackConfig = field(default_factory=TrackConfig)


# -- loading ---------------------------------------------------------------------------------------------------------


def load(argv: list[str], prog: str = "python -m dist_train") -> Config:
    """The config of a command line. Raises ConfigError. `--help` and `--print_config` print and raise SystemExit(0)."""
    import jsonargparse

    _check_options(argv)
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(prog=prog, description=Config.__doc__, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action=jsonargparse.ActionConfigFile, help="YAML file with any of what follows.")
    parser.add_class_arguments(Config, None)
    try:
        return to_config(parser.parse_args(argv).as_dict())
    except jsonargparse.ArgumentError as error:
        raise ConfigError(_in_one_line(str(error))) from None


def to_config(tree: dict[str, Any]) -> Config:
    """The dataclasses of a nested dictionary that `load` has checked."""
    sections = {f.name: f.type(**tree[f.name]) for f in dataclasses.fields(Config)}
    return Config(**sections)


def dump(config: Config) -> str:
    """The config as YAML that `--config` reads back to an equal config."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def fields_of(path: str) -> dict[str, Any] | None:
    """Name and type of each field below a config path; None if the path is a value or does not exist."""
    node: Any = Config
    for part in path.split(".") if path else []:
        hints = typing.get_type_hints(node) if dataclasses.is_dataclass(node) else {}
        if part not in hints:
            return None
        node = hints[part]
    return typing.get_type_hints(node) if dataclasses.is_dataclass(node) else None


def unknown(path: str, name: str, valid: list[str] | tuple[str, ...], what: str = "key") -> str:
    """One line about a name that is not among the valid ones."""
    near = difflib.get_close_matches(name, valid, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{path}: got unknown {what} {name!r}, expected one of {', '.join(valid)}{hint}"


def _check_options(argv: list[str]) -> None:
    """Names only, before the parser sees them: the parser would not list the valid ones."""
    expects_value = False
    for i, word in enumerate(argv):
        if not word.startswith("--"):
            if not expects_value and word != "-h":
                raise ConfigError(f"command line: got {word!r}, expected --section.key value, or --config FILE.yaml")
            expects_value = False
            continue
        option, equals, _ = word[2:].partition("=")
        expects_value = not equals
        if option == "config":
            _check_file(word.partition("=")[2] if equals else argv[i + 1] if i + 1 < len(argv) else "")
        elif option in ("help", "print_config"):
            expects_value = False
        else:
            _check_path(option.removesuffix("+"))


def _check_path(path: str) -> None:
    section, _, key = path.partition(".")
    sections = list(fields_of(""))
    if section not in sections:
        raise ConfigError(unknown("command line", f"--{path}", [f"--{s}" for s in [*sections, "config", "help"]]))
    valid = fields_of(section)
    name, _, rest = key.partition(".")
    if not name:
        raise ConfigError(f"{section}: got --{section}, expected --{section}.KEY with KEY one of {', '.join(valid)}")
    if name not in valid or (rest and name != "args"):
        raise ConfigError(unknown(section, name if name not in valid else key, list(valid)))


class _StrictLoader(yaml.SafeLoader):
    """A key that stands twice is a mistake, not a choice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"the key {key!r} stands twice")
        return super().construct_mapping(node, deep)


def _check_file(name: str) -> None:
    try:
        tree = yaml.load(Path(name).read_text(encoding="utf-8"), Loader=_StrictLoader)  # noqa: S506 (a SafeLoader)
    except OSError as error:
        raise ConfigError(f"--config: got {name!r}, expected a YAML file that can be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        detail = " ".join(str(error).replace('in "<unicode string>", ', "").split())
        raise ConfigError(f"--config: got {name}, expected valid YAML: {detail}") from None
    if not isinstance(tree, dict | None):
        raise ConfigError(f"--config: got {name} with {tree!r}, expected sections such as `train:` with keys below them")
    lines = list(_unknown_keys(tree or {}, name))
    if lines:
        raise ConfigError(*lines)


def _unknown_keys(tree: dict, file: str) -> Iterator[str]:
    sections = fields_of("")
    for section, body in tree.items():
        if section not in sections:
            yield unknown(f"{file}", str(section), list(sections), "section")
        elif not isinstance(body, dict):
            yield f"{section}: got {body!r} in {file}, expected keys below it: {', '.join(fields_of(section))}"
        else:
            valid = fields_of(section)
            yield from (unknown(f"{section} in {file}", str(k), list(valid)) for k in body if k not in valid)


_WORDS = {int: "an integer", float: "a number", str: "text", bool: "true or false", type(None): "null"}


def describe(hint: Any) -> str:
    """A type in the words of a user."""
    if hint in _WORDS:
        return _WORDS[hint]
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin is list:
        return f"a list such as [512, 512] ({describe(args[0])} each)"
    if origin is dict:
        return "keys with values"
    return " or ".join(describe(a) for a in args)  # a union


def _in_one_line(message: str) -> str:
    """The parser's error in our form: path, got, expected."""
    key = re.search(r'Parser key "([^"]+)"|argument --([\w.]+)', message)
    got = re.search(r"(?:Got value|Given value): (.*)", message)
    path = (key[1] or key[2]) if key else "command line"
    section, _, name = path.partition(".")
    hint = (fields_of(section) or {}).get(name.split(".")[0])
    if hint is None:
        return f"{path}: {' '.join(message.split())}"
    return f"{path}: got {got[1] if got else 'no value'}, expected {describe(hint)}; for example --{path} {_example(hint)}"


def _example(hint: Any) -> str:
    args = typing.get_args(hint)
    samples = {int: "10", float: "0.1", str: "name", bool: "true"}
    if typing.get_origin(hint) is Literal:
        return str(args[0])
    if typing.get_origin(hint) is list:
        return "'[512, 512]'"
    if typing.get_origin(hint) is dict:
        return "'{key: 1}'"
    return samples[hint] if hint in samples else _example(args[0])


if __name__ == "__main__":  # python -m dist_train.config: the resolved config of a command line
    print(dump(load(sys.argv[1:])), end="")
