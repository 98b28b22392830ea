# torchrun --nproc_per_node=3 own_loop.py '{"backend": {"name": "fsdp2"}}'
"""Her own loop: an autoencoder that takes noise away, which gets less from step to step."""

import json
import sys

import torch
from torch import nn

import dist_train

NOISE = torch.randn(30, 10, generator=torch.Generator().manual_seed(9))  # by the number of the sample


class Autoencoder(nn.Module):
    def __init__(self, input_shape: tuple[int]):
        super().__init__()
        self.inner, self.outer = nn.Linear(input_shape[0], 6), nn.Linear(6, input_shape[0])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(torch.tanh(self.inner(x)))


def measurements(n: int = 30, n_test: int = 13) -> dist_train.Data:
    generator = torch.Generator().manual_seed(10)
    clean = torch.randn(n + n_test, 3, generator=generator) @ torch.randn(3, 10, generator=generator)
    train, test = (dist_train.Columns((clean[part], clean[part])) for part in (slice(n), slice(n, None)))
    return dist_train.Data(train, test, input_shape=(10,))


if __name__ == "__main__":
    more = json.loads(sys.argv[1]) if sys.argv[1:] else {}
    with dist_train.session("own_loop.yaml", data=measurements, model=Autoencoder, **more) as run:
        for step in run.steps():
            for batch in step:
                clean, _ = batch
                noisy = clean + NOISE[batch.ids.cpu()].to(clean) * 0.9**run.step
                step.backward((run.model(noisy) - clean).square().mean(1).sum())
            step.update()
