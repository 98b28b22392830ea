"""A script of each library as its users write it, and of PyTorch alone, without our package: wrap the model, and take
steps.

Each is a function of Work that gives the function of a step. The group of ranks, where there is one, has started.
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

Step = Callable[[torch.Tensor, torch.Tensor], None]


@dataclass(frozen=True)
class Work:
    """What a script trains.

    Args:
        model: on the device.
        layers: of the model, those that are sharded each by itself.
        optimizer_of: from parameters with their names to the optimizer.
        loss_of: the mean loss of outputs and targets.
        device: of this rank.
        zero_stage: of DeepSpeed.
        batch_size: samples of a step on a rank.
    """

    model: nn.Module
    layers: tuple[nn.Module, ...]
    optimizer_of: Callable[[Iterable[tuple[str, nn.Parameter]]], torch.optim.Optimizer]
    loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    device: torch.device
    zero_stage: int
    batch_size: int


def single(work: Work) -> Step:
    """PyTorch alone, in one process."""
    return _plain(work.model, work)


def ddp(work: Work) -> Step:
    """DistributedDataParallel."""
    from torch.nn.parallel import DistributedDataParallel

    on_cpu = work.device.type == "cpu"
    model = DistributedDataParallel(work.model, device_ids=None if on_cpu else [work.device.index])
    return _plain(model, work)


def fsdp2(work: Work) -> Step:
    """fully_shard on each layer and on the model."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(work.device.type, (dist.get_world_size(),))
    for layer in work.layers:
        fully_shard(layer, mesh=mesh)
    return _plain(fully_shard(work.model, mesh=mesh), work)


def _plain(model: nn.Module, work: Work) -> Step:
    optimizer = work.optimizer_of(model.named_parameters())

    def step(inputs: torch.Tensor, targets: torch.Tensor) -> None:
        loss = work.loss_of(model(inputs), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def accelerate(work: Work) -> Step:
    """Accelerate, without its data loader."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=work.device.type == "cpu")
    model, optimizer = accelerator.prepare(work.model, work.optimizer_of(work.model.named_parameters()))

    def step(inputs: torch.Tensor, targets: torch.Tensor) -> None:
        loss = work.loss_of(model(inputs), targets)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()

    return step


def deepspeed(work: Work) -> Step:
    """ZeRO around torch's optimizer."""
    if work.device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    # Compiled at its first use, for a time that is not the library's. We leave it out as well.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    bucket = min(sum(p.numel() for p in work.model.parameters()), 500_000_000)  # it allocates its default for any model
    settings = {
        "train_micro_batch_size_per_gpu": work.batch_size,
        "zero_optimization": {"stage": work.zero_stage, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = work.optimizer_of(work.model.named_parameters())
    engine, *_ = deepspeed.initialize(model=work.model, optimizer=optimizer, config=settings)

    def step(inputs: torch.Tensor, targets: torch.Tensor) -> None:
        loss = work.loss_of(engine(inputs), targets)
        engine.backward(loss)
        engine.step()

    return step


LIBRARIES = {"single": single, "ddp": ddp, "fsdp2": fsdp2, "accelerate": accelerate, "deepspeed": deepspeed}
