"""What a backend did, step by step, and how far that is from another: the measure of "the backend changes nothing".

Both go through the very loop that users train with: same data, same order, same initial weights by construction.
"""

import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dist_train import assemble, backends, dist, ending, optim
from dist_train.config import Config, load
from dist_train.dist import World
from dist_train.errors import ConfigError
from dist_train.launcher import Launcher, detect
from dist_train.meter import Control, Metrics, Result
from dist_train.train import train


@dataclass(frozen=True)
class Trajectory:
    """A run as numbers.

    Args:
        losses: of each step, the mean over its global batch.
        grad_norms: of each step, before clipping.
        weights: after the last step, float64 by the model's own names; of rank 0, the others may have none.
        evaluation: `eval/loss` and `eval/accuracy` after the last step.
        samples_per_s: of all ranks together, by the median step of the second half.
    """

    losses: list[float]
    grad_norms: list[float]
    weights: dict[str, np.ndarray]
    evaluation: Metrics
    samples_per_s: float


@dataclass(frozen=True)
class Difference:
    """The largest relative differences of a run from a reference.

    Args:
        loss: over the steps and the final evaluation.
        grad_norm: over the steps.
        weights: over the tensors: the norm of the difference by the norm of the reference.
    """

    loss: float
    grad_norm: float
    weights: float

    @property
    def worst(self) -> float:
        """The largest of the three; nan if any is."""
        return float(np.max([self.loss, self.grad_norm, self.weights]))  # numpy's max keeps a nan, Python's may not


class Recorder:
    """Keeps every line of metrics instead of writing it."""

    def __init__(self) -> None:
        self.steps: list[Metrics] = []

    def log(self, metrics: Metrics, line: str | None) -> None:
        """See meter.Sink."""
        if "train/loss" in metrics:
            self.steps.append(metrics)


def trajectory(config: Config, world: World) -> Trajectory:
    """Trains to the end of the config, in a process whose group has started; see `measured`."""
    return measured(config, world)[0]


def measured(config: Config, world: World) -> tuple[Trajectory, Result]:
    """The same, and what the loop itself says of the run. Collective.

    Args:
        config: has track.every_steps 1, so that every step is seen.
        world: this rank's place.
    """
    assert config.track.every_steps == 1
    parts = assemble.build(config, world.device)
    backend = backends.create(config, world, parts.findings)
    model, optimizer = backend.prepare(parts.model, optim.factory(config.optim))
    recorder = Recorder()
    result = train(
        config, world, backend, model, optimizer, parts.feed, parts.test_feed, recorder, lambda meter: None, Control()
    )
    run = Trajectory(
        [m["train/loss"] for m in recorder.steps],
        [m["train/grad_norm"] for m in recorder.steps],
        {name: value.double().numpy() for name, value in backend.weights().items()},
        result.evaluation,
        _rate(config, result.step_ms),
    )
    return run, result


def _rate(config: Config, step_ms: list[float]) -> float:
    return config.train.global_batch_size / statistics.median(step_ms[len(step_ms) // 2 :]) * 1e3


def main(folder: Path, launcher: Launcher) -> None:
    """A cell of the table of `parity`: reads the config from the folder, and writes the trajectory of rank 0 there."""
    config = load(["--config", str(folder / "config.yaml")])
    device = dist.resolve_device(config.train.device, launcher.local_rank)
    dist.set_threads(config.train.threads, launcher.local_world_size)
    with dist.joined(launcher, device) as world:
        result = trajectory(config, world)
        if world.is_main:
            save(result, folder / "trajectory.npz")


def save(run: Trajectory, path: Path) -> None:
    """Writes a file that `read` reads."""
    weights = {f"weights/{name}": value for name, value in run.weights.items()}
    rest = {name: value for name, value in vars(run).items() if name not in ("weights", "evaluation")}
    np.savez(path, **weights, **rest, **run.evaluation)


def read(path: Path) -> Trajectory:
    """What `save` wrote. Executes nothing from the file."""
    with np.load(path, allow_pickle=False) as file:
        weights = {name.removeprefix("weights/"): file[name] for name in file if name.startswith("weights/")}
        evaluation = {name: float(file[name]) for name in file if name.startswith("eval/")}
        losses, grad_norms = file["losses"].tolist(), file["grad_norms"].tolist()
        return Trajectory(losses, grad_norms, weights, evaluation, float(file["samples_per_s"]))


def difference(run: Trajectory, reference: Trajectory) -> Difference:
    """How far `run` is from `reference`. Raises ValueError where they are not the same steps or weights."""
    for what, got, expected in (
        ("steps", len(run.losses), len(reference.losses)),
        ("weights", _shapes(run.weights), _shapes(reference.weights)),
    ):
        if got != expected:
            raise ValueError(f"{what}: got {got}, expected {expected} as in the reference")
    ends = [[*t.losses, t.evaluation["eval/loss"]] for t in (run, reference)]
    return Difference(
        _largest(*ends),
        _largest(run.grad_norms, reference.grad_norms),
        float(np.max([_distance(run.weights[name], expected) for name, expected in reference.weights.items()])),
    )


def _shapes(weights: dict[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    return {name: value.shape for name, value in weights.items()}


def _largest(values: list[float], expected: list[float]) -> float:
    a, b = np.array(values), np.array(expected)
    return float(np.max(np.abs(a - b) / np.abs(b)))


def _distance(value: np.ndarray, expected: np.ndarray) -> float:
    size = float(np.linalg.norm(expected)) or 1.0  # zeros, and tensors of no elements
    return float(np.linalg.norm(value - expected)) / size


if __name__ == "__main__":
    launcher, code = Launcher(), ending.OK
    try:
        launcher = detect()
        main(Path(sys.argv[1]), launcher)
    except ConfigError as error:
        code = ending.refuse(error, launcher)
    except BaseException as error:
        code = ending.fail(error, launcher)
    ending.leave(code)
