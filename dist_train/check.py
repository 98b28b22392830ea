"""What a config must satisfy beyond its types. Pure: reads the config, the launcher and the file system, changes
nothing, and runs before torch is imported and before any process group starts."""

import dataclasses
import json
import math
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dist_train.backends import rules
from dist_train.checkpoint import manifest
from dist_train.checkpoint.allowed import ALLOWED
from dist_train.config import Config, TrackConfig, unknown
from dist_train.data import DATASETS
from dist_train.errors import ConfigError
from dist_train.launcher import Launcher
from dist_train.lock import holder, how_to_end
from dist_train.lookup import accepts, parameters, torch_optimizers
from dist_train.models import MODELS
from dist_train.paths import typed

# The keys of track.profile, with what each is where another is given.
PROFILE = {"start_step": 10, "steps": 5}
NULL_IS_OFF = ("train.grad_clip", "train.max_time_s", "train.step_timeout_s", "checkpoint.every_s")
# Given by the package itself, so not for `args`.
DATA_GIVEN = ("root", "download")
MODEL_GIVEN = ("input_shape", "classes")
MODEL_FIELDS = ("hidden", "activation", "dropout")
OPTIM_FIELDS = ("lr", "weight_decay", "momentum")
WEIGHTS = "weights.pt"  # in a finished run's folder
WEIGHT_FILES = (".pt", ".pth", ".safetensors")
# What save_pretrained leaves in a folder, in one file or, of a large model, in several with an index.
PRETRAINED, SHARDED = "model.safetensors", "model.safetensors.index.json"
UNFIT_OPTIMIZERS = {
    "LBFGS": "it evaluates the loss several times a step",
    "SparseAdam": "it takes sparse gradients only",
    "Muon": "it takes matrices only, and a model has biases",
}


def check(config: Config, launcher: Launcher, writes: bool = True) -> None:
    """Raises ConfigError with a line for every mistake.

    Args:
        config: what to check.
        launcher: who started the process.
        writes: the run's folder will be written.
    """
    lines: list[str] = []
    rules = [_ranges, _batch, _names, _init_from, _loss, _optimizer, _schedule, _backend, _checkpoint, _track, _profile]
    for rule in [*rules, _folder] if writes else rules:
        try:
            lines += rule(config, launcher)
        except ConfigError as error:
            lines += error.lines
    if lines:
        raise ConfigError(*lines)


def _ranges(config: Config, _: Launcher) -> Iterator[str]:
    t, o, m = config.train, config.optim, config.model
    at_least = {
        "train.epochs": (t.epochs, 1),
        "train.max_steps": (t.max_steps, 1),
        "train.global_batch_size": (t.global_batch_size, 1),
        "train.micro_batch_size": (t.micro_batch_size, 1),
        "train.eval_batch_size": (t.eval_batch_size, 1),
        "train.eval_every_epochs": (t.eval_every_epochs, 1),
        "train.eval_every_steps": (t.eval_every_steps, 1),
        "train.threads": (t.threads, 1),
        "train.seed": (t.seed, 0),
        "data.workers": (config.data.workers, 0),
        "optim.warmup_steps": (o.warmup_steps, 0),
        "optim.step_size": (o.step_size, 1),
        "track.every_steps": (config.track.every_steps, 1),
        "checkpoint.every_steps": (config.checkpoint.every_steps, 1),
        "checkpoint.every_epochs": (config.checkpoint.every_epochs, 1),
        "checkpoint.keep_last": (config.checkpoint.keep_last, 1),
        "checkpoint.keep_best": (config.checkpoint.keep_best, 0),
    }
    for path, (value, least) in at_least.items():
        if value is not None and value < least:
            yield f"{path}: got {value}, expected at least {least}; for example --{path} {max(least, 1)}"
    if t.seed >= 2**63:
        yield f"train.seed: got {t.seed}, expected less than 2**63; for example --train.seed 0"
    for path, value, zero_fits in (
        ("optim.lr", o.lr, True),
        ("optim.weight_decay", o.weight_decay, True),
        ("optim.momentum", o.momentum, True),
        ("optim.lr_final", o.lr_final, True),
        ("optim.gamma", o.gamma, False),
        ("train.grad_clip", t.grad_clip, False),
        ("checkpoint.every_s", config.checkpoint.every_s, False),
        ("train.max_time_s", t.max_time_s, False),
        ("train.step_timeout_s", t.step_timeout_s, False),
    ):
        if value is not None and not (math.isfinite(value) and (value > 0 or (zero_fits and value == 0))):
            bound = "of 0 or more" if zero_fits else "above 0"
            mend = "; null turns it off" if path in NULL_IS_OFF else ""
            yield f"{path}: got {value}, expected a finite number {bound}{mend}; for example --{path} 0.1"
    for path, value in (("model.dropout", m.dropout), ("train.label_smoothing", t.label_smoothing)):
        if value is not None and not 0 <= value < 1:
            yield f"{path}: got {value}, expected 0 or more and below 1; for example --{path} 0.1"
    if m.hidden is not None and any(size < 1 for size in m.hidden):
        yield f"model.hidden: got {m.hidden}, expected sizes of at least 1; for example --model.hidden '[512, 512]'"


