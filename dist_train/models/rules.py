"""What a model asks of the config. Pure, and before torch is imported."""

from collections.abc import Iterator

from dist_train.config import arguments
from dist_train.config.tree import Config
from dist_train.config.values import no_share
from dist_train.errors import ConfigError
from dist_train.models import MODELS
from dist_train.models.split_words import word_of
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
    yield from _statistics(config)
    for pattern, text in model.split.items():
        try:
            word_of(f"model.split: {pattern}", text)
        except ConfigError as error:
            yield from error.lines
    facts = arguments.facts_of(config)
    yield from arguments.problems(MODELS, model.name, "model", {**fields, **model.args}, given, facts=facts)


def _statistics(config: Config) -> Iterator[str]:
    path, asked, cfg = "model.batch_statistics", config.model.batch_statistics, config.train
    example = "for example --model.batch_statistics.group 32"
    if not isinstance(asked, dict):
        if asked not in (None, "global"):
            yield f"{path}: got {asked!r}, expected global, or {{group: SAMPLES}}; {example}"
        return
    group = asked.get("group")
    if asked.keys() != {"group"} or type(group) is not int or group < 1:
        yield f"{path}: got {asked}, expected global, or {{group: SAMPLES}}, a whole number above 0; {example}"
    elif group > cfg.global_batch_size:
        yield (
            f"{path}: got groups of {group}, expected at most train.global_batch_size, which is "
            f"{cfg.global_batch_size}; write --model.batch_statistics global"
        )
    elif cfg.micro_batch_size is not None and cfg.micro_batch_size % group:
        yield (
            f"train.micro_batch_size: got {cfg.micro_batch_size} with {path} {{group: {group}}}, expected whole groups"
            f"; for example --train.micro_batch_size {group * max(1, cfg.micro_batch_size // group)}"
        )
