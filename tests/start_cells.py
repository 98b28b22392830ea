"""What the workers do with models that start without a whole copy: apart from the tests, so that both can import it."""

import gc
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from unittest import mock

import torch
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

from dist_train import backends
from dist_train.backends import start
from dist_train.backends.base import Backend
from dist_train.backends.shards import Shards, local_of
from dist_train.checkpoint import resume
from dist_train.config.tree import Config
from dist_train.loop import optim
from dist_train.run import assemble

from parity_cells import this_world


def hashes(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Of type, shape and bits of each."""
    found = {}
    for name, value in tensors.items():
        value = value.detach().cpu().contiguous()
        bits = (torch.view_as_real(value) if value.is_complex() else value).numpy().tobytes()
        found[name] = hashlib.sha256(f"{value.dtype} {list(value.shape)}".encode() + bits).hexdigest()
    return found


def peak_bytes(function: Callable[[], object], mapped: int | None = None) -> int:
    """The most memory that torch's allocator of the CPU has had more than before, while a function ran, as it reports
    each allocation to torch's profiler; without a file of so many bytes that is mapped, which it reports as well."""
    gc.collect()  # what was left before is not freed meanwhile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        function()
    now = most = 0
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += 0 if event.nbytes() == mapped else event.nbytes()
        most = max(most, now)
    return most


def prepared(config: Config, folder: Path | None = None) -> tuple[Backend, tuple[str, ...], bool]:
    """The model of a run before its first step, with the weights of a checkpoint if there is one; what was said of it,
    and whether it was started sharded."""
    world = this_world()
    parts = assemble.build(config, world.device, warm=folder is None, defers=True)
    if folder is not None:
        resume.load_model(folder, parts.model, parts.start)
    backend = backends.create(config, world, parts.findings, parts.start)
    backend.prepare(parts.model, optim.factory(config.optim, parts.model))
    return backend, parts.loaded, parts.start is not None


def weights_of(config: Config, folder: Path | None = None) -> tuple[dict[str, str], tuple[str, ...], bool]:
    """In a worker: the hashes of all that a prepared model computes with, gathered."""
    backend, said, sharded = prepared(config, folder)
    tensors = dict([*backend.bare.named_parameters(remove_duplicate=False), *backend.bare.named_buffers()])
    whole = {name: v.full_tensor() if isinstance(v, DTensor) else v for name, v in tensors.items()}
    return hashes(whole), said, sharded


def several(cells: list[tuple[Config, Path | None]]) -> list[tuple[dict[str, str], tuple[str, ...], bool]]:
    """In a worker: `weights_of` each."""
    return [weights_of(*cell) for cell in cells]


def memory_of(config: Config, folder: Path | None = None, mapped: int | None = None) -> tuple[int, int, int]:
    """In a worker: the peak of memory until a model is prepared; bytes of this rank's part; and of the whole."""
    kept = []
    peak = peak_bytes(lambda: kept.append(prepared(config, folder)), mapped)
    backend, said, sharded = kept[0]
    assert sharded is (config.backend.start == "sharded"), said
    parameters = list(backend.model.parameters())
    return peak, sum(local_of(p).nbytes for p in parameters), sum(p.numel() * p.element_size() for p in parameters)


def off_by_one(config: Config) -> dict[str, str]:
    """In a worker: a fault, each box filled with the values beside it."""
    copy_boxes = start.copy_boxes

    def shifted(shards: Shards, whole: torch.Tensor) -> None:
        copy_boxes(shards, whole.roll(1, 0) if whole.dim() else whole)

    with mock.patch.object(start, "copy_boxes", shifted):
        return weights_of(config)[0]
