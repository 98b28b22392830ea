"""Any number of labels for each document, which is a count of its words."""

import torch
from torch import nn

from dist_train import Columns, Data


class Topics(nn.Module):
    """Counts are taken as shares; one temperature for all logits."""

    def __init__(self, input_shape: tuple[int], classes: int):
        super().__init__()
        self.hidden, self.logits = nn.Linear(input_shape[0], 16), nn.Linear(16, classes)
        self.temperature = nn.Parameter(torch.tensor(1.0))

    def forward(self, counts: torch.Tensor) -> torch.Tensor:
        shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
        return self.logits(torch.tanh(self.hidden(shares))) * self.temperature


def documents(n: int = 30, n_test: int = 13) -> Data:
    """Each topic has words of its own, beside words of none."""
    generator = torch.Generator().manual_seed(3)
    topics = torch.rand(n + n_test, 3, generator=generator) < torch.tensor([0.5, 0.3, 0.2])
    rates = 0.4 + topics.float().repeat_interleave(8, 1) * 2
    counts = torch.poisson(torch.cat([rates, torch.ones(n + n_test, 6)], 1), generator=generator)
    train, test = (Columns((counts[part], topics[part].long())) for part in (slice(n), slice(n, None)))
    return Data(train, test, input_shape=(30,), classes=("sport", "politics", "weather"))
