"""Ranks and collectives. Every function is the identity in a process without a group, so the loop has no rank test."""

import functools
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as torch_dist

from dist_train.columns import columns
from dist_train.errors import ConfigError
from dist_train.ranks import rendezvous
from dist_train.ranks.launcher import Launcher

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

GROUP_TIMEOUT_S = 600
PATIENCE_DAYS = 365


@dataclass(frozen=True)
class World:
    """This process among all, and the device it computes on.

    Ranks that follow each other, `tensor` of them, split each layer between them, and take the same samples. Such a
    group is one data rank.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    launcher: str
    master_addr: str = "127.0.0.1"
    tensor: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that writes and prints."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """This rank's place among those that share out samples."""
        return self.rank // self.tensor

    @property
    def data_size(self) -> int:
        """How many share out samples."""
        return self.size // self.tensor

    @property
    def part(self) -> tuple[int, int]:
        """This rank's place among those that split layers between them, and how many these are."""
        return self.rank % self.tensor, self.tensor


def resolve_device(name: str, local_rank: int) -> torch.device:
    """The device of a rank: `auto` is the accelerator that torch finds, else the CPU. Raises ConfigError."""
    # check_available: without it torch 2.14 with CUDA libraries answers cuda on a machine with no GPU.
    found = torch.accelerator.current_accelerator(check_available=True)
    kinds = ["cpu"] + ([found.type] if found else [])
    if name == "auto" and os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true":
        name = "cpu"  # accelerate launch --cpu
    kind = kinds[-1] if name == "auto" else name
    if kind not in kinds:
        raise ConfigError(
            f"train.device: got {name}, but this machine has {' and '.join(kinds)}; expected auto or one of "
            f"{', '.join(kinds)}, for example --train.device auto"
        )
    if kind == "cpu":
        return torch.device("cpu")
    count = torch.accelerator.device_count()
    if local_rank >= count:
        raise ConfigError(
            f"train.device: got {local_rank + 1} or more ranks on a node with {count} {kind} devices, expected at "
            f"most one rank a device; start {count} processes a node, or add --train.device cpu"
        )
    return torch.device(kind, local_rank)


def set_threads(threads: int | None, local_size: int) -> None:
    """Fixes the CPU threads of this rank: the count changes speed, and the last bits of sums."""
    if threads is None:
        # torch has taken OMP_NUM_THREADS where it is set, else the cores of the whole machine.
        shared = 1 if "OMP_NUM_THREADS" in os.environ else local_size
        threads = max(1, torch.get_num_threads() // shared)
    torch.set_num_threads(threads)


def seed_draws(seed: int, world: World, step: int = 0) -> None:
    """Seeds what a model draws in training, such as dropout: by the run's seed, and otherwise on every data rank. A run
    that goes on at another world size from `step` on draws anew."""
    entropy = [seed, world.data_rank, *([world.data_size, step] if step else [])]
    torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]))


@contextmanager
def joined(
    launcher: Launcher, device: torch.device, timeout_s: float = GROUP_TIMEOUT_S, tensor: int = 1
) -> Iterator[World]:  # fmt: skip
    """Joins the processes that were started together. At the end the group is left after every rank has come there;
    on an error at once, so that the other ranks notice.

    Args:
        launcher: the place of this rank.
        device: of this rank.
        timeout_s: that joining may take, and a collective.
        tensor: ranks that split each layer between them; see World.
    """
    global _data, _timeout
    _timeout = timedelta(seconds=timeout_s)
    place = launcher.rank, launcher.world_size, launcher.local_rank, launcher.local_world_size
    world = World(*place, device, launcher.name, launcher.master_addr, tensor)
    if launcher.name == "none":
        yield world
        return
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index)
    with rendezvous.store(launcher, timeout_s) as store, _quiet_gloo():
        torch_dist.init_process_group(
            torch_dist.get_default_backend_for_device(device),
            store=store,
            rank=launcher.rank,
            world_size=launcher.world_size,
            timeout=_timeout,
            device_id=device if device.type == "cuda" else None,
        )
        _data = data_group(world)
    yield world
    torch_dist.barrier()
    torch_dist.destroy_process_group()
    _forget()


def _forget() -> None:
    """What was made of the group that was left."""
    global _data
    _data = None
    for made in (_hosts, mesh):
        made.cache_clear()
    _meshes.clear()


@contextmanager
def imagined(size: int, local_size: int, tensor: int = 1) -> Iterator[World]:
    """This process as rank 0 of so many on the CPU, where there are no others: a collective returns at once, and says
    nothing of values. For what only asks for sizes.

    Args:
        size: ranks.
        local_size: on a node.
        tensor: ranks that split each layer between them; see World.
    """
    global _data
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the kind of group as well

    torch_dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    world = World(0, size, 0, local_size, torch.device("cpu"), "torchrun", tensor=tensor)
    try:
        _data = data_group(world)
        yield world
    finally:
        torch_dist.destroy_process_group()
        _forget()


