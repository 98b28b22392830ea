"""What the trackers and the profiler ask of the config. Pure, and before torch is imported."""

import dataclasses
from collections.abc import Iterator
from importlib.util import find_spec

from dist_train.config.tree import Config, TrackConfig
from dist_train.config.values import too_small, unknown
from dist_train.ranks.launcher import Launcher

# The keys of track.profile, with what each is where another is given.
PROFILE = {"start_step": 10, "steps": 5}


def problems(config: Config, _: Launcher) -> Iterator[str]:
    """A line for every mistake."""
    yield from _trackers(config)
    yield from _profile(config)


def _trackers(config: Config) -> Iterator[str]:
    cfg = config.track
    yield from too_small({"track.every_steps": (cfg.every_steps, 1)})
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


def _profile(config: Config) -> Iterator[str]:
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
