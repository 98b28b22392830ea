"""What a model asks of the config. Pure, and before torch is imported."""

from collections.abc import Iterator

from dist_train.config import arguments
from dist_train.config.tree import Config
from dist_train.config.values import no_share
from dist_train.models import MODELS
from dist_train.ranks.launcher import Launcher

FIELDS = ("hidden", "activation", "dropout")


def problems(config: Config, _: Launcher) -> Iterator[str]:
    """A line for every mistake."""
    model = config.model
    yield from no_share({"model.dropout": model.dropout})
    if model.hidden is not None and any(size < 1 for size in model.hidden):
        yield f"model.hidden: got {model.hidden}, expected sizes of at least 1; for example --model.hidden '[512, 512]'"
    fields = {k: getattr(model, k) for k in FIELDS if getattr(model, k) is not None}
    given = {"model." + k for k in fields} | {"model.args." + k for k in model.args}
    for key in FIELDS:
        if key in model.args:
            yield f"model.args.{key}: got {model.args[key]!r}, expected it as model.{key}; write --model.{key}"
    facts = arguments.facts_of(config)
    yield from arguments.problems(MODELS, model.name, "model", {**fields, **model.args}, given, facts=facts)
