"""Each sample is to be told from all others of the global batch, by a second view of it."""

import torch
import torch.nn.functional as F
from torch import nn

from dist_train import Batch, Columns, Data, Task
from dist_train.ranks.dist import gather_samples


class Encoder(nn.Module):
    def __init__(self, input_shape: tuple[int], width: int = 8):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(input_shape[0], 16), nn.Tanh(), nn.Linear(16, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.layers(x), dim=1)


class Contrast(Task):
    mixes_samples = True

    def sums(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        both = model(batch["views"].flatten(0, 1)).view(len(batch["views"]), 2, -1)[: len(batch)]
        everyone, before = gather_samples(both, len(batch))
        logits = both[:, 0] @ everyone[:, 1].T / 0.2
        own = torch.arange(before, before + len(batch), device=logits.device)
        return {
            "loss": F.cross_entropy(logits, own, reduction="sum"),
            "right": (logits.argmax(1) == own).sum(),
        }

    def metrics(self, sums) -> dict[str, float]:
        return super().metrics(sums) | {"accuracy": float(sums["right"] / sums["units"])}


def pairs(n: int = 30, n_test: int = 13) -> Data:
    """Two noisy views of the same ten numbers."""
    generator = torch.Generator().manual_seed(8)
    clean, noise = (torch.randn(n + n_test, views, 10, generator=generator) for views in (1, 2))
    views = clean + 0.3 * noise
    train, test = (Columns({"views": views[part]}) for part in (slice(n), slice(n, None)))
    return Data(train, test, input_shape=(10,))
