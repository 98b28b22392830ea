"""What a checkpoint, and weights to start from, ask of the config. Pure, and before torch is imported."""

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from dist_train.checkpoint import manifest, places, urls
from dist_train.checkpoint.allowed import ALLOWED
from dist_train.config.tree import Config, run_folder
from dist_train.config.values import not_finite, too_small, unknown
from dist_train.ranks.launcher import Launcher

WEIGHTS = "weights.pt"  # in a finished run's folder
WEIGHT_FILES = (".pt", ".pth", ".safetensors")
# What save_pretrained leaves in a folder, in one file or, of a large model, in several with an index.
PRETRAINED, SHARDED = "model.safetensors", "model.safetensors.index.json"


def problems(config: Config, _: Launcher) -> Iterator[str]:
    """A line for every mistake."""
    unfit = list(_urls(config))
    yield from unfit or [*_init_from(config), *_saving(config)]


def _urls(config: Config) -> Iterator[str]:
    """What is wrong with them as they are written: nothing else can be asked of the place then."""
    cfg = config.checkpoint
    of_keys = {places.KEY: cfg.dir, "checkpoint.resume": cfg.resume, "model.init_from": config.model.init_from}
    if cfg.dir == "":
        yield f"{places.KEY}: got '', expected a folder, or a URL such as s3://bucket/path"
    for key, text in of_keys.items():
        if text is not None and urls.is_url(text) and (found := urls.problem(text)):
            yield f"{key}: got {text}, {found}"


def resumes(config: Config) -> bool:
    """Whether a run goes on from a checkpoint, as far as its folder shows."""
    if config.checkpoint.resume == "never":
        return False
    asked = config.checkpoint.resume
    place = places.of_config(config, run_folder(config)) if asked == "auto" else places.at(asked)
    return place is not None and bool(manifest.listed(place)[0])


def _init_from(config: Config) -> Iterator[str]:
    name = config.model.init_from
    sources = f"the folder of a run, of a checkpoint or of save_pretrained, or a {', '.join(WEIGHT_FILES)} file"
    if name is None:
        if config.model.init_strict:
            yield "model.init_strict: got true without model.init_from, expected both or neither; leave it out"
        return
    path = Path(name)
    if resumes(config):
        return  # from a checkpoint, which has all the weights; the file may be gone
    if urls.is_url(name):
        if not manifest.listed(places.at(name))[0]:
            yield (
                f"model.init_from: got {name}, where no checkpoint is; expected the URL of a checkpoint or of a run's "
                f"checkpoint.dir; copy a file of weights to a disk first"
            )
        return
    if not os.path.exists(name):  # False as well for a name that no file can have
        yield f"model.init_from: got {name!r}, which is not there; expected {sources}"
    elif path.name == SHARDED:
        yield (
            f"model.init_from: got {name}, the index of several files, expected their folder; write --model.init_from "
            f"{path.parent}"
        )
    elif path.is_dir() and ((path / SHARDED).is_file() or (path / PRETRAINED).is_file()):
        if not (path / WEIGHTS).is_file() and find_spec("safetensors") is None:
            yield _no_safetensors(name)
    elif path.is_dir() and not (path / WEIGHTS).is_file() and not manifest.listed(path)[0]:
        yield f"model.init_from: got {name}, a folder without {WEIGHTS} and without checkpoints; expected {sources}"
    elif path.is_file() and path.suffix not in WEIGHT_FILES:
        yield f"model.init_from: got {name}, expected {sources}"
    elif path.suffix == ".safetensors" and find_spec("safetensors") is None:
        yield _no_safetensors(name)


def _no_safetensors(name: str) -> str:
    return (
        f"model.init_from: got {name}, but safetensors is not installed; pip install 'dist-train[export]', or give a "
        f".pt file"
    )


def _saving(config: Config) -> Iterator[str]:
    cfg = config.checkpoint
    yield from too_small(
        {
            "checkpoint.every_steps": (cfg.every_steps, 1),
            "checkpoint.every_epochs": (cfg.every_epochs, 1),
            "checkpoint.keep_last": (cfg.keep_last, 1),
            "checkpoint.keep_best": (cfg.keep_best, 0),
        }
    )
    yield from not_finite({"checkpoint.every_s": cfg.every_s}, zero_fits=False, null_is_off=True)
    for name in cfg.allow:
        if name not in ALLOWED:
            yield unknown("checkpoint.allow", name, ALLOWED, "difference")
    if cfg.keep_best and cfg.every_steps is None and cfg.every_epochs is None and cfg.every_s is None:
        yield (
            f"checkpoint.keep_best: got {cfg.keep_best}, but nothing is saved; add --checkpoint.every_epochs 1, or "
            f"leave it out"
        )
    folder = run_folder(config)
    place = places.of_config(config, folder)
    if cfg.resume == "never" and place is not None and place.folders():
        holds, another = (folder, "--run.dir") if cfg.dir is None else (cfg.dir, "--checkpoint.dir")
        yield (
            f"checkpoint.resume: got never, but {holds} holds checkpoints of a run that did not finish; write "
            f"--checkpoint.resume auto to go on from them, or give another {another}"
        )
    if cfg.resume not in ("auto", "never"):
        found, damaged = manifest.listed(places.at(cfg.resume))
        if not found and not damaged:
            yield (
                f"checkpoint.resume: got {cfg.resume}, expected auto, never, or the folder of a checkpoint or of a run "
                f"that has some; for example runs/RUN/checkpoints/step-00000100"
            )
