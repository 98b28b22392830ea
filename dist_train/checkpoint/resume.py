"""Resuming: which checkpoint, whether it fits this run, and loading it."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_train.backends.base import Backend
from dist_train.backends.shards import shards_of
from dist_train.checkpoint import manifest, randomness
from dist_train.checkpoint.allowed import AVERAGE, BY_NAME, LENGTH
from dist_train.checkpoint.manifest import Damaged, Manifest, Tensor
from dist_train.checkpoint.save import Facts
from dist_train.config.tree import Config, to_tree
from dist_train.data.order import steps_per_epoch
from dist_train.data.sets import Data
from dist_train.errors import ConfigError
from dist_train.loop.average import Average
from dist_train.ranks import dist
from dist_train.ranks.dist import World


@dataclass(frozen=True)
class Found:
    """The checkpoint that a run goes on from."""

    folder: Path
    manifest: Manifest

    def describe(self) -> str:
        """A line for people."""
        m = self.manifest
        return f"resumed from {self.folder}: step {m.step}, written by {m.writer}"


def facts_of(model: nn.Module, data: Data) -> Facts:
    """What a checkpoint of this model and data must fit."""
    tensors = {
        name: Tensor(list(value.shape), str(value.dtype).removeprefix("torch."))
        for name, value in model.state_dict().items()
    }
    return Facts(tensors, len(data.train), sum(map(len, data.tests.values())), data.fingerprint)


def choose(place: Path, world: World, before: float = math.inf) -> tuple[Found | None, list[Damaged]]:
    """The newest whole checkpoint of a run folder, or the one that `place` is, read by all ranks. Collective.

    Args:
        place: the folder.
        world: this rank's place.
        before: of those with fewer steps than this.

    Returns:
        It, None if there is none at all, and what is wrong with those that were passed over.

    Raises:
        ConfigError: there are some, and all are damaged.
    """
    found, damaged = dist.on_main(functools.partial(manifest.listed, place))
    for folder, what in (one for one in found if one[1].step < before):
        from dist_train.checkpoint import storage  # many modules, which a run from the start does not need

        mine = sorted(what.files)[world.rank :: world.size]
        error: Damaged | None = None
        try:
            manifest.verify(folder, what, mine)
            storage.check(folder, what.files)
        except Damaged as caught:
            error = caught
        errors = [e for e in dist.gather(error) if e is not None]
        if not errors:
            return Found(folder, what), damaged
        damaged.append(errors[0])
    if damaged:
        raise ConfigError(
            *(f"checkpoint: {line}" for error in damaged for line in error.lines),
            f"checkpoint.resume: got {place}, whose checkpoints are all damaged, as the lines above say, expected a "
            f"whole one; to start anew, give another --run.dir",
        )
    return None, []


def find(config: Config, world: World, folder: Path, facts: Facts) -> tuple[Found | None, list[Damaged]]:
    """What `checkpoint.resume` asks for, if it fits this run; see `choose`. Raises ConfigError. Collective."""
    asked = config.checkpoint.resume
    if asked == "never":
        return None, []
    found, damaged = choose(folder if asked == "auto" else Path(asked), world)
    lines = differences(found, config, facts) if found else []
    if lines:
        raise ConfigError(*lines)
    return found, damaged


def check_newest(config: Config, folder: Path | None, facts: Facts) -> None:
    """Holds the checkpoint that a run will most likely go on from against the run, before the ranks are joined: the
    newest that a manifest tells of, its other files unread. Raises ConfigError."""
    asked = config.checkpoint.resume
    place = folder if asked == "auto" else Path(asked)
    found = manifest.listed(place)[0] if place is not None and asked != "never" else []
    lines = differences(Found(*found[0]), config, facts) if found else []
    if lines:
        raise ConfigError(*lines)


def differences(found: Found, config: Config, facts: Facts) -> list[str]:
    """A line for everything in which the checkpoint is of another run; empty if this run may go on from it."""
    return [*_never(found, config, facts), *_unless_allowed(found, config, facts)]


def _never(found: Found, config: Config, facts: Facts) -> Iterator[str]:
    m, there, new = found.manifest, found.folder, "for a new run from its weights, write --model.init_from"
    saved = {name: tensor.shape for name, tensor in m.model.items()}
    mine = {name: tensor.shape for name, tensor in facts.model.items()}
    for name in [*mine, *(n for n in saved if n not in mine)]:
        if saved.get(name) != mine.get(name):
            got, expected = (shapes.get(name, "nothing") for shapes in (mine, saved))
            yield f"model: got {name} {got}, expected {expected} as in {there}; {new} {there}"
    for path, got, expected in (
        ("data: training samples", facts.train, m.data.train),
        ("train.global_batch_size", config.train.global_batch_size, m.global_batch_size),
        ("train.drop_last", config.train.drop_last, m.config["train"]["drop_last"]),
        ("optim.name", config.optim.name, m.config["optim"]["name"]),
    ):
        if got != expected:
            yield f"{path}: got {got}, expected {expected} as in {there}; {new} {there}"
    cfg = config.train
    total = cfg.epochs * steps_per_epoch(facts.train, cfg.global_batch_size, cfg.drop_last)
    path, got = "train.epochs", cfg.epochs
    if cfg.max_steps is not None and cfg.max_steps < total:
        path, got, total = "train.max_steps", cfg.max_steps, cfg.max_steps
    if m.step > total or (m.step == total and facts.test and not m.evaluation):
        yield f"{path}: got {got}, expected more than the {m.step} steps that are done in {there}; {new} {there}"


def _unless_allowed(found: Found, config: Config, facts: Facts) -> Iterator[str]:
    saved, mine, allow = found.manifest.config, to_tree(config), config.checkpoint.allow
    optim, before = config.optim, to_tree(Config())  # before: of a checkpoint without the key
    by_step = optim.schedule in ("constant", "step", "cosine_restarts") and optim.warmup_share is None
    pairs: list[tuple[str, Any, Any]] = []
    averages = () if None in (optim.ema, saved["optim"].get("ema")) else AVERAGE  # to begin or end it is only said
    for path in (*BY_NAME, *averages, *(() if by_step else LENGTH)):
        section, key = path.split(".")
        pairs.append((path, mine[section][key], saved[section].get(key, before[section][key])))
    pairs.append(("data", facts.data.fingerprint, found.manifest.data.fingerprint))
    changed = [(path, got, expected) for path, got, expected in pairs if got != expected and path not in allow]
    names = ", ".join([*allow, *(path for path, _, _ in changed)])
    for path, got, expected in changed:
        yield (
            f"{path}: got {got}, expected {expected} as in {found.folder}; to go on with the change, write "
            f"--checkpoint.allow '[{names}]'"
        )


def load_model(found: Found, model: nn.Module) -> None:
    """Fills the weights of a model that no backend has prepared."""
    read_weights(found.folder, model.state_dict())


def read_weights(folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Fills tensors from a checkpoint, by the model's names. Raises Damaged."""
    from dist_train.checkpoint import storage

    storage.read(folder, {f"model.{name}": shards_of(value) for name, value in weights.items()})


