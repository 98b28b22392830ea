"""The hooks that a config asks for."""

from dist_train.config.lookup import load
from dist_train.config.own_code import blamed
from dist_train.config.tree import Config
from dist_train.errors import ConfigError
from dist_train.loop.rules import EARLY_STOPPING
from dist_train.run import HOOKS, assemble
from dist_train.run.check import hook_of
from dist_train.run.early_stopping import EarlyStopping
from dist_train.run.hooks import Hook, named


def build(config: Config, parts: assemble.Parts) -> dict[str, Hook]:
    """The hooks of a run, by name. Raises ConfigError.

    Args:
        config: of the run.
        parts: of the run.
    """
    return named([*_early_stopping(config, parts), *(_made(entry) for entry in config.train.hooks)])


def _early_stopping(config: Config, parts: assemble.Parts) -> list[Hook]:
    asked = config.train.early_stopping
    if not asked:
        return []
    if parts.task.evaluates and not parts.test_feeds:
        raise ConfigError(
            "train.early_stopping: got a metric to look at, but the data set has no test split to evaluate; leave it "
            "out, or give a test split"
        )
    settings = EARLY_STOPPING | asked
    best = assemble.best_of(settings["metric"], parts.task, parts.data)
    return [EarlyStopping(best, settings["patience"], float(settings["min_delta"]))]


def _made(entry: object) -> Hook:
    found = hook_of(entry)
    assert found is not None, "held by check.py"
    name, args = found
    kind = load(HOOKS, name, "train.hooks")
    with blamed("train.hooks", name, "called", ours=name in HOOKS):
        return kind(**args)
