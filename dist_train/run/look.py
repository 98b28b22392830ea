"""A first look at a run's model, before any rank is joined: what only training shows is told now, in a line."""

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from dist_train.backends.precision import Precision
from dist_train.backends.pretended import Pretended
from dist_train.backends.probe import Findings, Signs, changed_to, probe, signs_of
from dist_train.config.own_code import blamed
from dist_train.config.tree import Config, group_of
from dist_train.data.batch import Batch
from dist_train.data.feed import Feed
from dist_train.data.order import global_indices, pieces, sizes
from dist_train.data.sets import Data
from dist_train.errors import ConfigError
from dist_train.loop.evaluate import Called, Sums
from dist_train.models import MODELS, draws
from dist_train.run.batch_statistics import LOOKED_AT, by_samples, check, rows_checked, trained_norms
from dist_train.tasks import TASKS
from dist_train.tasks.base import Task, nbytes, panels_of, units_of

LOOKS = "called on the first samples"


def look(
    config: Config, model: nn.Module, task: Task, feed: Feed, data: Data, precision: Precision, trains: bool,
    pretended: Pretended | None = None,
) -> Findings:  # fmt: skip
    """Trains on the first samples once, and forgets it: what a model shows only then is told before any rank is joined.

    Args:
        config: the run.
        model: on its device.
        task: what it is trained for.
        feed: of the training split.
        data: that it is of.
        precision: the formats of the run.
        trains: false where the model is only evaluated, so that its gradients take no memory.
        pretended: of a model without values; None of one that has them.

    Raises:
        ConfigError: its outputs are not what the loss takes.
        Exception: whatever the model raises.
    """
    if trains and not any(p.requires_grad for p in model.parameters()):
        raise ConfigError("model: got no weight that asks for a gradient, expected one at least that is trained")
    count = min(LOOKED_AT, len(feed.split))
    first = global_indices(len(feed.split), config.train.seed, 0, 0, count).copy()
    batch, called = feed.of(first), Called(precision.called(model))
    own_model = partial(blamed, "model.name", config.model.name, LOOKS, ours=config.model.name in MODELS)
    own_task = partial(blamed, "task.name", config.task.name, LOOKS, ours=config.task.name in TASKS)
    sample_bytes = []
    probed, real = (probe, nullcontext) if pretended is None else (pretended.probe, pretended.outside)
    trained = trained_norms(model)
    drawing = draws.Draws(config.train.seed, 0, model, config.train.draws, precision.device)

    def held(outputs: Any) -> None:
        with real():
            task.check(batch, outputs)

    def loss() -> torch.Tensor:
        checked = Checked(called, held, own_model)
        with own_task(), rows_checked(config, trained, count):
            total = _sum_of(task.sums(checked, batch), config.task.name)
        sample_bytes.append((nbytes(batch.tree) + nbytes(called.outputs)) // count)
        return total / count

    with draws.looking(drawing, batch.ids):
        found = probed(model, loss, trains)
    if drawing.keyed:
        draws.settle(model)

    def again(part: tuple[int, int]) -> Signs:
        of_part = draws.Draws(config.train.seed, 0, model, config.train.draws, precision.device, part)
        with draws.looking(of_part, batch.ids):
            return signs_of(model, loss)

    with own_task():
        notes = tuple(task.notes(batch, called.outputs))
        _check_units(units_of(task, batch), config.task.name)
        sums = _evaluated(model, task, Checked(called, lambda outputs: None, own_model), batch, probed)
        sums = {name: value.cpu() for name, value in sums.items()} if pretended is None else pretended.sums(sums)
        metrics = tuple(task.metrics(sums))
    if trains:
        panels_of(task, config.task.name, sums, data)
    alone = feed.of(first[:1])
    with own_task():
        needs_two = bool(found.buffers or trained) and _needs_two(model, lambda: task.sums(called, alone), probed)
        changed = changed_to if pretended is None else pretended.changed_to
        others = by_samples(config, model, found.buffers, lambda some: task.sums(called, feed.of(some)), feed, changed)
    return dataclasses.replace(
        found,
        by_samples=others,
        norms=tuple(trained),
        needs_two=needs_two,
        sample_bytes=sample_bytes[0],
        mixes_samples=task.mixes_samples,
        metrics=metrics,
        notes=notes,
        first=again if pretended is None and config.backend.mesh.get("tensor", 1) != 1 else None,
    )


def _evaluated(
    model: nn.Module, task: Task, called: nn.Module, batch: Batch, probed: Callable[..., Findings]
) -> dict[str, torch.Tensor]:
    """The sums of an evaluation: what a metric refuses, it refuses now."""
    modes = [(module, module.training) for module in model.modules()]
    total = Sums(batch.ids.device)

    def sums() -> torch.Tensor:
        with torch.no_grad():
            found = task.sums(called, batch)
            for name, value in found.items():
                if not isinstance(value, torch.Tensor):
                    raise ConfigError(
                        f"task.name: got {type(value).__name__} as the sum {name!r}, expected a tensor that may be "
                        f"added over batches and ranks"
                    )
            total.add(found | {"units": torch.as_tensor(units_of(task, batch))}, counts=True)
        return torch.zeros(())

    model.eval()
    try:
        probed(model, sums, trains=False)
    finally:
        for module, training in modes:
            module.training = training
    return total.tensors


class Checked:
    """A model whose outputs are checked before the task has them, and whose errors are told from the task's."""

    def __init__(self, model: Called, check: Callable[[Any], None], blame: Callable[[], AbstractContextManager[None]]):
        self.model, self.check, self.blame = model, check, blame

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the model gives."""
        with self.blame():
            outputs = self.model(*args, **kwargs)
        self.check(outputs)
        return outputs

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


def _sum_of(sums: Any, name: str) -> torch.Tensor:
    """The loss of what a task gave. Raises ConfigError."""
    loss = sums.get("loss") if isinstance(sums, Mapping) else None
    if not isinstance(loss, torch.Tensor) or loss.dim() or not loss.is_floating_point():
        got = f"loss {list(loss.shape)} {loss.dtype}" if isinstance(loss, torch.Tensor) else f"{type(sums).__name__}"
        raise ConfigError(
            f"task.name: got {got} from the sums of {name}, expected a dict with loss, a float tensor without "
            f"dimensions: the sum of the loss over the units of a batch"
        )
    return loss


def _check_units(units: Any, name: str) -> None:
    """Raises ConfigError for what is no number of units."""
    number = isinstance(units, int) or (isinstance(units, torch.Tensor) and not units.dim())
    if not number or units < 0:
        got = f"a tensor {list(units.shape)}" if isinstance(units, torch.Tensor) and units.dim() else repr(units)
        raise ConfigError(
            f"task.name: got {got} as the units of {name}, expected a number of 0 or more, or a tensor without "
            f"dimensions: what the loss of a batch is a mean over, counted"
        )


def _needs_two(model: nn.Module, forward: Callable[[], Any], probed: Callable[..., Findings]) -> bool:
    """Whether a forward of one sample fails, where that of several did not."""

    def alone() -> torch.Tensor:
        with torch.no_grad():
            forward()
        return torch.zeros(())

    try:
        probed(model, alone, trains=False)
    except ValueError:  # torch's: expected more than 1 value per channel when training
        return True
    return False


def check_shares(config: Config, findings: Findings, n: int, world_size: int) -> None:
    """Raises ConfigError where a step would give a norm a single one of `n` samples, and the model takes none alone, or
    where it would cut a rank's share into pieces, and the loss or the norms take them only together."""
    cfg, group = config.train, group_of(config.model)
    check(config, findings, n, world_size)
    if findings.mixes_samples and pieces(min(cfg.global_batch_size, n), world_size, cfg.micro_batch_size) > 1:
        raise ConfigError(
            f"train.micro_batch_size: got {cfg.micro_batch_size} in steps of {cfg.global_batch_size} samples on "
            f"{world_size} ranks, but the loss of this task compares the samples of a step with each other "
            f"(mixes_samples), expected each rank's share at once; leave it out, or start more ranks"
        )
    if findings.mixes_samples and cfg.eval_batch_size is not None:
        raise ConfigError(
            f"train.eval_batch_size: got {cfg.eval_batch_size}, but the loss of this task compares the samples of a "
            f"batch with each other (mixes_samples), and is evaluated on train.global_batch_size samples; leave it out"
        )
    if not findings.needs_two:
        return
    ragged = 0 if cfg.drop_last else n % cfg.global_batch_size
    ranks = f" on {world_size} ranks" if world_size > 1 else ""
    for count, mend in (
        (min(cfg.global_batch_size, n), "write a larger --train.global_batch_size or --train.micro_batch_size"),
        (ragged, "write --train.drop_last true, or another --train.global_batch_size"),
    ):
        together = sizes(count, world_size, cfg.micro_batch_size)
        if findings.norms and not findings.by_samples:
            together = {count} if group is None else {min(group, count), (count - 1) % group + 1}
        if 1 in together:
            raise ConfigError(
                f"train.global_batch_size: got a batch of {count} samples{ranks} with a single one at once, which the "
                f"model does not take, as a norm over a batch has no statistics of it; {mend}"
            )
