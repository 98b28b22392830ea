"""The samples of an evaluation with the largest loss: kept batch by batch on each rank, and chosen over all of them."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dist_train.ranks import dist
from dist_train.whole import whole


class Worst:
    """Keeps the samples with the largest loss. Nothing here waits for the device before `over_ranks`.

    Args:
        count: samples to keep.
    """

    def __init__(self, count: int):
        self.count = count
        self.kept: dict[str, Tensor] = {}

    def add(self, loss: Tensor, first: int, columns: Callable[[Tensor], Mapping[str, Tensor]]) -> None:
        """The next batch.

        Args:
            loss: of each sample, [batch]; -inf where one does not count.
            first: number of the batch's first sample in the split.
            columns: gives more about some samples of the batch, by name, [some, ...], for their places in it, [some].
        """
        # Stable: of equal losses the sample that comes first stays first. One that is not a number is the largest.
        places = loss.argsort(descending=True, stable=True)[: self.count]
        found = {"index": places + first, "loss": loss[places], **columns(places)}
        if self.kept:
            both = {name: torch.cat([kept, found[name]]) for name, kept in self.kept.items()}
            order = both["loss"].argsort(descending=True, stable=True)[: self.count]
            found = {name: value[order] for name, value in both.items()}
        self.kept = found

    def over_ranks(self) -> dict[str, np.ndarray]:
        """`index`, `loss` (float64) and the columns of the samples with the largest loss of all ranks, the largest
        first. Collective. It does not depend on the number of ranks, but for the rounding of what the model computes.
        """
        mine = {name: value.cpu() for name, value in self.kept.items()}
        own = {name: (value.double() if value.is_floating_point() else value).numpy() for name, value in mine.items()}
        parts = dist.gather_data((own["loss"], own["index"]))  # the columns may be large: they are asked of a few
        loss, index = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
        counted = loss != -np.inf
        loss, index = loss[counted], index[counted]
        key = np.nan_to_num(loss, nan=np.inf)
        chosen = index[np.lexsort([index, -key, ~np.isnan(loss)])[: self.count]]  # the last is the first key
        asked = np.isin(own["index"], chosen)
        parts = dist.gather_data({name: value[asked] for name, value in own.items()})
        rows = {name: np.concatenate([part[name] for part in parts]) for name in own}
        order = rows["index"].argsort()
        order = order[np.searchsorted(rows["index"], chosen, sorter=order)]
        return {name: value[order] for name, value in rows.items()}


def pixels(image: Tensor) -> np.ndarray:
    """uint8; of floats, their own smallest is 0 and their largest 255."""
    if image.dtype == torch.uint8:
        return image.numpy()
    values = np.nan_to_num(image.numpy().astype(np.float64))
    low, high = values.min(), values.max()
    return np.rint((values - low) / (high - low or 1.0) * 255).astype(np.uint8)


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """An npz file that is whole or absent."""
    with whole(path) as beside, beside.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
