"""What the workers do with the models of zoo.py: apart from the tests, so that both can import it."""

import dataclasses
import traceback
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.distributed as torch_dist
from torch import nn
from torch.distributed.tensor import DTensor

from dist_train import backends
from dist_train.backends.base import Backend
from dist_train.checkpoint import storage
from dist_train.checkpoint.resume import load_model, read_weights
from dist_train.config.tree import BackendConfig, Config, DataConfig, ModelConfig, OptimConfig, TrackConfig, TrainConfig
from dist_train.errors import ConfigError
from dist_train.loop import optim
from dist_train.loop.meter import Control, Meter
from dist_train.loop.train import train
from dist_train.loop.work import Work
from dist_train.run import assemble
from dist_train.tools.agreement import Trajectory
from dist_train.tools.trajectory import Recorder, weights_of, wide

from parity_cells import this_world
from zoo import CLASSES, SHAPE
from zoo_libraries import LIBRARIES, data_of

GLOBAL_BATCH, STEPS, SAVED_AT = 12, 6, 3
# A rate at which each weight moves by far more than the tolerance, and decay, which moves weights without a gradient.
# Gradients that are 0 but for rounding, as those of a bias below a norm, are 0 to this eps.
ADAMW = OptimConfig(name="AdamW", lr=3e-3, weight_decay=0.1, args={"eps": 1e-3})


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a cell on one rank.

    Args:
        refused: the line with which it was, before anything started.
        broke: the traceback of what was raised otherwise.
        run: losses, norms and final weights, these on rank 0.
        held: parameters and buffers as this rank computes with them at the end, gathered where they are sharded.
        written: the checkpoint of the end holds what `Backend.weights` gives.
        resumed: a run from the checkpoint of step SAVED_AT ends with the same bits; None where that was not tried.
    """

    refused: str = ""
    broke: str = ""
    run: Trajectory | None = None
    held: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    written: bool = True
    resumed: bool | None = None


def config(
    kind: str,
    backend: str = "single",
    n: int = 28,
    optimizer: OptimConfig = ADAMW,
    micro_batch_size: int | None = None,
    clips: bool = False,
    precision: str = "float32",
) -> Config:
    """Two epochs; with n = 28 of 12, 12 and 4 samples, with 24 of full steps alone."""
    start = "sharded" if backend == "fsdp2:sharded" else "auto"
    backend = backend.removesuffix(":sharded")
    name, _, stage = backend.partition(":") if backend.startswith("deepspeed") else (backend, "", "")
    data = DataConfig(name="synthetic", args={"n": n, "n_test": 5, "shape": SHAPE, "classes": CLASSES})
    model = ModelConfig(name=kind if ":" in kind else f"zoo:{kind}")
    if kind in LIBRARIES:
        model, of_sentences = LIBRARIES[kind]
        data = data_of(of_sentences, n, 5)
    return Config(
        data=data,
        model=model,
        optim=optimizer,
        train=TrainConfig(
            epochs=STEPS,
            max_steps=STEPS,
            global_batch_size=GLOBAL_BATCH,
            micro_batch_size=micro_batch_size,
            grad_clip=0.3 if clips else None,
            precision=precision,
            device="cpu",
            eval_every_epochs=None,
        ),
        backend=BackendConfig(name=name, zero_stage=int(stage) if stage else None, start=start),
        track=TrackConfig(every_steps=1),
    )


def run_cells(cells: list[tuple[Config, bool]], place: Path) -> list[Outcome]:
    """In a worker: each config's run, and whether it is tried to resume it.

    Args:
        cells: the runs.
        place: a folder for checkpoints, the same for all ranks.
    """
    return [_outcome(cell, resumes, place / str(i)) for i, (cell, resumes) in enumerate(cells)]


def go_on_elsewhere(first: Config, second: Config, place: Path) -> Outcome:
    """In a worker: the steps after SAVED_AT of a run, by the second config, from what the first one saved there."""
    try:
        _run(first, place, saves=True)
        return Outcome(run=_run(second, place, resumed=True)[0])
    except Exception:
        return Outcome(broke=traceback.format_exc())


def _outcome(cell: Config, resumes: bool, place: Path) -> Outcome:
    try:
        run, backend = _run(cell, place, saves=resumes)
        held, written = _held(backend), _is_written(backend, place / "end")
        resumed = None
        if resumes:
            again, second = _run(cell, place, resumed=True)
            resumed = _same(held, _held(second)) and again.losses == run.losses[SAVED_AT:]
        return Outcome(run=run, held=held, written=written, resumed=resumed)
    except ConfigError as error:
        return Outcome(refused="\n".join(error.lines))
    except Exception:
        return Outcome(broke=traceback.format_exc())


def _run(cell: Config, place: Path, saves: bool = False, resumed: bool = False) -> tuple[Trajectory, Backend]:
    """From the start, saved after SAVED_AT steps; or from there."""
    world = this_world()
    parts = assemble.build(cell, world.device, defers=True)
    middle, progress = place / "middle", None
    if resumed:
        load_model(middle, parts.model, parts.start)
    start = weights_of(parts.model if parts.start is None else assemble.build(cell, world.device).model)
    backend = backends.create(cell, world, parts.findings, parts.start)
    model, optimizer = backend.prepare(parts.model, optim.factory(cell.optim, parts.model, bool(parts.findings.sparse)))
    if resumed:
        backend.load(storage.tensors(middle), lambda shards: storage.read(middle, shards))
        progress = torch.load(place / f"progress{world.rank}", weights_only=True)
    recorder = Recorder()

    def after_step(meter: Meter) -> None:
        if meter.result.steps == SAVED_AT and saves:
            _write(middle, backend)
            torch.save(dict(meter.progress()), place / f"progress{world.rank}")

    evaluation = parts.evaluation(cell, world)
    of = cell, world, backend, model, optimizer, parts.task, parts.feed, evaluation, recorder, Control()
    result = train(Work(*of, after_step, progress))
    losses, norms = ([m[f"train/{of}"] for m in recorder.steps] for of in ("loss", "grad_norm"))
    end = _numbers(backend.weights())
    weights = {name: value for name, value in end.items() if name in start}
    update = float(np.linalg.norm([np.linalg.norm(value - start[name]) for name, value in weights.items()]))
    buffers = {name: value for name, value in end.items() if name not in start}
    return Trajectory(losses, norms, weights, result.evaluation, 0.0, update, buffers), backend


def _write(folder: Path, backend: Backend) -> None:
    group = torch_dist.group.WORLD if torch_dist.is_initialized() else None
    storage.write(folder, backend.state(), group)


def _is_written(backend: Backend, folder: Path) -> bool:
    _write(folder, backend)
    expected = backend.weights()
    if this_world().rank:
        return True
    got = {name: torch.empty_like(value) for name, value in expected.items()}
    read_weights(folder, got)
    return _same(_numbers(expected), _numbers(got))


def _numbers(state: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: wide(value) for name, value in state.items()}


def _held(backend: Backend) -> dict[str, np.ndarray]:
    model = getattr(backend, "bare", None) or backend.model
    found = {f"buffer {name}": value for name, value in model.named_buffers()}
    for name, value in model.named_parameters():
        with _gathered(value):
            found[name] = (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
    return {name: value.numpy() for name, value in found.items()}


def _gathered(value: nn.Parameter):
    if not hasattr(value, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([value])


def _same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name], equal_nan=True) for name in a)
