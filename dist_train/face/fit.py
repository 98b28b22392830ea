"""dist_train.fit: a whole run from a Python program."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dist_train.face.given import configured
from dist_train.ranks import orphan
from dist_train.ranks.launcher import detect
from dist_train.run.check import check
from dist_train.run.outcome import Outcome

if TYPE_CHECKING:
    from dist_train.face.given import ConfigLike, DataLike, HookLike, ModelLike, TaskLike


def fit(
    config: "ConfigLike" = None,
    *,
    data: "DataLike" = None,
    model: "ModelLike" = None,
    task: "TaskLike" = None,
    hooks: "Sequence[HookLike]" = (),
    **sections: Mapping[str, Any],
) -> Outcome:
    """Trains, as `python -m dist_train` does: in this process alone, or under torchrun and the like on all its ranks.

    What it does to the process it takes back at its end: signal handlers, the number of threads, its group of ranks.

    Args:
        config: a Config, keys by section as they stand in a YAML file, the path of such a file, or nothing, which is
            the defaults.
        data: a Data, or a function that returns one; or a name, or keys of the section `data`.
        model: a function or class that makes the model; or a name, or keys of the section `model`.
        task: a Task, or what makes one; or a name, or keys of the section `task`.
        hooks: Hooks, or what makes one, beside those of `train.hooks`.
        **sections: keys that win over those of `config`, by section: `train={"epochs": 3}, optim={"lr": 0.1}`.

    Returns:
        What the run has come to, on every rank.

    Raises:
        ConfigError: a mistake in what was given, with a line for each.
    """
    with configured(config, data, model, task, hooks, sections) as settled:
        launcher = detect()
        check(settled, launcher)
        orphan.started_by(launcher.name)
        from dist_train.run import session, start

        with start.joined(settled, launcher) as joined:
            return session.run(settled, *joined, quits=False)
