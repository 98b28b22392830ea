"""The norms of a run's model whose statistics are of a batch, and what else it keeps of its samples: what is looked at,
refused or said before training."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from dist_train.backends.fit import some
from dist_train.backends.probe import Findings, changed_to
from dist_train.config.tree import Config, group_of
from dist_train.data.feed import Feed
from dist_train.data.order import global_indices, pieces
from dist_train.errors import ConfigError
from dist_train.models.statistics import norms

LOOKED_AT = 2  # samples: a norm over a batch takes no single one


def trained_norms(model: nn.Module) -> dict[str, nn.Module]:
    """The norms over a batch that are in training, by name."""
    return {name: norm for name, norm in norms(model).items() if norm.training}


@contextmanager
def rows_checked(config: Config, trained: Mapping[str, nn.Module], count: int) -> Iterator[None]:
    """Around a forward of so many samples. Raises ConfigError where a norm over groups of samples gets other rows."""
    handles = []

    def hook(name: str) -> Callable[[nn.Module, tuple], None]:
        def check(_: nn.Module, args: tuple) -> None:
            if args and len(args[0]) != count:
                raise ConfigError(
                    f"model.batch_statistics: got {config.model.batch_statistics}, but {name} is called with "
                    f"{len(args[0])} rows for {count} samples, expected one for each; write "
                    f"--model.batch_statistics global"
                )

        return check

    if group_of(config.model) is not None:
        handles = [norm.register_forward_pre_hook(hook(name)) for name, norm in trained.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def by_samples(
    config: Config, model: nn.Module, changing: tuple[str, ...], forward: Callable[[np.ndarray], Any], feed: Feed,
    changed_to: Callable[..., dict[str, torch.Tensor]] = changed_to,
) -> tuple[str, ...]:  # fmt: skip
    """The buffers, of those that forward changes, that another rank's samples change otherwise: as other samples in
    another number do, and other draws."""
    own = {f"{name}.{buffer}" if name else buffer for name, norm in norms(model).items() for buffer in norm._buffers}
    rest = [name for name in changing if name not in own]
    n = len(feed.split)
    if not rest or n <= LOOKED_AT:
        return tuple(rest)
    order = global_indices(n, config.train.seed, 0, 0, min(n, 3 * LOOKED_AT)).copy()
    one, other = (
        changed_to(model, lambda some=some: forward(some), rest, draws)
        for draws, some in enumerate((order[:LOOKED_AT], order[LOOKED_AT:]))
    )
    return tuple(name for name in rest if not torch.equal(one[name], other[name]))


def check(config: Config, findings: Findings, n: int, world_size: int) -> None:
    """Raises ConfigError where the norms over a batch cannot have the statistics that model.batch_statistics says."""
    cfg, asked, group = config.train, config.model.batch_statistics, group_of(config.model)
    path, names = "model.batch_statistics", some(findings.norms)
    if not findings.norms:
        if asked is not None:
            raise ConfigError(
                f"{path}: got {asked}, but the model has no BatchNorm that is in training, expected one; leave it out"
            )
        return
    if group is not None:
        return
    if pieces(min(cfg.global_batch_size, n), world_size, cfg.micro_batch_size) > 1:
        on = f" on {world_size} ranks" if world_size > 1 else ""
        raise ConfigError(
            f"{path}: got {asked or 'nothing'} with train.micro_batch_size {cfg.micro_batch_size} in steps of "
            f"{cfg.global_batch_size} samples{on}, but a norm over the batch ({names}) would need all of them at once, "
            f"expected groups of them; write --{path}.group {cfg.micro_batch_size}, or leave train.micro_batch_size out"
        )
    if config.backend.reduce == "ordered":
        raise ConfigError(
            f"backend.reduce: got ordered, but a norm over the batch ({names}) adds up what ranks have in an order "
            f"of its own; write --{path}.group {cfg.micro_batch_size or cfg.global_batch_size}"
        )
    if world_size > 1 and config.compile.mode != "off" and config.compile.fullgraph:
        raise ConfigError(
            f"compile.fullgraph: got true, but the statistics of a norm over the batch ({names}) are exchanged among "
            f"{world_size} ranks between two graphs; write --compile.fullgraph false, or --{path}.group 32"
        )


def notes(config: Config, findings: Findings, world_size: int) -> list[str]:
    """Lines for people: of which samples the statistics of a batch are, and what of the model would be otherwise on
    another number of ranks."""
    lines, group = [], group_of(config.model)
    if findings.norms:
        of = f"of all samples of a step{', exchanged among the ranks' if world_size > 1 else ''}"
        of = of if group is None else f"of groups of {group} samples"
        lines.append(f"batch statistics {of} (model.batch_statistics): {some(findings.norms)}")
    if findings.by_samples and world_size > 1:
        lines.append(
            f"buffers that each rank changes by its own samples: {some(findings.by_samples)}; after every step all "
            f"ranks take those of the last one, so they differ from those on another number of ranks"
        )
    return lines
