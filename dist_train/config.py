"""The configuration: one tree of typed dataclasses. Defaults < --config FILE.yaml < --section.key value.

No torch here: `--help` and a mistake in a config answer at once. A config is never changed after it is loaded.
What the values must satisfy stands in `check.py`.
"""

import argparse
import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from dist_train import paths, strict_yaml
from dist_train.data import PATHS
from dist_train.errors import ConfigError

# Marks a field that is a path: `~` and `$NAME` in it are replaced when a config is loaded.
PATH = {"path": True}


@dataclass(frozen=True)
class RunConfig:
    """Where the run's files go."""

    dir: str | None = field(default=None, metadata=PATH)
    """Folder of the run; with run.name, the folder that holds it (null: runs)."""
    name: str | None = field(default=None, metadata=PATH)
    """Name of the run, a folder within run.dir (null: run.dir itself, or DATA-MODEL-TIME within runs)."""


@dataclass(frozen=True)
class DataConfig:
    """The data set and how it is read."""

    name: str = "digits"
    """digits, mnist, fashion_mnist, kmnist, cifar10, synthetic, csv_images, or your own function as module:function."""
    root: str = field(default="data", metadata=PATH)
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
    init_from: str | None = field(default=None, metadata=PATH)
    """Start from these weights: a run's folder, a .pt or .pth file with a state dict, or a .safetensors file. What fits
    by name and shape is loaded, and what does not is said."""
    init_strict: bool = False
    """Everything in model.init_from and in the model must fit."""


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
    nonfinite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite: stop ends the run; skip leaves the step out, and waits for the device at
    every step to know."""
    max_time_s: float | None = None
    """Save and end after so many seconds of this start, with exit code 75, to be started again."""
    step_timeout_s: float | None = 600.0
    """Where a step takes longer than so many seconds, name the rank that is waited for, and end (null: never)."""
    eval_every_epochs: int | None = 1
    """Evaluate after every so many epochs (null: only at the end and by eval_every_steps)."""
    eval_every_steps: int | None = None
    """Evaluate after every so many optimizer steps."""
    eval_batch_size: int | None = None
    """Samples at once on a rank during evaluation. Does not change the result. null: as many as a training micro-batch
    has, or more, up to 2048, where their inputs and outputs take little memory."""


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
    config: str | None = field(default=None, metadata=PATH)
    """deepspeed: JSON file with more of its own settings, for what has no place in this config."""


@dataclass(frozen=True)
class CompileConfig:
    """torch.compile."""

    mode: Literal["off", "default", "reduce-overhead", "max-autotune"] = "off"
    """off runs the model as written; the others are torch.compile's own."""
    scope: Literal["model", "step"] = "model"
    """What mode is for. step: all from the numbers of the samples to the loss; and on CUDA the whole optimizer step is
    captured once and replayed as a graph, also where mode is off (backend single, data in memory)."""
    fullgraph: bool = False
    """Fail where the model cannot be one graph."""
    dynamic: bool | None = None
    """Sizes as variables: true from the start, false never, null once a size has changed."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Saving during the run, and resuming. The final weights are always saved."""

    every_steps: int | None = None
    """Save after every so many optimizer steps. With none of the three every_... keys, no checkpoint is saved."""
    every_epochs: int | None = None
    """Save after every so many epochs."""
    every_s: float | None = None
    """Save when so many seconds have passed, at the next line of metrics (track.every_steps)."""
    keep_last: int = 2
    """How many of the newest checkpoints stay: the one before is there if the newest is damaged."""
    keep_best: int = 0
    """How many of the best stay as well, of those that were saved at a step with an evaluation."""
    best_metric: Literal["eval/accuracy", "eval/loss"] = "eval/accuracy"
    """What the best is decided by."""
    resume: str = field(default="auto", metadata=PATH)
    """auto: from the newest whole checkpoint in the run's folder, else from the start; never; or the folder of a
    checkpoint or of a run."""
    allow: list[str] = field(default_factory=list)
    """Config paths that may differ from the checkpoint's, such as train.seed; data for a changed data set of the same
    size."""
    asynchronous: bool = False
    """Copy the state, and write it in the background while training goes on."""