# -- among the ranks that share out samples ----------------------------------------------------------------------------
# Where layers are split between ranks, these are those with the same place in that; each such group does the same.

_data: torch_dist.ProcessGroup | None = None  # None: all ranks


def data_group(world: World) -> torch_dist.ProcessGroup | None:
    """A group of the ranks with this one's place in the tensor dimension; None where that has one rank. Collective."""
    if world.tensor == 1:
        return None
    peers = [list(range(first, world.size, world.tensor)) for first in range(world.tensor)]
    return torch_dist.new_subgroups_by_enumeration(peers)[0]


def sum_(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of `tensor` over the data ranks, in place, on every rank. Collective."""
    if torch_dist.is_initialized():
        torch_dist.all_reduce(tensor, group=_data)
    return tensor


def stack(tensor: torch.Tensor) -> torch.Tensor:
    """The tensors of all data ranks, [data ranks, ...] in their order, on every rank. Collective."""
    return _stacked(tensor, _data)


def _stacked(tensor: torch.Tensor, group: torch_dist.ProcessGroup | None) -> torch.Tensor:
    if not torch_dist.is_initialized():
        return tensor[None]
    every = tensor.new_empty(torch_dist.get_world_size(group), *tensor.shape)
    torch_dist.all_gather(list(every), tensor, group=group)
    return every


def gather_data(value: Any) -> list[Any]:
    """Every data rank's `value` in their order, on every rank. Collective."""
    return gather(value, _data)


Pending = Callable[[], torch.Tensor]


def sum_later(tensor: torch.Tensor) -> Pending:
    """Begins to add up `tensor` over the data ranks, in place, and gives a function that returns the sum. Collective;
    other collectives may begin before it is asked for."""
    if not torch_dist.is_initialized():
        return lambda: tensor
    work = torch_dist.all_reduce(tensor, group=_data, async_op=True)

    def done() -> torch.Tensor:
        work.wait()  # of an accelerator, its stream waits, and not the host
        return tensor

    return done


def gather_samples(mine: torch.Tensor, count: int) -> tuple[torch.Tensor, int]:
    """The rows of all data ranks, and where this rank's begin, for a loss that compares each sample with those of the
    whole batch. Gradients flow back to the rank that a row is of. Collective, forward and backward.

    Args:
        mine: [rows, ...].
        count: how many rows count, from the first: `len(batch)`. A stand-in has none.

    Returns:
        [all rows, ...] in order of data rank, and the number of the rows before this rank's.
    """
    if not torch_dist.is_initialized():
        return mine[:count], 0
    every = gather_numbers([count])
    counts = [int(every[rank][0]) for rank in torch_dist.get_process_group_ranks(_data)]
    return _Gathered.apply(mine, tuple(counts)), sum(counts[: torch_dist.get_rank(_data)])


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mine: torch.Tensor, counts: tuple[int, ...]) -> torch.Tensor:
        ctx.counts, ctx.rows = counts, len(mine)
        padded = mine.new_zeros(max(counts), *mine.shape[1:])
        count = counts[torch_dist.get_rank(_data)]
        padded[:count] = mine[:count]
        parts = [torch.empty_like(padded) for _ in counts]
        torch_dist.all_gather(parts, padded, group=_data)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        gradient = gradient.contiguous()
        torch_dist.all_reduce(gradient, group=_data)  # every rank's loss depends on every row
        rank = torch_dist.get_rank(_data)
        start, count = sum(ctx.counts[:rank]), ctx.counts[rank]
        mine = gradient.new_zeros(ctx.rows, *gradient.shape[1:])
        mine[:count] = gradient[start : start + count]
        return mine, None


def from_last(tensor: torch.Tensor) -> torch.Tensor:
    """The last data rank's `tensor`, in place, on every rank. Collective."""
    if torch_dist.is_initialized():
        torch_dist.broadcast(tensor, group=_data, group_src=torch_dist.get_world_size(_data) - 1)
    return tensor


# -- among all ranks ---------------------------------------------------------------------------------------------------


_timeout = timedelta(seconds=GROUP_TIMEOUT_S)  # of collectives, now


@functools.cache
def mesh(device: str, sizes: tuple[int, ...], names: tuple[str, ...]) -> "DeviceMesh":
    """All ranks in several dimensions, the last of which are ranks that follow each other. Made once for a run: each
    dimension has groups of its own. Collective.

    Args:
        device: its type.
        sizes: ranks of each dimension.
        names: of the dimensions.
    """
    from torch.distributed.device_mesh import init_device_mesh  # many modules, which a run without one does not need

    with _quiet_gloo():
        found = init_device_mesh(device, sizes, mesh_dim_names=names)
    for group in found.get_all_groups():
        _set_timeout(group)
    _meshes.append(found)
    return found


