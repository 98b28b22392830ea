"""What a program gives to `fit` and `session`, as one config that was checked. No torch here."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import TYPE_CHECKING, Any

from dist_train.config import given
from dist_train.config.load import made
from dist_train.config.tree import Config
from dist_train.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from dist_train.data.sets import Data
    from dist_train.run.hooks import Hook
    from dist_train.tasks.base import Task

    ConfigLike = Config | Mapping[str, Any] | str | PathLike[str] | None
    DataLike = Data | Callable[..., Data] | Mapping[str, Any] | str | None
    ModelLike = Callable[..., nn.Module] | Mapping[str, Any] | str | None
    TaskLike = Task | Callable[..., Task] | Mapping[str, Any] | str | None
    HookLike = Hook | Callable[[], Hook] | Mapping[str, Any] | str


@contextmanager
def configured(
    source: "ConfigLike", data: "DataLike", model: "ModelLike", task: "TaskLike", hooks: "Sequence[HookLike]",
    sections: Mapping[str, Mapping[str, Any]],
) -> Iterator[Config]:  # fmt: skip
    """The config of a run, in which objects have names within the context. Raises ConfigError.

    Args:
        source: see `config.load.made`.
        data: a Data or what returns one; a name, or keys of the section `data`.
        model: what returns the model; a name, or keys of the section `model`.
        task: a Task or what returns one; a name, or keys of the section `task`.
        hooks: beside those of `train.hooks`: objects, what returns one, or as they stand there.
        sections: keys that win over those of `source`.
    """
    over: dict[str, dict[str, Any]] = {name: dict(body) for name, body in sections.items()}
    callables: dict[str, Any] = {}
    for section, value in (("data", data), ("model", model), ("task", task)):
        if isinstance(value, Mapping):
            over[section] = dict(value)
        elif isinstance(value, str):
            over[section] = {"name": value}
        elif value is not None:
            callables[section] = _called(section, value)
    config = made(source, over)
    asked = list(config.train.hooks)
    for i, hook in enumerate(hooks):
        if isinstance(hook, str | Mapping):
            asked.append(hook)
        else:
            callables[f"hook{i}"] = _called("hook", hook)
            asked.append(f"hook{i}")
    with given.objects(callables) as names:
        objects: dict[str, Any] = {
            section: {"name": names[section]} for section in ("data", "model", "task") if section in names
        }
        listed = [names.get(entry, entry) if isinstance(entry, str) else dict(entry) for entry in asked]
        yield made(config, objects, {"train": {"hooks": listed}})


def _called(what: str, value: Any) -> Any:
    """What gives the object when it is called. Raises ConfigError."""
    if what != "model" and not isinstance(value, type) and not _is_function(value):
        return lambda: value
    if not callable(value) or (what == "model" and not isinstance(value, type) and hasattr(value, "parameters")):
        raise ConfigError(
            f"{what}: got {type(value).__name__}, expected a function or class that makes the {what}, as its first "
            f"weights are drawn from train.seed, the same on every rank; for example {what}=lambda: "
            f"{type(value).__name__}()"
        )
    return value


def _is_function(value: Any) -> bool:
    """Whether it is to be called, and is no object that happens to be callable."""
    return callable(value) and hasattr(value, "__name__")