@dataclass(frozen=True)
class TrackConfig:
    """What is recorded. metrics.jsonl and the console always are."""

    every_steps: int = 50
    """Optimizer steps between two lines of metrics. Between them nothing waits for the device."""
    progress: Literal["auto", "bar", "lines"] = "auto"
    """A bar, or a line for each line of metrics; auto is a bar on a terminal."""
    tensorboard: bool = False
    """Also record for TensorBoard, in RUN/tensorboard."""
    wandb: bool = False
    """Also record to Weights & Biases. Of a null below, its own variables decide, such as WANDB_PROJECT."""
    wandb_project: str | None = None
    """Project of the run there."""
    wandb_entity: str | None = None
    """User or team that it belongs to."""
    wandb_group: str | None = None
    """Group of runs."""
    wandb_tags: list[str] = field(default_factory=list)
    """Tags of the run."""
    wandb_name: str | None = None
    """Name of the run."""
    wandb_notes: str | None = None
    """Notes on the run."""
    wandb_mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """online, where there is a network and a key, else offline; offline, to be uploaded later; disabled. auto is what
    WANDB_MODE says, else online."""
    wandb_id: str | None = None
    """Id of the run there (null: the one that the folder or the checkpoint holds, else a new one)."""
    profile: dict[str, int] = field(default_factory=dict)
    """Write a trace of some optimizer steps with torch.profiler, and say where their time went. start_step is the first
    of them, counted from 1 (10), steps how many (5); with neither, nothing is profiled."""


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
    """The config of a command line. Raises ConfigError. `--help` and `--print_config` print and raise SystemExit(0).

    Args:
        argv: `--section.key value` or `--section.key=value`, and `--config FILE.yaml`. What stands there as a key wins
            over every file, wherever `--config` stands. Of several files the later wins, key by key; of one key given
            twice the later. `--optim.args.eps 1e-6` sets one of the arguments, `--optim.args '{eps: 1e-6}'` all.
        prog: the name that the help gives to the program.
    """
    files, options, asked = _split([paths.typed(word) for word in argv])
    if asked == "help":
        _help(prog)
        raise SystemExit(0)
    tree = dataclasses.asdict(Config())
    for file in files:
        for section, body in _read(file).items():
            tree[section] |= body
    lines: list[str] = []
    for path, text in options:
        section, key, *name = path.split(".")
        hint = fields_of(section)[key]
        try:
            if name:
                tree[section][key] = tree[section][key] | {name[0]: _any_value(text)}
            elif _is_text(hint):
                tree[section][key] = _fitting(path, None if text == "null" and _is_optional(hint) else text, hint)
            else:
                tree[section][key] = _fitting(path, _any_value(text), hint)
        except ConfigError as error:
            lines += error.lines
    lines += _expand(tree)
    if lines:
        raise ConfigError(*lines)
    config = to_config(tree)
    if asked:
        print(dump(config), end="")
        raise SystemExit(0)
    return config


def _expand(tree: dict[str, dict[str, Any]]) -> list[str]:
    """Replaces `~` and variables in the paths of a config; and a line for each that cannot be."""
    lines = []
    for values, key, path in _paths(tree):
        try:
            values[key] = paths.expanded(values[key], path)
        except ConfigError as error:
            lines += error.lines
    return lines


def _paths(tree: dict[str, dict[str, Any]]) -> Iterator[tuple[dict[str, Any], str, str]]:
    """The paths of a config that are set: where each stands, its key there, and its config path."""
    for section in dataclasses.fields(Config):
        for one in dataclasses.fields(section.type):
            if one.metadata == PATH and tree[section.name][one.name] is not None:
                yield tree[section.name], one.name, f"{section.name}.{one.name}"
    args = tree["data"]["args"]
    for key in PATHS.get(tree["data"]["name"], ()):
        if isinstance(args.get(key), str):
            yield args, key, f"data.args.{key}"


def _help(prog: str) -> None:
    """Prints the fields with their documentation, types and defaults, which jsonargparse reads from the dataclasses."""
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s [COMMAND] [--config FILE.yaml] [--section.key value ...]",
        description=Config.__doc__,
    )
    parser.add_argument("--config", metavar="FILE.yaml", default=argparse.SUPPRESS, help="YAML file with what follows.")
    parser.add_argument("--print_config", action="store_true", help="Print the config that results, and end.")
    parser.add_class_arguments(Config, None)
    for action in parser._actions:  # --train FILE and its like, which the parser adds and _split refuses
        if action.dest in fields_of(""):
            action.help = argparse.SUPPRESS
    parser.print_help()


def to_config(tree: dict[str, dict[str, Any]]) -> Config:
    """The dataclasses of a nested dictionary whose values have been checked."""
    return Config(**{f.name: f.type(**tree[f.name]) for f in dataclasses.fields(Config)})