def _batch(config: Config, launcher: Launcher) -> Iterator[str]:
    size, world = config.train.global_batch_size, launcher.world_size
    if size >= 1 and size % world:
        below, above = size // world * world, (size // world + 1) * world
        nearest = f"the nearest are {below} and {above}" if below else f"the nearest is {above}"
        yield (
            f"train.global_batch_size: got {size} on {world} ranks, expected a multiple of {world}; "
            f"{nearest}, for example --train.global_batch_size {above}"
        )
    micro = config.train.micro_batch_size
    if micro is not None and micro > size:
        yield (
            f"train.micro_batch_size: got {micro}, expected at most train.global_batch_size, which is {size}; "
            f"leave it out (null) to take a rank's share at once"
        )


def _names(config: Config, _: Launcher) -> Iterator[str]:
    data, model = config.data, config.model
    given = {"data.args." + k for k in data.args}
    yield from _arguments(DATASETS, data.name, "data", data.args, given, DATA_GIVEN)
    fields = {k: getattr(model, k) for k in MODEL_FIELDS if getattr(model, k) is not None}
    given = {"model." + k for k in fields} | {"model.args." + k for k in model.args}
    for key in MODEL_FIELDS:
        if key in model.args:
            yield f"model.args.{key}: got {model.args[key]!r}, expected it as model.{key}; write --model.{key}"
    yield from _arguments(MODELS, model.name, "model", {**fields, **model.args}, given, MODEL_GIVEN)
    if data.workers > 0 and data.name in DATASETS and data.name != "csv_images":
        yield f"data.workers: got {data.workers}, expected 0: {data.name} is held in memory and needs no workers"


def _arguments(
    registry: dict[str, str], name: str, section: str, values: dict[str, Any], given: set[str], by_us: tuple[str, ...]
) -> Iterator[str]:
    """Arguments that `name` does not take, and required ones that are not there."""
    takes = accepts(registry, name, f"{section}.name")
    missing = [k for k in by_us if k not in takes and "**" not in takes]
    if missing:
        own = ", ".join(takes) or "nothing"
        yield f"{section}.name: got {name!r} that takes {own}, expected it to take {' and '.join(missing)} as well"
    ours = [k for k in takes if k not in by_us and k != "**"]
    for path in sorted(given):
        key = path.rpartition(".")[2]
        if key in by_us:
            yield f"{path}: got {values[key]!r}, but it is set by the package; leave it out"
        elif key not in takes and "**" not in takes:
            own = ", ".join(ours) or "no arguments"
            yield f"{path}: got {values[key]!r}, but {name} does not have it; it takes {own}; leave it out"
    for key in ours:
        if takes[key] and key not in values:
            path = f"{section}.args.{key}"
            yield f"{path}: got nothing, expected a value: {name} needs it; write --{path} VALUE"


def _init_from(config: Config, _: Launcher) -> Iterator[str]:
    name = config.model.init_from
    sources = f"the folder of a run or of a checkpoint, or a {', '.join(WEIGHT_FILES)} file"
    if name is None:
        if config.model.init_strict:
            yield "model.init_strict: got true without model.init_from, expected both or neither; leave it out"
        return
    path = Path(name)
    if resumes(config):
        return  # from a checkpoint, which has all the weights; the file may be gone
    if not os.path.exists(name):  # False as well for a name that no file can have
        yield f"model.init_from: got {name!r}, which is not there; expected {sources}"
    elif path.name == SHARDED or (path / SHARDED).is_file():
        yield (
            f"model.init_from: got {name}, whose tensors are in several files ({SHARDED}), expected one file; read "
            f"each with safetensors.torch.load_file, and write all of their tensors with save_file"
        )
    elif (path / PRETRAINED).is_file() and not (path / WEIGHTS).is_file():
        yield (
            f"model.init_from: got {name}, a folder as save_pretrained leaves it, expected the file of its weights; "
            f"write --model.init_from {path / PRETRAINED}"
        )
    elif path.is_dir() and not (path / WEIGHTS).is_file() and not manifest.listed(path)[0]:
        yield f"model.init_from: got {name}, a folder without {WEIGHTS} and without checkpoints; expected {sources}"
    elif path.is_file() and path.suffix not in WEIGHT_FILES:
        yield f"model.init_from: got {name}, expected {sources}"
    elif path.suffix == ".safetensors" and find_spec("safetensors") is None:
        yield (
            f"model.init_from: got {name}, but safetensors is not installed; pip install 'dist-train[export]', or give "
            f"a .pt file"
        )


