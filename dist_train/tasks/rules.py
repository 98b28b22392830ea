"""What a task asks of the config. Pure, and before torch is imported."""

from collections.abc import Iterator

from dist_train.config import arguments
from dist_train.config.tree import Config
from dist_train.config.values import no_share, unknown
from dist_train.ranks.launcher import Launcher
from dist_train.tasks import TASKS

LOSSES = {"classification": ("cross_entropy", "nll", "mse")}
FIELDS = ("loss", "metrics")


def problems(config: Config, _: Launcher) -> Iterator[str]:
    """A line for every mistake."""
    task, one_hot = config.task, config.data.one_hot
    fields = {k: getattr(task, k) for k in FIELDS if getattr(task, k) is not None}
    for key in FIELDS:
        if key in task.args:
            yield f"task.args.{key}: got {task.args[key]!r}, expected it as task.{key}; write --task.{key}"
    given = {"task." + k for k in fields} | {"task.args." + k for k in task.args}
    facts = arguments.facts_of(config)
    yield from arguments.problems(TASKS, task.name, "task", {**fields, **task.args}, given, facts=facts)
    valid = LOSSES.get(task.name, ())
    if valid and task.loss is not None and task.loss not in valid:
        yield unknown("task.loss", task.loss, valid, "loss")
    if task.name != "classification":
        if one_hot:
            yield f"data.one_hot: got true with task.name {task.name}, expected classification; leave it out"
        return
    if task.loss == "mse" and not one_hot:
        yield "task.loss: got mse with data.one_hot false, expected one-hot targets; add --data.one_hot true"
    if task.loss == "nll" and one_hot:
        yield "task.loss: got nll with data.one_hot true, expected class numbers; add --data.one_hot false"
    smoothing = task.args.get("label_smoothing")
    if isinstance(smoothing, (int, float)):
        yield from no_share({"task.args.label_smoothing": smoothing})
    if smoothing and task.loss not in (None, "cross_entropy"):
        yield (
            f"task.args.label_smoothing: got {smoothing} with task.loss {task.loss}, which does not have it; leave it "
            f"out"
        )