def to_tree(config: Config) -> dict[str, dict[str, Any]]:
    """The config as a nested dictionary."""
    return dataclasses.asdict(config)


def dump(config: Config) -> str:
    """The config as YAML that `--config` reads back to an equal config."""
    tree = dataclasses.asdict(config)
    for values, key, _ in _paths(tree):
        values[key] = paths.written(values[key])
    return yaml.dump(tree, Dumper=strict_yaml.Dumper, sort_keys=False, allow_unicode=True)


def fields_of(path: str) -> dict[str, Any] | None:
    """Name and type of each field below a config path; None if the path is a value or does not exist."""
    node: Any = Config
    for part in path.split(".") if path else []:
        hints = typing.get_type_hints(node) if dataclasses.is_dataclass(node) else {}
        if part not in hints:
            return None
        node = hints[part]
    return typing.get_type_hints(node) if dataclasses.is_dataclass(node) else None


def unknown(path: str, name: str, valid: Sequence[str], what: str = "key", near: Sequence[str] | None = None) -> str:
    """One line about a name that is not among the valid ones; a suggestion comes from `near`, or from these."""
    by_lower = {word.lower(): word for word in near or valid}
    found = near if near and len(near) == 1 else difflib.get_close_matches(name.lower(), by_lower, n=1)
    found = [by_lower[word.lower()] for word in found]
    hint = f"; did you mean {found[0]}?" if found else ""
    return f"{path}: got unknown {what} {name!r}, expected one of {', '.join(valid)}{hint}"


def _split(argv: list[str]) -> tuple[list[str], list[tuple[str, str]], str]:
    """The files of `--config`; the other options with their values; and "help" or "print_config" if that is asked for.

    Not argparse's: it would take the -1e-3 of `--optim.lr -1e-3` for an option, and not list the valid names.
    """
    files: list[str] = []
    options: list[tuple[str, str]] = []
    asked = ""
    words = iter(argv)
    for word in words:
        if word in ("-h", "--help", "--print_config"):
            asked = "print_config" if word == "--print_config" and asked != "help" else "help"
            continue
        if not word.startswith("--"):
            raise ConfigError(f"command line: got {word!r}, expected --section.key value, or --config FILE.yaml")
        option, equals, value = word[2:].partition("=")
        if option != "config":
            _check_path(option)
        if not equals:
            value = next(words, "--")
            if value.startswith("--"):
                if option == "config":
                    raise ConfigError("--config: got no value, expected a YAML file; write --config FILE.yaml")
                raise ConfigError(_mismatch(option, "no value"))
        if option == "config":
            files.append(value)
        else:
            options.append((option, value))
    return files, options, asked


def _check_path(path: str) -> None:
    section, _, key = path.partition(".")
    sections = list(fields_of(""))
    if path in ("help", "print_config"):
        raise ConfigError(f"command line: got --{path} with a value, expected --{path} alone")
    if section not in sections:
        valid = [f"--{name}" for name in (*sections, "config", "print_config", "help")]
        every = [f"--{s}.{key}" for s in sections for key in fields_of(s)]
        same = [word for word in every if word.endswith(f".{path}")]  # --lr
        raise ConfigError(unknown("command line", f"--{path}", valid, near=same or [*every, *valid]))
    valid = fields_of(section)
    name, _, rest = key.partition(".")
    if not name:
        raise ConfigError(f"{section}: got --{section}, expected --{section}.KEY with KEY one of {', '.join(valid)}")
    if name not in valid or (rest and not _is_dict(valid[name])):
        raise ConfigError(unknown(section, name if name not in valid else key, list(valid)))
    if "." in rest:
        top, _, below = rest.partition(".")
        whole = f"--{section}.{name}.{top} '{{{below}: VALUE}}'"
        raise ConfigError(f"{section}.{name}: got --{path}, expected the keys below {top} in one value; write {whole}")


# -- files -----------------------------------------------------------------------------------------------------------


