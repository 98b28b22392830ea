"""What a backend did, step by step. How far that is from another is measured in agreement.py.

Both go through the very loop that users train with: same data, same order, same initial weights by construction.
"""

import dataclasses
import statistics
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dist_train import backends
from dist_train.backends import mesh
from dist_train.config.load import load
from dist_train.config.paths import written
from dist_train.config.tree import Config, group_of
from dist_train.data.agree import agree
from dist_train.errors import ConfigError, OwnCodeError
from dist_train.loop import optim
from dist_train.loop.meter import Control, Recorder, Result
from dist_train.loop.train import train
from dist_train.loop.work import Work
from dist_train.models.statistics import norms
from dist_train.ranks import dist, ending
from dist_train.ranks.dist import World
from dist_train.ranks.launcher import Launcher, detect
from dist_train.run import assemble
from dist_train.run.batch_statistics import trained_norms
from dist_train.tools.agreement import Difference, Trajectory, beyond, difference, limit, spread

# How often the reference is run again from other weights, and by how many roundings each weight is moved at most. More
# than the one that a run begins with: what is near a kink is then seen by one of a few runs, and a jump has its size
# however small the move.
MOVES, MOVED = 5, 16
TENSORS = ("weights", "buffers")
# Layers with which a sample's output depends on the others of its batch.
MIXING = (nn.modules.batchnorm._BatchNorm,)


def trajectory(config: Config, world: World, moved: int | None = None) -> Trajectory:
    """Trains to the end of the config, in a process whose group has started; see `measured`."""
    return measured(config, world, moved)[0]


def measured(config: Config, world: World, moved: int | None = None) -> tuple[Trajectory, Result]:
    """The same, and what the loop itself says of the run. Collective.

    Args:
        config: has track.every_steps 1, so that every step is seen.
        world: this rank's place.
        moved: the seed by which the initial weights are moved by a few roundings; None leaves them. In the final
            weights the move itself is taken back: what stays is what training made of it.
    """
    assert config.track.every_steps == 1
    parts = assemble.build(config, world.device)
    agree(parts.data, parts.feeds, world)
    drawn = weights_of(parts.model)
    if moved is not None:
        _move(parts.model, moved)
    start = weights_of(parts.model)
    backend = backends.create(config, world, parts.findings)
    optimizer_fn = optim.factory(config.optim, parts.model, parts.unfused(config))
    model, optimizer = backend.prepare(parts.model, optimizer_fn)
    recorder, evaluation = Recorder(), parts.evaluation(config, world)
    of = config, world, backend, model, optimizer, parts.task, parts.feed, evaluation, recorder, Control()
    result = train(Work(*of, after_step=lambda meter: None))
    end = {name: wide(value) for name, value in backend.weights().items()}
    weights = {name: value for name, value in end.items() if name in start}
    run = Trajectory(
        [m["train/loss"] for m in recorder.steps],
        [m["train/grad_norm"] for m in recorder.steps],
        {name: value - (start[name] - drawn[name]) for name, value in weights.items()},
        result.evaluation,
        _rate(config, result.step_ms),
        float(np.linalg.norm([np.linalg.norm(value - start[name]) for name, value in weights.items()])),
        {name: value for name, value in end.items() if name not in start},
    )
    return run, result


def weights_of(model: nn.Module) -> dict[str, np.ndarray]:
    """The parameters by all of their names, as `wide` gives them."""
    return {name: wide(p) for name, p in model.named_parameters(remove_duplicate=False)}


def wide(value: torch.Tensor) -> np.ndarray:
    """A copy in float64 or complex128."""
    return value.detach().cpu().to(torch.complex128 if value.is_complex() else torch.float64, copy=True).numpy()


