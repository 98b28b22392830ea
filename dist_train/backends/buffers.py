"""Buffers, such as the running statistics of a norm: the same on all ranks after every step, and untouched by a step
that is left out.

The norms over a batch keep to that by themselves (models/statistics.py). Of all others, a rank's forward changes its
buffers by its own samples. After a step all ranks take those of one, so that what is evaluated, saved, resumed and left
at the end is one model. It is the last rank's, which no other has more samples than, and which alone always has one:
shares that differ grow with the rank (order.share).
"""

from collections.abc import Iterable

import torch
from torch import nn

from dist_train.backends.probe import Findings
from dist_train.models.statistics import Statistics
from dist_train.ranks import dist


class Buffers:
    """Those of a model that forward changes. Collective.

    Args:
        model: with its own names, as it was before it was wrapped.
        findings: tells which buffers forward changes; all of them where its way varies.
        ranks: that train together.
        skips: a step may be left out; then every step is followed by a copy of the buffers.
        statistics: of its norms over a batch.
    """

    def __init__(self, model: nn.Module, findings: Findings, ranks: int, skips: bool, statistics: Statistics):
        modules = dict(model.named_modules())
        changing = [name for name, _ in model.named_buffers()] if findings.varies else findings.buffers
        places = {name: (modules[name.rpartition(".")[0]], name.rpartition(".")[2]) for name in changing}
        self.places = list(places.values())
        self.by_rank = [place for name, place in places.items() if name not in statistics.buffers] if ranks > 1 else []
        self.changing = [*self.places, *((norm, "group_sums") for norm in statistics.by_group)]
        self.statistics, self.skips = statistics, skips
        self.kept = self._copies() if skips else []

    def settle(self, taken: bool) -> None:
        """Ends a step: after it was taken, or left out."""
        self.statistics.settle(taken)
        if not self.by_rank and not self.skips:
            return
        with torch.no_grad():
            if not taken:
                self._set(self.kept)
                return
            if self.by_rank:
                self._take_from_last()
            if self.skips:
                self.kept = self._copies()

    def copies(self) -> list[torch.Tensor]:
        """Of all that forward changes, as they are now."""
        return [value.detach().clone() for value in _now(self.changing)]

    @torch.no_grad()
    def put(self, copies: Iterable[torch.Tensor]) -> None:
        """Makes the buffers what they were when `copies` was called."""
        for buffer, value in zip(_now(self.changing), copies, strict=True):
            buffer.copy_(value)

    def _copies(self) -> list[torch.Tensor]:
        return [value.detach().clone() for value in _now(self.places)]

    def _set(self, values: list[torch.Tensor]) -> None:
        for buffer, value in zip(_now(self.places), values, strict=True):
            buffer.copy_(value)

    def _take_from_last(self) -> None:
        by_type: dict[torch.dtype, list[torch.Tensor]] = {}
        for value in _now(self.by_rank):
            by_type.setdefault(value.dtype, []).append(value)
        for values in by_type.values():
            flat = torch.cat([value.reshape(-1) for value in values])  # one exchange, not one for each
            dist.from_last(flat)
            for value, part in zip(values, flat.split([value.numel() for value in values]), strict=True):
                value.copy_(part.view_as(value))


def _now(places: Iterable[tuple[nn.Module, str]]) -> list[torch.Tensor]:
    """Buffers as they are; forward may put another tensor in a buffer's place."""
    return [module._buffers[name] for module, name in places]