def _read(name: str) -> dict[str, dict[str, Any]]:
    """The keys of a YAML file, by section. A section, or a field with keys of its own such as `args`, with nothing
    below it is the same as none."""
    file = Path(paths.expanded(name, "--config"))
    try:
        tree = strict_yaml.parse(file.read_text(encoding="utf-8"), _is_text_at)
    except OSError as error:
        raise ConfigError(f"--config: got {name!r}, expected a YAML file that can be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError) as error:
        detail = " ".join(str(error).replace('in "<unicode string>", ', "").split())
        raise ConfigError(f"--config: got {name}, expected valid YAML: {detail}") from None
    if not isinstance(tree, dict | None):
        raise ConfigError(f"--config: got {name} with {tree!r}, expected sections such as train: with keys below them")
    lines = list(_unknown_keys(tree or {}, name))
    if lines:
        raise ConfigError(*lines)
    out: dict[str, dict[str, Any]] = {}
    for section, body in (tree or {}).items():
        out[section] = {}
        for key, value in (body or {}).items():
            hint = fields_of(section)[key]
            try:
                if value is not None or not _is_dict(hint):
                    out[section][key] = _fitting(f"{section}.{key}", value, hint, f" in {name}")
            except ConfigError as error:
                lines += error.lines
    if lines:
        raise ConfigError(*lines)
    return out


def _fitting(path: str, value: Any, hint: Any, where: str = "") -> Any:
    """The value, if it is of its field's type; an integer will do for a float. Raises ConfigError."""
    for kind in typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,):
        origin, args = typing.get_origin(kind), typing.get_args(kind)
        if kind is float and type(value) is int and abs(value) < 2**1000:
            return float(value)
        items_fit = origin is not list or (type(value) is list and all(type(item) is args[0] for item in value))
        if items_fit and (type(value) is (origin or kind) or (origin is Literal and value in args)):
            return value
    shown = repr(value) if isinstance(value, str | list | dict) else yaml.safe_dump(value).split("\n")[0]
    raise ConfigError(_mismatch(path, (shown if len(shown) < 80 else shown[:76] + "...") + where))


def _any_value(text: str) -> Any:
    """A word of the command line whose type is not known: a YAML value if it is one on its face, else text."""
    try:
        value = strict_yaml.parse(text)
    except (yaml.YAMLError, ValueError):
        return text
    starts = {dict: "{", list: "[", str: "'\"", type(None): "n~"}.get(type(value), text[:1])
    return value if text and text[0] in starts else text


def _is_text_at(section: str, key: str) -> bool:
    return _is_text((fields_of(section) or {}).get(key))


def _is_text(hint: Any) -> bool:
    """Whether what stands there is text, whatever it looks like."""
    return hint in (str, str | None) or typing.get_origin(hint) is Literal


def _is_dict(hint: Any) -> bool:
    """Whether what stands there has keys below it."""
    return typing.get_origin(hint) is dict


def _is_optional(hint: Any) -> bool:
    return type(None) in typing.get_args(hint)


def _unknown_keys(tree: dict, file: str) -> Iterator[str]:
    sections = fields_of("")
    for section, body in tree.items():
        if section not in sections:
            yield unknown(f"{file}", str(section), list(sections), "section")
        elif not isinstance(body, dict | None):
            yield f"{section}: got {body!r} in {file}, expected keys below it: {', '.join(fields_of(section))}"
        else:
            valid = fields_of(section)
            yield from (unknown(f"{section} in {file}", str(k), list(valid)) for k in body or () if k not in valid)


# -- messages --------------------------------------------------------------------------------------------------------

_WORDS = {int: "an integer", float: "a number", str: "text", bool: "true or false", type(None): "null"}


def describe(hint: Any) -> str:
    """A type in the words of a user."""
    if hint in _WORDS:
        return _WORDS[hint]
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin is list:
        example = _example(hint).strip("'")
        return f"a list such as {example} ({describe(args[0])} each)"
    if _is_dict(hint):
        return "keys with values"
    return " or ".join(describe(a) for a in args)  # a union


def _mismatch(path: str, got: str) -> str:
    """One line about a value that is not of its field's type."""
    hint = _hint(path)
    return f"{path}: got {got}, expected {describe(hint)}; for example --{path} {_example(hint)}"


def _hint(path: str) -> Any:
    """The type of the field that a config path leads to or into; None if there is none."""
    section, _, name = path.partition(".")
    return (fields_of(section) or {}).get(name.split(".")[0])


def _example(hint: Any) -> str:
    args = typing.get_args(hint)
    samples = {int: "10", float: "0.1", str: "name", bool: "true"}
    if typing.get_origin(hint) is Literal:
        return str(args[0])
    if typing.get_origin(hint) is list:
        return "'[512, 512]'" if args[0] is int else "'[train.seed]'"
    if _is_dict(hint):
        return "'{start_step: 10, steps: 5}'" if args[1] is int else "'{key: 1}'"
    return samples[hint] if hint in samples else _example(args[0])
