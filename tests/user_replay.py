"""What users bring whose steps are taken again: a data set with one bad sample, a loss of tokens, one of pairs."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from dist_train.data.sets import Data, Samples
from dist_train.tasks.base import Task

PADDING = -100


def spiked() -> Data:
    """10,000 points on a line; the target of one is wrong by far."""
    x = torch.randn(10_000, 3, generator=torch.Generator().manual_seed(0))
    y = x.sum(1)
    y[7654] = 3000.0
    split = Samples(TensorDataset(x, y), describe=lambda i: f"row {i} of the table", draws=False)
    return Data(split, input_shape=(3,))


class Line(nn.Linear):
    def __init__(self, input_shape):
        super().__init__(input_shape[0], 1)

    def forward(self, x):
        return super().forward(x).squeeze(1)


class Normed(nn.Sequential):
    """With dropout, and a norm over the batch."""

    def __init__(self, input_shape, classes):
        # Without a bias, whose gradient before a norm is rounding alone, which Adam would make as large as any other.
        hidden = nn.Linear(16, 12, bias=False), nn.BatchNorm1d(12), nn.Tanh(), nn.Dropout(0.4)
        super().__init__(nn.Flatten(), *hidden, nn.Linear(12, classes))


def _padded(sentences):
    tokens = nn.utils.rnn.pad_sequence(sentences, batch_first=True, padding_value=PADDING)
    return {"tokens": tokens[:, :-1], "next": tokens[:, 1:]}


def ragged() -> Data:
    """Sentence i has 1 + i % 5 words to guess."""
    return Data(Samples([torch.arange(i, i + 2 + i % 5) % 9 for i in range(30)], collate=_padded))


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Embedding(9, 8), nn.Dropout(0.0), nn.Linear(8, 9))

    def forward(self, tokens):
        return self.layers(tokens.clamp(min=0))


class Next(Task):
    def units(self, batch):
        return (batch["next"] != PADDING).sum()

    def sums(self, model, batch):
        logits = model(batch["tokens"]).flatten(0, 1)
        return {"loss": F.cross_entropy(logits, batch["next"].flatten(), ignore_index=PADDING, reduction="sum")}


class Compared(Task):
    mixes_samples = True

    def sums(self, model, batch):
        images, _ = batch
        rows = F.normalize(model(images), dim=1)[: len(batch)]
        return {"loss": (rows @ rows.T).sum()}