@torch.no_grad()
def _move(model: nn.Module, seed: int) -> None:
    """Multiplies each weight by a number of its own, at most `MOVED` roundings from 1."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        by = torch.rand(p.shape, generator=generator, dtype=torch.float64) * 2 - 1
        kind = p.real.dtype if p.is_complex() else p.dtype
        p.mul_((1 + by * MOVED * torch.finfo(kind).eps).to(p.device, kind))


def rounding(config: Config, world: World, reference: Trajectory) -> Difference:
    """What rounding alone does to a run: the spread of some that start from weights moved by a few roundings."""
    return spread([trajectory(config, world, seed) for seed in range(MOVES)], reference)


def depends_on_share(config: Config, world: World, reference: Trajectory, allowed: Difference | float) -> str:
    """How the same run of one process differs where its batches are cut in two, and what of the model may be why;
    empty if it does not differ, or where batches cannot be cut: ranks exchange the statistics of the whole step."""
    cfg, group = config.train, group_of(config.model)
    cut = (cfg.micro_batch_size or cfg.global_batch_size) // 2 // (group or 1) * (group or 1)
    parts = assemble.build(config, world.device)
    if not cut or (group is None and trained_norms(parts.model)):
        return ""
    config = dataclasses.replace(config, train=dataclasses.replace(cfg, micro_batch_size=cut))
    try:
        found = beyond(difference(trajectory(config, world), reference), allowed)
    except Exception as error:
        found = f"{type(error).__name__}: {error}".splitlines()[0]
    if not found:
        return ""
    others = [m for m in parts.model.modules() if m not in norms(parts.model).values()]
    layers = sorted({type(m).__name__ for m in others if isinstance(m, MIXING)})
    why = [*layers, *(f"draws by {draw}" for draw in parts.findings.draws)]
    return f"{found} ({', '.join(why)})" if why else found


def _rate(config: Config, step_ms: list[float]) -> float:
    return config.train.global_batch_size / statistics.median(step_ms[len(step_ms) // 2 :]) * 1e3


def main(folder: Path, launcher: Launcher) -> None:
    """A cell of the table of `parity`: reads its configs from the folder, and writes there what rank 0 saw.

    `own.yaml` gives own.npz, and float64.yaml, where it is there, float64.npz. A process alone is the reference, and
    says also what rounding does (rounding.npz), why there is no float64 (float64.txt), and how the result depends on
    each rank's share of a batch (share.txt).
    """
    config = load(["--config", written(str(folder / "own.yaml"))])
    device = dist.resolve_device(config.train.device, launcher.local_rank)
    dist.set_threads(config.train.threads, launcher.local_world_size)
    exact = folder / "float64.yaml"
    wide = load(["--config", written(str(exact))]) if exact.exists() else None
    with dist.joined(launcher, device, tensor=mesh.of(config, launcher.world_size).tensor) as world:
        run = trajectory(config, world)
        if launcher.name == "none":
            _refer(config, wide, world, run, folder)
        elif wide is not None:
            exactly = trajectory(wide, world)
            if world.is_main:
                save(exactly, folder / "float64.npz")
        if world.is_main:
            save(run, folder / "own.npz")


def _refer(config: Config, wide: Config | None, world: World, run: Trajectory, folder: Path) -> None:
    around = rounding(config, world, run) if config.train.precision != "float64" else None
    if around is not None:
        np.savez(folder / "rounding.npz", losses=around.losses, grad_norms=around.grad_norms, weights=around.weights)
    of, reference, allowed = config, run, limit(config.train.precision, around)
    if wide is not None:
        try:
            exactly = trajectory(wide, world)
        except Exception as error:  # a model may ask for its own format
            (folder / "float64.txt").write_text(f"{type(error).__name__}: {error}".splitlines()[0], encoding="utf-8")
        else:
            save(exactly, folder / "float64.npz")
            of, reference, allowed = wide, exactly, limit("float64")
    (folder / "share.txt").write_text(depends_on_share(of, world, reference, allowed), encoding="utf-8")


def save(run: Trajectory, path: Path) -> None:
    """Writes a file that `read` reads."""
    tensors = {f"{kind}/{name}": value for kind in TENSORS for name, value in getattr(run, kind).items()}
    rest = {name: value for name, value in vars(run).items() if name not in (*TENSORS, "evaluation")}
    np.savez(path, **tensors, **rest, **run.evaluation)


def read(path: Path) -> Trajectory:
    """What `save` wrote. Executes nothing from the file."""
    with np.load(path, allow_pickle=False) as file:
        tensors = {
            kind: {name.removeprefix(f"{kind}/"): file[name] for name in file if name.startswith(f"{kind}/")}
            for kind in TENSORS
        }
        evaluation = {name: float(file[name]) for name in file if name.startswith("eval/")}
        losses, grad_norms = file["losses"].tolist(), file["grad_norms"].tolist()
        rate, update = float(file["samples_per_s"]), float(file["update"])
        return Trajectory(losses, grad_norms, tensors["weights"], evaluation, rate, update, tensors["buffers"])


def read_rounding(path: Path) -> Difference:
    """What rounding does to the reference. Executes nothing from the file."""
    with np.load(path, allow_pickle=False) as file:
        return Difference(file["losses"], file["grad_norms"], float(file["weights"]))


if __name__ == "__main__":
    launcher, code = Launcher(), ending.OK
    try:
        launcher = detect()
        main(Path(sys.argv[1]), launcher)
    except ConfigError as error:
        if not isinstance(error, OwnCodeError):  # which is no reason not to run, but a failure
            Path(sys.argv[1], "refused.txt").write_text(error.lines[0], encoding="utf-8")
        code = ending.refuse(error, launcher)
    except BaseException as error:
        code = ending.fail(error, launcher)
    ending.leave(code)