_meshes: list["DeviceMesh"] = []


def _set_timeout(group: torch_dist.ProcessGroup | None) -> None:
    set_timeout = getattr(torch_dist, "set_timeout", None) or torch_dist.distributed_c10d._set_pg_timeout  # torch 2.8
    set_timeout(_timeout, group)


@contextmanager
def patient() -> Iterator[None]:
    """Where a watchdog judges what takes too long, collectives do not: their time passes also while a process is
    suspended. Holds for the groups of meshes too, also those that are made meanwhile."""
    if not torch_dist.is_initialized():
        yield
        return
    _set_timeouts(timedelta(days=PATIENCE_DAYS))
    try:
        yield
    finally:
        _set_timeouts(timedelta(seconds=GROUP_TIMEOUT_S))


def _set_timeouts(timeout: timedelta) -> None:
    global _timeout
    _timeout = timeout
    of_meshes = [group for one in _meshes for group in one.get_all_groups()]
    for group in dict.fromkeys([None, *([] if _data is None else [_data]), *of_meshes]):
        _set_timeout(group)


def sum_over_all(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of `tensor` over all ranks, those that split layers between them too, in place, on every rank.
    Collective."""
    if torch_dist.is_initialized():
        torch_dist.all_reduce(tensor)
    return tensor


def stack_all(tensor: torch.Tensor) -> torch.Tensor:
    """The tensors of all ranks, [ranks, ...] in order of rank, on every rank. Collective."""
    return _stacked(tensor, None)


def gather_numbers(values: list[float]) -> list[list[float]]:
    """Every rank's numbers, in order of rank. Collective, among the hosts: no device waits for it."""
    if not torch_dist.is_initialized():
        return [values]
    mine = torch.tensor(values, dtype=torch.float64)
    rows = torch.empty(torch_dist.get_world_size(), len(values), dtype=torch.float64)
    torch_dist.all_gather(list(rows), mine, group=_hosts())
    return rows.tolist()


@functools.cache
def _hosts() -> torch_dist.ProcessGroup | None:
    """A group of all ranks for tensors on the CPU; None is the default group, where that one is."""
    return None if torch_dist.get_backend() in ("gloo", "fake") else group_of_hosts()


def group_of_hosts(timeout_s: float | None = None) -> torch_dist.ProcessGroup:
    """Another group of all ranks, for tensors on the CPU under any backend. Collective.

    Args:
        timeout_s: that a collective of it may take; None for as long as torch has it.
    """
    with _quiet_gloo():
        return torch_dist.new_group(backend="gloo", timeout=None if timeout_s is None else timedelta(seconds=timeout_s))


@contextmanager
def _quiet_gloo() -> Iterator[None]:
    """Without what torch 2.8's gloo writes on stdout about its connections, amid what a command answers there."""
    if not torch.__version__.startswith("2.8."):
        yield
        return
    sys.stdout.flush()
    stdout, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)
        os.close(nowhere)


def gather(value: Any, group: torch_dist.ProcessGroup | None = None) -> list[Any]:
    """Every rank's `value` in order of rank, on every rank of the group. Collective; None is the group of all."""
    if not torch_dist.is_initialized():
        return [value]
    values: list[Any] = [None] * torch_dist.get_world_size(group)
    torch_dist.all_gather_object(values, value, group)
    return values


def on_main(function: Callable[[], Any]) -> Any:
    """What `function` returns on rank 0, on every rank. A ConfigError there is raised on all. Collective."""
    if not torch_dist.is_initialized():
        return function()
    answer: list[Any] = [None, None]
    if torch_dist.get_rank() == 0:
        try:
            answer[0] = function()
        except ConfigError as error:
            answer[1] = error.lines
    torch_dist.broadcast_object_list(answer)
    if answer[1] is not None:
        raise ConfigError(*answer[1])
    return answer[0]


def rank_table(world: World, place: Mapping[str, int] | None = None) -> str:
    """Rank, host, process and device of every rank, a line each. Collective.

    Args:
        world: this rank's place.
        place: of this rank in a mesh, by dimension.
    """
    device, found = f"{world.device} ({device_name(world.device)})", place or {}
    row = (world.rank, *found.values(), platform.node(), world.local_rank, os.getpid(), device)
    head = ("rank", *found, "host", "local rank", "process", "device")
    return columns([head, *[tuple(map(str, r)) for r in gather(row)]])


def device_name(device: torch.device) -> str:
    """The device's model, or how many threads the CPU works with."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
