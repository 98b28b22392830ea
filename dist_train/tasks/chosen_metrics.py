"""The metrics that a config chooses: built, and asked together."""

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from dist_train.config.lookup import load
from dist_train.config.own_code import blamed
from dist_train.errors import ConfigError
from dist_train.tasks import METRICS
from dist_train.tasks.metric_items import PATH, Item, parsed
from dist_train.tasks.metrics import Metric

# The fact that an argument of another name asks for.
FACT_OF = {"num_classes": "classes", "num_labels": "classes", "num_outputs": "outputs"}


class Metrics:
    """The metrics of a run, by the names of their results."""

    def __init__(self, items: Sequence[Item], metrics: Sequence[Metric]):
        self._all = list(zip(items, metrics, strict=True))
        self.names = tuple(item.name for item in items)
        self.lower_is_better = tuple(item.name for item, metric in self._all if metric.lower_is_better)

    def sums(self, outputs: Any, targets: Any) -> dict[str, Tensor]:
        """Of one batch, by `NAME/KEY`: what may be added over batches and ranks."""
        out = {}
        for item, metric in self._all:
            with blamed(PATH, item.row, "given a batch", ours=not item.is_own):
                out |= {f"{item.name}/{key}": value for key, value in metric.sums(outputs, targets).items()}
        return out

    def values(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """The numbers, by `NAME` or `NAME/SUB`.

        Args:
            sums: the totals, as float64 tensors on the CPU; those of others among them are passed over.
        """
        out = {}
        for item, metric in self._all:
            start = f"{item.name}/"
            own = {key.removeprefix(start): total for key, total in sums.items() if key.startswith(start)}
            with blamed(PATH, item.row, "asked for its values", ours=not item.is_own):
                values = metric.values(own)
            out |= {f"{start}{sub}" if sub else item.name: value for sub, value in values.items()}
        return out


def make(items: Sequence[Any], facts: Mapping[str, Any], kind: str | None) -> Metrics:
    """The metrics of a list in the config. Raises ConfigError.

    Args:
        items: names, or mappings with `name`, arguments, and `as`, which is the name of the results.
        facts: of the data set and the task, such as `classes` (a count), for the arguments that ask for them by name.
        kind: the kind of task, a key of METRICS; None for a task whose outputs are of another kind.
    """
    chosen = parsed(items, kind)
    return Metrics(chosen, [_built(item, facts, kind) for item in chosen])


def _built(item: Item, facts: Mapping[str, Any], kind: str | None) -> Metric:
    of = load(METRICS.get(kind, {}), item.row, PATH)
    arguments = _arguments(of, item, facts)
    if item.is_torchmetrics:
        try:
            built = of(**arguments)
        except (TypeError, ValueError, ImportError) as error:
            raise ConfigError(f"{PATH}: got {item.row} with {arguments}, which is refused there: {error}") from None
    else:
        with blamed(PATH, item.row, "built", ours=not item.is_own):
            built = of(**arguments)
    if isinstance(built, Metric):
        return built
    if "torchmetrics" in sys.modules:
        from dist_train.tasks.torchmetrics_sums import TorchMetric, is_one

        if is_one(built):
            return TorchMetric(item.row, built, kind)
    raise ConfigError(f"{PATH}: got {item.row}, which gives {type(built).__name__}, expected a dist_train Metric")


def _arguments(of: Callable, item: Item, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the config, and the facts that the constructor asks for and the config does not give."""
    if not callable(of):
        raise ConfigError(f"{PATH}: got {item.row}, which is of type {type(of).__name__}, expected a class")
    takes = inspect.signature(of).parameters
    known = {name: facts[FACT_OF.get(name, name)] for name in takes if FACT_OF.get(name, name) in facts}
    arguments = known | dict(item.arguments)
    named = [name for name, one in takes.items() if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    if not any(one.kind is one.VAR_KEYWORD for one in takes.values()):
        for name in arguments.keys() - set(named):
            own = ", ".join(named) or "no arguments"
            raise ConfigError(
                f"{PATH}: got {name} for {item.row}, which does not have it; it takes {own}; leave it out"
            )
    for name in named:
        if takes[name].default is inspect.Parameter.empty and name not in arguments:
            raise ConfigError(
                f"{PATH}: got {item.row} without {name}, expected a value, as the data set does not tell it; write "
                f"{{name: {item.row}, {name}: VALUE}}"
            )
    for name, value in arguments.items():
        if ":" not in item.row and type(value) is not int:  # all the arguments that ours have
            raise ConfigError(f"{PATH}: got {name}: {value!r} for {item.name}, expected an integer")
    return arguments
