"""A script of each library without our package: joins the ranks, wraps the model, takes one step on random digits.

torchrun --standalone --nproc_per_node=2 benchmarks/bare.py {ddp,fsdp2,accelerate,deepspeed}
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn

BATCH_SIZE = 32  # of a rank: half of our default global batch
DONE = "first step done"


def mlp() -> nn.Module:
    """The default model on digits, with its 8x8 pixels."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    )


def loss_of(model: nn.Module) -> torch.Tensor:
    """The loss of a random batch."""
    inputs, targets = torch.randn(BATCH_SIZE, 1, 8, 8), torch.randint(10, (BATCH_SIZE,))
    return nn.functional.cross_entropy(model(inputs), targets)


def ddp() -> None:
    """DistributedDataParallel."""
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo")
    model = DistributedDataParallel(mlp())
    optimizer = torch.optim.AdamW(model.parameters())
    loss_of(model).backward()
    optimizer.step()


def fsdp2() -> None:
    """fully_shard on each layer and on the model."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = mlp()
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    loss_of(model).backward()
    optimizer.step()


def accelerate() -> None:
    """Accelerate on the CPU."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = mlp()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    accelerator.backward(loss_of(model))
    optimizer.step()


def deepspeed() -> None:
    """ZeRO stage 2 around torch's AdamW."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    # Compiled at its first use, for a time that is not the library's start. We leave it out as well.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    dist.init_process_group("gloo")
    model = mlp()
    settings = {
        "train_micro_batch_size_per_gpu": BATCH_SIZE,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 10**6, "allgather_bucket_size": 10**6},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=settings)
    engine.backward(loss_of(engine))
    engine.step()


LIBRARIES = {"ddp": ddp, "fsdp2": fsdp2, "accelerate": accelerate, "deepspeed": deepspeed}

if __name__ == "__main__":
    LIBRARIES[sys.argv[1]]()
    if dist.get_rank() == 0:
        print(DONE, flush=True)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # as our package does: taking Python down costs CPU seconds that are not the start's
