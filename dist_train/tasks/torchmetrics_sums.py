"""Metrics of torchmetrics whose states are sums. The one file that imports it."""

import copy
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torchmetrics
from torch import Tensor
from torchmetrics.utilities import dim_zero_sum

from dist_train.errors import ConfigError
from dist_train.tasks.class_metrics import labels_of
from dist_train.tasks.label_metrics import predicted_and_actual
from dist_train.tasks.metrics import Metric, wide
from dist_train.tasks.number_metrics import columns_of


def is_one(built: Any) -> bool:
    """Whether an object is a metric of torchmetrics, or of a class derived from one."""
    return isinstance(built, torchmetrics.Metric)


class TorchMetric(Metric):
    """A metric of torchmetrics: its states after one batch are the sums, and its value is made of their totals.

    Its own synchronisation, which waits for every rank, is not used.

    Args:
        row: its name in the config.
        metric: has seen no data.
        kind: of the task, a key of METRICS, or None. Decides what torchmetrics is given.
    """

    def __init__(self, row: str, metric: torchmetrics.Metric, kind: str | None):
        self.row, self.updated, self.computed = row, metric, copy.deepcopy(metric)
        self.prepared = PREPARED[kind]
        self.defaults: dict[str, Tensor] = dict(metric._defaults)
        self.lower_is_better = metric.higher_is_better is False
        self.device = torch.device("cpu")
        self._check_states(metric)
        self._check_result()

    def sums(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """See Metric. What torchmetrics itself does may wait for the device."""
        if not len(outputs):  # not every update takes no samples, and the outputs may decide the shapes of the states
            one_sample = (of.new_zeros(1, *of.shape[1:]) for of in (outputs, targets))
            return {name: torch.zeros_like(state) for name, state in self._updates(*one_sample).items()}
        sums = self._updates(outputs, targets)
        if "validate_args" in vars(self.updated):  # reads values on the host; the first batch has shown what they are
            self.updated.validate_args = False
        return sums

    def _updates(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        dtype = wide(outputs.device)
        outputs, targets = (one.to(dtype) if one.is_floating_point() else one for one in (outputs, targets))
        if outputs.device != self.device:
            self.updated.to(outputs.device)
            self.device = outputs.device
        start = {
            name: default.to(outputs.device, dtype if default.is_floating_point() else default.dtype)
            for name, default in self.defaults.items()
        }
        _put(self.updated, start)
        self._call("update", self.updated, *self.prepared(outputs, targets))
        return {name: getattr(self.updated, name) - start[name] for name in start}

    def values(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """See Metric."""
        return self._named(self._compute(sums))

    def _compute(self, sums: Mapping[str, Tensor]) -> Any:
        states = {}
        for name, default in self.defaults.items():
            total = sums[name]
            states[name] = default + (total if default.is_floating_point() else total.to(default.dtype))
        _put(self.computed, states)
        return self._call("compute", self.computed)

    def _call(self, method: str, metric: torchmetrics.Metric, *of: Tensor) -> Any:
        try:
            # The class's own: that of the object also counts calls, keeps results and synchronises.
            return getattr(type(metric), method)(metric, *of)
        except REFUSALS as error:
            if type(error) not in REFUSALS or not type(metric).__module__.startswith("torchmetrics"):
                raise
            raise ConfigError(f"task.metrics: got {self.row}, whose {method} is refused there: {error}") from error

    def _check_states(self, metric: torchmetrics.Metric) -> None:
        others = [name for name, how in metric._reductions.items() if how is not dim_zero_sum]
        if self.defaults and not others:
            return
        why = f"of which {', '.join(others)} is not a sum" if others else "which has no state of its own"
        way = "choose another, or write your own as module:Class"
        if "thresholds" in inspect.signature(type(metric)).parameters:
            way = f"with thresholds its state is a sum: {{name: {self.row}, thresholds: 100}}"
        raise ConfigError(
            f"task.metrics: got {self.row}, {why}, so that its value over several ranks would not be exact; expected a "
            f"metric whose states are all added (dist_reduce_fx='sum'); {way}"
        )

    def _check_result(self) -> None:
        """Raises ConfigError for a result that is no number, of a metric that has a result without data."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = self._compute({name: torch.zeros_like(default) for name, default in self.defaults.items()})
        except Exception:  # it may ask for samples
            return
        self._named(result)

    def _named(self, result: Any) -> dict[str, float]:
        if isinstance(result, Tensor) and result.dim() == 1:
            result = {str(i): value for i, value in enumerate(result)} if len(result) > 1 else result[0]
        named = result if isinstance(result, dict) else {"": result}
        if not all(isinstance(value, int | float) or getattr(value, "ndim", None) == 0 for value in named.values()):
            raise ConfigError(
                f"task.metrics: got {self.row}, whose result is more than a list of numbers, expected one number or a "
                "list of them; choose another, or write your own as module:Class"
            )
        return {name: float(value) for name, value in named.items()}


def _put(metric: torchmetrics.Metric, states: Mapping[str, Tensor]) -> None:
    for name, state in states.items():
        setattr(metric, name, state.clone())


# -- what torchmetrics is given ----------------------------------------------------------------------------------------


def of_classes(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities and class numbers. Of logits torchmetrics would decide batch by batch whether they are some."""
    labels, _ = labels_of(outputs, targets)
    return outputs.softmax(1), labels


def of_labels(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities, and integers 0 and 1."""
    predicted_and_actual(outputs, targets)
    return outputs.sigmoid(), (targets > 0.5).long()


def of_numbers(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Both of one shape: a [n, 1] is [n]."""
    if outputs.shape == targets.shape and outputs.shape[1:] != (1,):
        return outputs, targets
    predicted, actual = columns_of(outputs, targets)
    return predicted[:, 0], actual[:, 0]


def as_they_are(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Of a task of the user's own."""
    return outputs, targets


PREPARED: dict[str | None, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "classification": of_classes,
    "segmentation": of_classes,
    "multi_label": of_labels,
    "regression": of_numbers,
    None: as_they_are,
}
REFUSALS = (TypeError, ValueError, RuntimeError)  # not what is derived from them, such as torch.OutOfMemoryError