def _loss(config: Config, _: Launcher) -> Iterator[str]:
    loss, one_hot = config.train.loss, config.data.one_hot
    if loss == "mse" and not one_hot:
        yield "train.loss: got mse with data.one_hot false, expected one-hot targets; add --data.one_hot true"
    if loss == "nll" and one_hot:
        yield "train.loss: got nll with data.one_hot true, expected class numbers; add --data.one_hot false"
    smoothing = config.train.label_smoothing
    if smoothing and loss != "cross_entropy":
        yield f"train.label_smoothing: got {smoothing} with train.loss {loss}, which does not have it; leave it out"


def _optimizer(config: Config, _: Launcher) -> Iterator[str]:
    optim, known = config.optim, torch_optimizers()
    names = [n for n in known if n not in UNFIT_OPTIMIZERS]
    if optim.name in UNFIT_OPTIMIZERS:
        yield f"optim.name: got {optim.name}, but {UNFIT_OPTIMIZERS[optim.name]}; expected one of {', '.join(names)}"
        return
    if optim.name not in known:
        yield unknown("optim.name", optim.name, names, "optimizer")
        return
    takes = parameters(known[optim.name], optim.name) or {}
    own = [k for k in takes if k not in ("params", *OPTIM_FIELDS)]
    for key in OPTIM_FIELDS:
        value = getattr(optim, key)
        if value is not None and key not in takes:
            yield f"optim.{key}: got {value}, but torch.optim.{optim.name} does not have it; leave it out (null)"
    for key, value in optim.args.items():
        if key in OPTIM_FIELDS:
            yield f"optim.args.{key}: got {value!r}, expected it as optim.{key}; write --optim.{key}"
        elif key not in own:
            yield unknown("optim.args", key, own, f"argument of torch.optim.{optim.name}")


def _schedule(config: Config, _: Launcher) -> Iterator[str]:
    o = config.optim
    for key in ("step_size", "gamma"):
        value = getattr(o, key)
        if o.schedule == "step" and value is None:
            example = "1000" if key == "step_size" else "0.1"
            yield f"optim.{key}: got nothing, but optim.schedule step needs it; for example --optim.{key} {example}"
        if o.schedule != "step" and value is not None:
            yield f"optim.{key}: got {value} with optim.schedule {o.schedule}, which does not have it; leave it out"
    if o.lr_final and o.schedule not in ("linear", "cosine"):
        yield f"optim.lr_final: got {o.lr_final} with optim.schedule {o.schedule}, which does not have it; leave it out"
    total = config.train.max_steps
    if total is not None and o.warmup_steps > total:
        yield f"optim.warmup_steps: got {o.warmup_steps}, expected at most train.max_steps, which is {total}"


def _backend(config: Config, launcher: Launcher) -> Iterator[str]:
    return rules.problems(config, launcher)


def _checkpoint(config: Config, _: Launcher) -> Iterator[str]:
    cfg = config.checkpoint
    for name in cfg.allow:
        if name not in ALLOWED:
            yield unknown("checkpoint.allow", name, ALLOWED, "difference")
    if cfg.keep_best and cfg.every_steps is None and cfg.every_epochs is None and cfg.every_s is None:
        yield (
            f"checkpoint.keep_best: got {cfg.keep_best}, but nothing is saved; add --checkpoint.every_epochs 1, or "
            f"leave it out"
        )
    folder = run_folder(config)
    if cfg.resume == "never" and folder is not None and manifest.folders(folder):
        yield (
            f"checkpoint.resume: got never, but {folder} holds checkpoints of a run that did not finish; write "
            f"--checkpoint.resume auto to go on from them, or give another --run.dir"
        )
    if cfg.resume not in ("auto", "never"):
        found, damaged = manifest.listed(Path(cfg.resume))
        if not found and not damaged:
            yield (
                f"checkpoint.resume: got {cfg.resume}, expected auto, never, or the folder of a checkpoint or of a run "
                f"that has some; for example runs/RUN/checkpoints/step-00000100"
            )


