"""What a model is trained for: a loss as a sum, what it is a mean over, and numbers for people."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from dist_train.config.own_code import blamed
from dist_train.data.batch import Batch, leaves_of
from dist_train.data.feed import Feed
from dist_train.data.sets import Data
from dist_train.errors import ConfigError
from dist_train.ranks.dist import World
from dist_train.tasks import TASKS
from dist_train.tasks.panels import Panel, encoded

# Where models and data sets that are no pairs of tensors have what a task needs.
OUTPUTS = ("logits", "out")
TARGETS = ("labels", "label", "targets", "target")


class Examiner(Protocol):
    """Watches the last evaluation, batch by batch, and leaves something in the run's folder for a report. Nothing in it
    waits for the device before it writes."""

    def __call__(self, batch: Batch, outputs: Any) -> None:
        """The next batch of this rank's part of the split, in order, and what the model gave for it; a batch without
        samples where the rank has none."""

    def write(self, folder: Path) -> None:
        """Writes its file. Collective; rank 0 writes."""


class Task(ABC):
    """What a model is trained for.

    The loss of a step is the sum over all ranks of `sums(model, batch)["loss"]`, divided once by the number of units of
    the whole global batch. The loop divides; a task never does.
    """

    units_per_sample: int | None = None
    """Units of each sample, where all have as many: no count is exchanged then."""
    mixes_samples = False
    """The loss of a sample depends on the others of its batch, as contrastive losses do. Such a task gathers them from
    all ranks itself (dist.gather_samples), and takes no micro-batches."""
    best = "loss"
    """The metric that the best checkpoint is decided by (checkpoint.best_metric)."""
    lower_is_better: tuple[str, ...] = ("loss",)
    """Metrics of which the least is the best; of all others it is the largest."""

    unit = "samples"
    """What `units` counts, for people."""

    evaluates = True
    """Whether test splits are evaluated."""
    loss_of_vectors: str | None = None
    """Of a task of classes, its loss: it decides what targets that are vectors may be."""

    def begin(self, model: nn.Module) -> None:  # noqa: B027  (most tasks call every model in one way)
        """Sees the model, before it is called, compiled or wrapped, and so before what it takes is hidden. Raises
        ConfigError where it is none for this task."""

    def units(self, batch: Batch) -> torch.Tensor | int:
        """What the loss is a mean over, counted in a batch: samples, unless this is overridden, such as by the tokens
        that are no padding. A scalar on the device of the batch."""
        return len(batch)

    @abstractmethod
    def sums(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """Calls the model, and gives sums over the units of the batch.

        Args:
            model: gives outputs for what the batch holds. `model.training` tells training from evaluation.
            batch: of this rank.

        Returns:
            `loss`, a scalar, the sum over the units, and in evaluation any other tensors that may be added over batches
            and ranks, by name.
        """

    def metrics(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Numbers for people, from the sums over a whole split.

        Args:
            sums: what `sums` gave, added up in float64, on the CPU; and their number of `units`.
        """
        return {"loss": float(sums["loss"] / sums["units"])}

    def check(self, batch: Batch, outputs: Any) -> None:  # noqa: B027  (most own tasks have nothing to check)
        """Raises ConfigError where what the model gave for a batch is not what the loss takes; asked once, before any
        rank is joined."""

    def notes(self, batch: Batch, outputs: Any) -> Sequence[str]:
        """Lines for people, said once before training: what is allowed, but may not be meant. Asked after `check`."""
        return ()

    def examiner(self, data: Data, feed: Feed, world: World) -> Examiner | None:
        """What watches the last evaluation of a split; None where nothing does."""
        return None

    def panels(self, sums: Mapping[str, torch.Tensor], data: Data) -> Sequence[Panel]:
        """What the run's report shows of the last evaluation beside the metrics: see panels.py.

        Args:
            sums: as `metrics` has them.
            data: the data set, such as for the names of its classes.
        """
        return ()


def shows_panels(task: Task) -> bool:
    """Whether it has panels of its own."""
    return type(task).panels is not Task.panels


def panels_of(task: Task, name: str, sums: Mapping[str, torch.Tensor], data: Data) -> Sequence[Panel]:
    """The task's own panels. Raises ConfigError where they are none.

    Args:
        task: what the model is trained for.
        name: of the task in the config.
        sums: over a whole split.
        data: the data set.
    """
    with blamed("task.name", name, "asked for its panels", ours=name in TASKS):
        found = task.panels(sums, data)
    if not isinstance(found, Sequence) or isinstance(found, str):
        raise ConfigError(
            f"task.name: got {name}, whose panels are {type(found).__name__}, expected a list of Table(...) and "
            f"Plot(...)"
        )
    try:
        encoded(found)
    except ValueError as error:
        raise ConfigError(f"task.name: {name}.panels: {error}") from None
    return found


def units_per_sample(task: Task) -> int | None:
    """Units of each sample; None where they must be counted in every batch."""
    if task.units_per_sample is None and type(task).units is Task.units:
        return 1
    return task.units_per_sample


def units_of(task: Task, batch: Batch) -> torch.Tensor | int:
    """Units of a batch; none of a stand-in."""
    each = units_per_sample(task)
    if each is not None:
        return len(batch) * each
    return task.units(batch) if len(batch) else 0


def outputs_and_targets(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Calls the model with a batch's inputs.

    Of a pair the first is the input, and the second the target. Of a dict the target is `labels` (or label, targets,
    target), and all the rest goes to the model by name; so does an input that is a dict itself. Outputs are a tensor,
    or have one as `logits`, as transformers' models do, or `out`, as torchvision's models for segmentation.

    Raises:
        ConfigError: the batch has no target, or the outputs no tensor.
    """
    inputs, targets = inputs_and_targets(batch.tree)
    outputs = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    return tensor_of(outputs), targets


def inputs_and_targets(tree: Any) -> tuple[Any, Any]:
    """The two parts of a batch; see `outputs_and_targets`."""
    if isinstance(tree, (tuple, list)) and len(tree) == 2:
        return tree[0], tree[1]
    if isinstance(tree, Mapping):
        for name in TARGETS:
            if name in tree:
                return {key: value for key, value in tree.items() if key != name}, tree[name]
        got = f"samples with {', '.join(map(str, tree))}"
    else:
        got = f"samples of type {type(tree).__name__}"
    raise ConfigError(
        f"data.name: got {got}, expected a pair of input and target, or a dict with {', '.join(TARGETS[:-1])} or "
        f"{TARGETS[-1]}; for any other batch write a task of your own (task.name: my_module:MyTask)"
    )


def tensor_of(outputs: Any) -> torch.Tensor:
    """What a model gave, as a tensor; see `outputs_and_targets`. Raises ConfigError."""
    if isinstance(outputs, torch.Tensor):
        return outputs
    for name in OUTPUTS:
        found = outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)
        if isinstance(found, torch.Tensor):
            return found
    raise ConfigError(
        f"model: got outputs of type {type(outputs).__name__}, expected a tensor, or one as {' or '.join(OUTPUTS)}; "
        f"return the logits alone, or write a task of your own (task.name: my_module:MyTask)"
    )


def nbytes(tree: Any) -> int:
    """Bytes of all tensors of a tree."""
    return sum(leaf.nbytes for leaf in leaves_of(tree) if isinstance(leaf, torch.Tensor))
