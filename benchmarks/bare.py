"""A script of each library without our package: joins the ranks, wraps the model, takes one step on random digits.

torchrun --standalone --nproc_per_node=2 benchmarks/bare.py {ddp,fsdp2,accelerate,deepspeed}
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn

from dist_train.bench.bare import LIBRARIES, Work  # which imports torch and the library alone

BATCH_SIZE = 32  # of a rank: half of our default global batch
DONE = "first step done"


def main(library: str) -> None:
    """The default model on digits, with its 8x8 pixels."""
    layers = [nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)]
    model, sharded = nn.Sequential(nn.Flatten(), *layers), tuple(layers[::2])
    of = nn.functional.cross_entropy, torch.device("cpu")
    if library != "accelerate":  # which joins the ranks by itself
        dist.init_process_group("gloo")
    step = LIBRARIES[library](Work(model, sharded, torch.optim.AdamW, *of, zero_stage=2, batch_size=BATCH_SIZE))
    step(torch.randn(BATCH_SIZE, 1, 8, 8), torch.randint(10, (BATCH_SIZE,)))


if __name__ == "__main__":
    main(sys.argv[1])
    if dist.get_rank() == 0:
        print(DONE, flush=True)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # as our package does: taking Python down costs CPU seconds that are not the start's
