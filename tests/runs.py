"""A run inside a test's process or worker, with everything that it said kept."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as torch_dist

from dist_train import assemble, backends, optim
from dist_train.backends.base import Backend
from dist_train.config import Config, load
from dist_train.dist import World
from dist_train.meter import Metrics
from dist_train.train import train

# A few dozen steps in which everything that could depend on the world size happens: a ragged last batch that leaves
# ranks with uneven shares, accumulation, clipping. The learning rate is small enough not to amplify the last bit.
SMALL_RUN = [
    *("--data.name=synthetic", "--data.args.n=301", "--data.args.n_test=103", "--data.args.shape=[1,8,8]"),
    *("--model.hidden=[32,32]", "--optim.lr=0.01", "--train.global_batch_size=32", "--train.epochs=3"),
    *("--train.grad_clip=0.5", "--track.every_steps=1", "--train.threads=1", "--train.device=cpu"),
]


@dataclass
class Ran:
    """What a run gave: its metrics by step, and the final weights."""

    lines: list[Metrics]
    weights: dict[str, np.ndarray]

    def series(self, name: str) -> np.ndarray:
        """A metric over the run."""
        return np.array([line[name] for line in self.lines if name in line])


class Recorder:
    """Keeps the metrics."""

    def __init__(self) -> None:
        self.lines: list[Metrics] = []

    def log(self, metrics: Metrics, line: str) -> None:
        """See meter.Sink."""
        self.lines.append(metrics)


def world_here() -> World:
    """This process's place in the group that the harness made; alone where it made none."""
    if not torch_dist.is_initialized():
        return World(0, 1, 0, 1, torch.device("cpu"), "none")
    rank, size = torch_dist.get_rank(), torch_dist.get_world_size()
    return World(rank, size, rank, size, torch.device("cpu"), "torchrun")


def train_here(argv: list[str], backend_type: type[Backend] | None = None) -> Ran:
    """Runs the config of a command line on this rank, under its own backend or a given one."""
    config: Config = load(argv)
    world = world_here()
    torch.set_num_threads(config.train.threads or 1)
    parts = assemble.build(config, world.device)
    backend = backend_type(config, world) if backend_type else backends.create(config, world)
    model, optimizer = backend.prepare(parts.model, optim.factory(config.optim))
    recorder = Recorder()
    train(config, world, backend, model, optimizer, parts.feed, parts.test_feed, recorder)
    return Ran(recorder.lines, {name: value.numpy() for name, value in backend.state().items()})


def largest_difference(one: Ran, other: Ran) -> dict[str, float]:
    """The largest relative differences of two runs: of a step's loss and norm, of the final weights' norm."""
    out: dict[str, Any] = {}
    for name in ("train/loss", "train/grad_norm", "eval/loss"):
        a, b = one.series(name), other.series(name)
        assert len(a) == len(b) > 0, f"{name}: {len(a)} against {len(b)} values"
        out[name] = float(np.max(np.abs(a - b) / np.abs(a)))
    assert one.weights.keys() == other.weights.keys()
    a, b = (np.concatenate([w.ravel() for w in ran.weights.values()]).astype(np.float64) for ran in (one, other))
    out["weights"] = float(np.linalg.norm(a - b) / np.linalg.norm(a))
    return out
