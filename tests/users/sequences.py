"""The next of a sequence, which have several lengths: the mean is over their members, and not over sequences."""

import torch
import torch.nn.functional as F
from torch import nn

from dist_train import Batch, Data, Samples, Task

PADDING = -100


def padded(items: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    tokens = nn.utils.rnn.pad_sequence(items, batch_first=True, padding_value=PADDING)
    return {"tokens": tokens[:, :-1], "next": tokens[:, 1:]}


def sequences(n: int = 30, n_test: int = 13) -> Data:
    """Of 2 to 14 numbers below 9, counted in steps that the first one decides."""
    made = [(i + torch.arange(2 + 7 * i % 13) * (1 + i % 2)) % 9 for i in range(n + n_test)]
    train, test = (Samples(made[part], collate=padded, draws=False) for part in (slice(n), slice(n, None)))
    return Data(train, test, facts={"vocab_size": 9})


class Recurrent(nn.Module):
    def __init__(self, vocab_size: int, width: int = 8):
        super().__init__()
        self.table, self.cells = nn.Embedding(vocab_size, width), nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, vocab_size)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.cells(self.table(tokens.clamp(min=0)))[0])


class Next(Task):
    def units(self, batch: Batch) -> torch.Tensor:
        return (batch["next"] != PADDING).sum()

    def sums(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        logits, targets = model(batch["tokens"]).flatten(0, 1), batch["next"].flatten()
        loss = F.cross_entropy(logits, targets, ignore_index=PADDING, reduction="sum")
        return {"loss": loss, "right": (logits.argmax(1) == targets).sum()}

    def metrics(self, sums) -> dict[str, float]:
        return super().metrics(sums) | {"accuracy": float(sums["right"] / sums["units"])}
