"""Runs that are cut off and resumed, in the workers: apart from the tests, so that both can import it."""

import contextlib
import dataclasses
import json
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

from dist_train.checkpoint import resume
from dist_train.checkpoint.save import Checkpoints
from dist_train.config.tree import CheckpointConfig, Config, RunConfig
from dist_train.data.feed import Feed
from dist_train.errors import ConfigError
from dist_train.ranks import dist, watchdog
from dist_train.run import assemble, session
from dist_train.track.trackers import Trackers

from parity_cells import world_of

HEARD = ("optimizer state", "optim.ema", "audited ")  # how the lines begin that a test sees


class CutOff(Exception):
    """Stands for a kill between two steps: nothing of the process goes on."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run left.

    Args:
        weights: by name, of rank 0; empty if it was cut off.
        ledger: this rank's samples of each step that it began, in order.
        metrics: lines of metrics.jsonl, times left out.
        state_lines: what was said of state that was not loaded, and of audits.
    """

    weights: dict[str, np.ndarray]
    ledger: list[np.ndarray]
    metrics: list[dict]
    state_lines: list[str]


class Freezing(nn.Module):
    """A model whose first layer may be frozen."""

    def __init__(self, input_shape: tuple[int, ...], classes: int, frozen: bool):
        super().__init__()
        self.first, self.second = nn.Linear(36, 20), nn.Linear(20, classes)
        self.first.requires_grad_(not frozen)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x.flatten(1)).relu())


def saving(cell: Config, folder: Path, every_steps: int = 5, **checkpoint) -> Config:
    """The config with checkpoints in a folder."""
    checkpoint = CheckpointConfig(every_steps=every_steps, **checkpoint)
    return dataclasses.replace(cell, run=RunConfig(dir=str(folder)), checkpoint=checkpoint)


def run_once(config: Config, cut_after: int | None = None) -> Outcome:
    """In a worker: a run, from its checkpoint if it has one, cut off after a step."""
    world, ledger, said = world_of(config), [], []
    after_step, from_memory = Checkpoints.after_step, Feed._from_memory

    def cut(self, meter):
        after_step(self, meter)
        if meter.result.steps == cut_after:
            self._wait()  # a thread does not outlive a killed process, and must not outlive this run
            raise CutOff

    def heard(self, text):
        said.extend(line for line in text.splitlines() if line.startswith(HEARD))

    def noted(self, batches, *more):
        for batch in batches:
            ledger.append(batch)
            yield from from_memory(self, [batch], *more)

    parts = assemble.build(config, world.device)
    # The watchdog of a rank that is cut off a little later would take the others for dead.
    unwatched = mock.patch.object(watchdog, "watching", lambda *_: contextlib.nullcontext())
    with mock.patch.object(Checkpoints, "after_step", cut), unwatched, mock.patch.object(Trackers, "say", heard):
        parts.feed._from_memory = noted.__get__(parts.feed)
        with contextlib.suppress(CutOff):
            session.run(config, world, parts, resume.facts_of(parts.model, parts.data))
    dist.gather(None)  # rank 0 has written
    folder, weights = Path(config.run.dir), {}
    if cut_after is None:
        weights = {n: v.double().numpy() for n, v in torch.load(folder / "weights.pt", weights_only=True).items()}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = ("_s", "straggler/", "ranks/")
    metrics = [{k: v for k, v in line.items() if not (k.endswith(timed) or k.startswith(timed))} for line in lines]
    return Outcome(
        weights, ledger, [line for line in metrics if line.keys() - {"step", "epoch"} and "event" not in line], said
    )


def refusal_of(config: Config) -> str:
    """In a worker: the lines with which a run is refused."""
    with pytest.raises(ConfigError) as caught:
        run_once(config)
    return "\n".join(caught.value.lines)


def run_series(runs: list[tuple[Config, int | None]]) -> list[Outcome]:
    """In a worker: one after another."""
    return [run_once(*run) for run in runs]