def load_state(
    found: Found, backend: Backend, world: World, seed: int, average: Average
) -> tuple[Mapping[str, float], list[str]]:
    """Fills the optimizer's state, the averaged weights and the random generators. Collective.

    Returns:
        What the meter goes on from, and lines about what of the optimizer's state was not loaded.
    """
    from dist_train.checkpoint import storage

    what, saved = found.manifest, storage.tensors(found.folder)
    read: Callable[..., None] = functools.partial(storage.read, found.folder)
    lines = [*backend.load(saved, read), *average.load(saved, read, what.step)]
    if backend.scale and what.loss_scale:
        backend.scale.factor, backend.scale.finite_steps = what.loss_scale.factor, what.loss_scale.finite_steps
    prefix = f"random.{world.rank}."
    mine = {
        path: torch.zeros(saved[path].size, dtype=saved[path].properties.dtype)
        for path in saved
        if path.startswith(prefix)
    }
    peers = (what.mesh or {}).get("tensor", 1)  # which drew alike
    if (what.world_size, peers) == (world.size, world.tensor) and mine:
        read({path: shards_of(value) for path, value in mine.items()})
        randomness.restore({path.removeprefix(prefix): value for path, value in mine.items()}, world.device)
    else:
        dist.seed_draws(seed, world, what.step)
    return what.progress, lines