def _track(config: Config, _: Launcher) -> Iterator[str]:
    cfg = config.track
    for name in ("wandb", "tensorboard"):
        if getattr(cfg, name) and find_spec(name) is None:
            install = f"pip install 'dist-train[{name}]'"
            yield f"track.{name}: got true, but {name} is not installed; {install}, or leave it out"
    values = dataclasses.asdict(cfg)
    for key, default in dataclasses.asdict(TrackConfig()).items():
        if key.startswith("wandb_") and values[key] != default and not cfg.wandb:
            yield f"track.{key}: got {values[key]!r} with track.wandb false; add --track.wandb true, or leave it out"
    for key, bad, longest in (("wandb_project", "/\\#?%:", 128), ("wandb_id", ":;,#?/'\\", 64)):
        name = values[key]
        if name is not None and (not 0 < len(name.strip()) <= longest or set(bad) & set(name)):
            yield (
                f"track.{key}: got {name!r}, expected 1 to {longest} characters, none of them of {bad}; for example "
                f"--track.{key} mine"
            )
    for tag in cfg.wandb_tags:
        if not 0 < len(tag) <= 64:
            yield (
                f"track.wandb_tags: got {tag!r}, expected tags of 1 to 64 characters; for example "
                f"--track.wandb_tags '[first, second]'"
            )


def _profile(config: Config, _: Launcher) -> Iterator[str]:
    given, total = config.track.profile, config.train.max_steps
    for key, value in given.items():
        path = f"track.profile.{key}"
        if key not in PROFILE:
            yield unknown("track.profile", str(key), list(PROFILE))
        elif type(value) is not int or value < 1:
            yield f"{path}: got {value!r}, expected an integer of at least 1; for example --{path} {PROFILE[key]}"
    wanted = PROFILE | given
    if not given or total is None or any(type(wanted[key]) is not int for key in PROFILE):
        return
    last = wanted["start_step"] + wanted["steps"] - 1
    if last > total:
        first, steps = max(1, total - wanted["steps"] + 1), min(total, wanted["steps"])
        yield (
            f"track.profile: got steps {wanted['start_step']} to {last}, expected them within train.max_steps, which "
            f"is {total}; for example --track.profile '{{start_step: {first}, steps: {steps}}}'"
        )


def run_folder(config: Config) -> Path | None:
    """The folder of the run as far as the config decides it; None where the time of the start names it."""
    run = config.run
    if run.name is not None:
        return Path(run.dir or "runs") / run.name
    return Path(run.dir) if run.dir is not None else None


def resumes(config: Config) -> bool:
    """Whether a run goes on from a checkpoint, as far as its folder shows."""
    if config.checkpoint.resume == "never":
        return False
    folder = run_folder(config) if config.checkpoint.resume == "auto" else Path(config.checkpoint.resume)
    return folder is not None and bool(manifest.listed(folder)[0])


def _folder(config: Config, _: Launcher) -> Iterator[str]:
    name = config.run.name
    if name is not None and (name in ("", ".", "..") or "/" in name or not typed(name).isprintable()):
        yield f"run.name: got {name!r}, expected a plain folder name; give the way to it as --run.dir"
        return
    if config.run.dir is not None and (not config.run.dir or "\0" in config.run.dir):
        yield f"run.dir: got {config.run.dir!r}, expected a folder; for example --run.dir runs/new"
        return
    folder = run_folder(config)
    if folder is None:
        return
    path = "run.name" if config.run.name is not None else "run.dir"
    try:
        there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    except OSError as error:  # too long, or behind a folder that cannot be entered
        yield f"{path}: got a folder that cannot be made ({error}), expected one such as --run.dir runs/new"
        return
    if not there.is_dir():
        yield f"{path}: got {folder}, but {there} is a file; expected a folder, for example --run.dir runs/new"
    elif not os.access(there, os.W_OK):
        yield f"{path}: got {folder}, but {there} cannot be written to; expected a folder of your own"
    writer = holder(folder)
    if writer is not None:
        yield (
            f"{path}: got {folder}, in which another run writes ({writer}), expected a folder of its own; for example "
            f"--run.dir {folder}-2{how_to_end(writer)}"
        )
    if status_of(folder) == "finished":
        another = f"--{path} {folder.name if path == 'run.name' else folder}-2"
        yield f"{path}: got {folder}, which holds a finished run; expected a new folder, for example {another}"


def status_of(folder: Path) -> str | None:
    """The status in a run's summary; None if it has none."""
    return summary_of(folder).get("status")


def summary_of(folder: Path) -> dict[str, Any]:
    """What a run's summary.json holds; empty if it is not there or not whole."""
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return summary if isinstance(summary, dict) else {}
