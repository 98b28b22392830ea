"""Evaluation: sums over every sample of a split, each counted once at any world size, and divided once."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from dist_train.backends.precision import Precision
from dist_train.config.tree import TrainConfig
from dist_train.data.batch import Batch, mapped
from dist_train.data.feed import Feed
from dist_train.data.order import evaluated_at_once, pieces, share
from dist_train.loop.units import widest
from dist_train.ranks import dist
from dist_train.ranks.dist import World
from dist_train.ranks.phases import Phases
from dist_train.tasks.base import Examiner, Task, units_of


class Evaluation:
    """Of the test splits of a run.

    Args:
        cfg: of the run.
        task: what the model is trained for.
        splits: a feed of each test split, by name; "" is the name of the only one.
        world: this rank's place.
        precision: the formats of the forward pass.
        sample_bytes: of a sample's input and outputs.
        examiners: watch the last evaluation, by the name of their split.
    """

    def __init__(
        self, cfg: TrainConfig, task: Task, splits: Mapping[str, Feed], world: World, precision: Precision,
        sample_bytes: int, examiners: Mapping[str, Examiner] | None = None,
    ):  # fmt: skip
        self.task, self.splits, self.world, self.precision = task, splits, world, precision
        self.examiners = dict(examiners or {})
        self.totals: dict[str, Mapping[str, torch.Tensor]] = {}  # of the last evaluation, by split
        # A loss over the samples of a batch is one over as many as it is trained with, at any world size.
        self.together = cfg.global_batch_size if task.mixes_samples else None
        self.at_once = evaluated_at_once(cfg, world.data_size, sample_bytes)

    def run(self, model: nn.Module, phases: Phases | None = None, last: bool = False) -> dict[str, float]:
        """The metrics of all splits, the same on every rank. Collective.

        Args:
            model: what the task calls. Each of its modules is left in the mode it was in.
            phases: is told that this goes on.
            last: the examiners watch, and the sums are kept.

        Returns:
            `eval/METRIC`, or `eval/SPLIT/METRIC` of splits that have names.
        """
        phases = phases or Phases()
        phases("evaluate")
        found: dict[str, float] = {}
        with in_eval(model):
            for name, feed in self.splits.items():
                totals = self._split(model, feed, phases, self.examiners.get(name) if last else None)
                if last:
                    self.totals[name] = totals
                metrics = self.task.metrics(totals)
                section = f"eval/{name}/" if name else "eval/"
                found |= {f"{section}{key}": float(value) for key, value in metrics.items()}
        return found

    @torch.no_grad()
    def _split(
        self, model: nn.Module, feed: Feed, phases: Phases, watch: Examiner | None
    ) -> dict[str, torch.Tensor]:  # fmt: skip
        called = Called(self.precision.called(model))
        sums = Sums(feed.device)
        for batch in feed(self._batches(len(feed.split))):
            found = self.task.sums(called, batch)
            sums.add(found | {"units": torch.as_tensor(units_of(self.task, batch))}, batch.size > 0)
            phases.progressed()
            if watch:
                watch(*((batch, called.outputs) if batch.size else _none_of(batch, called.outputs)))
        return sums.over_ranks()

    def _batches(self, n: int) -> Iterator[np.ndarray]:
        """Numbers of this rank's samples, batch by batch: as many on every rank, as a sharded model's forward is
        collective."""
        rank, size = self.world.data_rank, self.world.data_size
        if self.together is not None:
            for first in range(0, n, self.together):
                samples = np.arange(first, min(first + self.together, n))
                yield samples[share(len(samples), rank, size)]
            return
        mine = np.arange(n)[share(n, rank, size)]
        count = pieces(n, size, self.at_once)
        yield from (mine[share(len(mine), i, count)] for i in range(count))


@contextmanager
def in_eval(model: nn.Module) -> Iterator[None]:
    """With the model in eval mode; each of its modules is left in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    model.training = False  # DeepSpeed's engine passes eval() on, and stays as it was itself
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _none_of(batch: Batch, outputs: Any) -> tuple[Batch, Any]:
    """A stand-in and what a model gave for it, without any sample."""

    def none(leaf: Any) -> Any:
        return leaf[:0] if isinstance(leaf, torch.Tensor) and leaf.dim() else leaf

    return Batch(mapped(batch.tree, none), batch.ids[:0], 0), mapped(outputs, none)


class Sums:
    """Tensors by name, added up in the widest format of a device."""

    def __init__(self, device: torch.device):
        self.device = device
        self.wide = widest(device)
        self.tensors: dict[str, torch.Tensor] = {}

    def add(self, found: Mapping[str, torch.Tensor], counts: bool) -> None:
        """Those of a batch; of one that does not count, only their shapes."""
        for name, value in found.items():
            value = value.to(self.device, self.wide)
            so_far = self.tensors.get(name)
            added = value if counts else torch.zeros_like(value)
            self.tensors[name] = added if so_far is None else so_far.add_(added)

    def over_ranks(self) -> dict[str, torch.Tensor]:
        """The sums over all ranks, on the CPU. Collective, once for all of them."""
        flat = dist.sum_(torch.cat([value.flatten() for value in self.tensors.values()])).cpu()
        parts = flat.split([value.numel() for value in self.tensors.values()])
        return {name: part.view(value.shape) for (name, value), part in zip(self.tensors.items(), parts, strict=True)}


class Called:
    """A model that remembers what it gave."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.outputs: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the model gives."""
        self.outputs = self.model(*args, **kwargs)
        return self.outputs

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)
