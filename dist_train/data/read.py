"""The data set of a config: what its name gives, with the facts and the transforms that the config states."""

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from dist_train.config.own_code import frames
from dist_train.config.tree import DataConfig
from dist_train.data import DATASETS, FROM_FILES
from dist_train.data.randomness import kept_apart
from dist_train.data.reader import raised
from dist_train.data.sets import Columns, Data, Gathered, Samples, Split
from dist_train.errors import ConfigError, OwnCodeError

LIBRARIES = ("torchvision", "datasets")  # whose errors are not of the user's own code

Call = Callable[[Mapping[str, Any], Mapping[str, Any]], Any]


def data(cfg: DataConfig, call: Call, download: bool) -> Data:
    """The data set. Raises ConfigError.

    Args:
        cfg: of the run.
        call: calls what cfg.name names: with what it asks for by name, and with arguments that it gets in any case.
        download: what is missing may be downloaded.
    """
    known: dict[str, Any] = {"root": cfg.root, "download": download}
    train, test = (
        _transforms(cfg.transforms, "data.transforms"),
        _transforms(cfg.test_transforms, "data.test_transforms"),
    )
    if cfg.name in FROM_FILES:  # these apply them themselves, and hold the shape of each image against the first one's
        return _settled(call(known | {"transforms": train, "test_transforms": test}, cfg.args), cfg, {})
    if cfg.name in DATASETS:
        found = given = call(known, cfg.args)
    else:
        from dist_train.data import by_path

        def made(args: Mapping[str, Any]) -> Any:
            return _of_library(call, known, {**cfg.args, **args}, cfg.name)

        given = made({})
        found = by_path.gathered(cfg, given, made)
    changed: dict[str, Any] = {}
    if train is not None or test is not None:
        tests = {name: _transformed(split, test) for name, split in found.tests.items()}
        changed = {"train": _transformed(found.train, train), "test": tests.get("", tests or None)}
    if train is not None or (found is not given and found.input_shape is None):
        changed["input_shape"] = _shape_of(changed.get("train", found.train))
    return _settled(found, cfg, changed)


def _of_library(call: Call, known: Mapping[str, Any], args: Mapping[str, Any], name: str) -> Any:
    """What a library gives, or the user's own code. One process of a node downloads while the others wait for it.

    Raises:
        ConfigError: with what it says; of the user's own code, with the lines of it.
    """
    library, _, kind = name.rpartition(":")
    alone = nullcontext()
    if library.startswith("torchvision") and known["download"]:
        from dist_train.data import vision

        alone = vision.alone(kind, Path(known["root"]))
    try:
        with alone:
            return call(known, args)
    except OwnCodeError as error:
        if library.partition(".")[0] not in LIBRARIES or frames(error.__cause__ or error):
            raise
        said = " ".join(f"{type(error.__cause__).__name__}: {error.__cause__}".split())
        raise ConfigError(f"data.name: {name} raises {said}; mend data.root, data.download or data.args") from error


def _settled(found: Data, cfg: DataConfig, changed: dict[str, Any]) -> Data:
    """The same with what was changed, and with what the config says of it."""
    facts = dict(cfg.facts)
    if "classes" in facts:
        names = facts.pop("classes")
        changed["classes"] = tuple(map(str, range(names) if isinstance(names, int) else names))
    for key in ("input_shape", "mean", "std"):
        if key in facts:
            changed[key] = tuple(facts.pop(key))
    return dataclasses.replace(found, **changed, facts={**found.facts, **facts})


def _shape_of(split: Split) -> tuple[int, ...] | None:
    """Of the input of a pair, by the first one; None of anything else. Raises ConfigError."""
    if isinstance(split, Columns):
        return tuple(split.tree[0].shape[1:]) or None if _is_pair(split.tree) else None
    if isinstance(split, Gathered) or split.collate is not None:
        return None
    with kept_apart():
        try:
            first = split.dataset[0]
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(f"data.name: sample 0: {raised(error, 'it is read')}") from error
    return tuple(first[0].shape) or None if _is_pair(first) else None


def _is_pair(tree: Any) -> bool:
    return isinstance(tree, (tuple, list)) and len(tree) == 2 and isinstance(tree[0], torch.Tensor)


def _transforms(entries: list[Any], path: str) -> Any:
    if not entries:
        return None
    try:
        from dist_train.data.transforms import Transforms
    except ModuleNotFoundError as error:
        raise ConfigError(f"{path}: got transforms without {error.name}; pip install torchvision") from None
    return Transforms(entries, path)


def _transformed(split: Split, transforms: Any) -> Split:
    """The split, each of whose samples is transformed as it is read. Columns are read by workers then."""
    if transforms is None:
        return split
    from dist_train.data.items import Items, Rows

    if isinstance(split, Gathered):
        raise ConfigError(
            "data.transforms: got transforms of a data set that is gathered batch by batch, expected none; leave them "
            "out, or do their work in the data set"
        )
    if isinstance(split, Columns):
        return Samples(Items(Rows(split), transforms=transforms), split.identity)
    if isinstance(split.dataset, Items):  # one by path
        return dataclasses.replace(split, dataset=Items(split.dataset.dataset, split.dataset.keys, transforms))
    return dataclasses.replace(split, dataset=Items(split.dataset, transforms=transforms), draws=True)
