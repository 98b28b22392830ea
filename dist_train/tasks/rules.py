"""What a task asks of the config. Pure, and before torch is imported."""

import math
from collections.abc import Iterator
from typing import Any

from dist_train.config import arguments
from dist_train.config.tree import Config
from dist_train.config.values import no_share, unknown
from dist_train.ranks.launcher import Launcher
from dist_train.tasks import METRICS, TASKS, metric_items

LOSSES = {
    "classification": ("cross_entropy", "nll", "mse"),
    "regression": ("mse", "l1", "huber", "smooth_l1"),
}
FIELDS = ("loss", "metrics")
# Losses that have the argument.
DELTA = ("huber", "smooth_l1")


def problems(config: Config, _: Launcher) -> Iterator[str]:
    """A line for every mistake."""
    task = config.task
    fields = {k: getattr(task, k) for k in FIELDS if getattr(task, k) is not None}
    for key in FIELDS:
        if key in task.args:
            yield f"task.args.{key}: got {task.args[key]!r}, expected it as task.{key}; write --task.{key}"
    given = {"task." + k for k in fields} | {"task.args." + k for k in task.args}
    facts = arguments.facts_of(config)
    yield from arguments.problems(TASKS, task.name, "task", {**fields, **task.args}, given, facts=facts)
    if task.name not in TASKS:
        if config.data.one_hot:
            yield _no_one_hot(task.name)
        return
    valid = LOSSES.get(task.name, ())
    if valid and task.loss is not None and task.loss not in valid:
        yield unknown("task.loss", task.loss, valid, "loss")
    if task.metrics is not None and task.name in METRICS:
        yield from metric_items.problems(task.metrics, task.name)
    yield from _numbers(task.args)
    if task.name == "classification":
        yield from _classification(config)
    elif config.data.one_hot:
        yield _no_one_hot(task.name)
    if task.name == "regression" and "delta" in task.args and task.loss not in DELTA:
        yield (
            f"task.args.delta: got {task.args['delta']} with task.loss {task.loss or 'mse'}, which does not have it; "
            f"leave it out, or write --task.loss huber"
        )


def _no_one_hot(name: str) -> str:
    return f"data.one_hot: got true with task.name {name}, expected classification; leave it out"


def _classification(config: Config) -> Iterator[str]:
    task, one_hot = config.task, config.data.one_hot
    if task.loss == "mse" and not one_hot:
        yield "task.loss: got mse with data.one_hot false, expected one-hot targets; add --data.one_hot true"
    if task.loss == "nll" and one_hot:
        yield "task.loss: got nll with data.one_hot true, expected class numbers; add --data.one_hot false"
    smoothing = task.args.get("label_smoothing")
    if smoothing and task.loss not in (None, "cross_entropy"):
        yield (
            f"task.args.label_smoothing: got {smoothing} with task.loss {task.loss}, which does not have it; leave it "
            f"out"
        )


def _numbers(args: dict[str, Any]) -> Iterator[str]:
    """Arguments of our tasks, by name, that are not of their type or range."""
    smoothing = args.get("label_smoothing")
    if _is_number(smoothing):
        yield from no_share({"task.args.label_smoothing": smoothing})
    elif smoothing is not None:
        yield f"task.args.label_smoothing: got {smoothing!r}, expected a number; for example 0.1"
    delta = args.get("delta")
    if delta is not None and not (_is_number(delta) and 0 < delta < math.inf):
        yield f"task.args.delta: got {delta!r}, expected a finite number above 0; for example --task.args.delta 1.0"
    ignored = args.get("ignore_index")
    if ignored is not None and type(ignored) is not int:
        yield f"task.args.ignore_index: got {ignored!r}, expected a class number; for example 255"
    weight = args.get("pos_weight")
    if weight is not None and not _are_weights(weight if isinstance(weight, list) else [weight]):
        yield f"task.args.pos_weight: got {weight!r}, expected a finite number of 0 or more, or one for each label"
    weights = args.get("class_weights")
    if weights is not None and not (isinstance(weights, list) and _are_weights(weights)):
        yield (
            f"task.args.class_weights: got {weights!r}, expected a list of finite numbers of 0 or more, one for each "
            f"class; for example '[1.0, 2.5]'"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _are_weights(values: list[Any]) -> bool:
    return all(_is_number(value) and 0 <= value < math.inf for value in values)
