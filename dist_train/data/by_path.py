"""A data set by import path: whatever the class or function gives, as `sets.Data`."""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, Subset

from dist_train.config.tree import DataConfig
from dist_train.data.items import Items
from dist_train.data.order import chosen
from dist_train.data.sets import Data, Samples, Split
from dist_train.errors import ConfigError

TURN = "docs/data.md, section An IterableDataset, says what to do"


def gathered(cfg: DataConfig, given: Any, call: Callable[[Mapping[str, Any]], Any]) -> Data:
    """What was given for the training split, and for the test splits, as one data set. Raises ConfigError.

    Args:
        cfg: says where test splits come from.
        given: a Data, which is all; a map-style data set; or a dict of some by name, with one named train.
        call: what gives a map-style data set for other arguments.
    """
    if isinstance(given, Data):
        for key, value in (("test_args", cfg.test_args), ("test_fraction", cfg.test_fraction), ("pair", cfg.pair)):
            if value is not None:
                raise ConfigError(
                    f"data.{key}: got {value}, but {cfg.name} gives a Data, which says that; leave it out"
                )
        return given
    pair = None if cfg.pair is None else (cfg.pair[0], cfg.pair[1])
    if isinstance(given, Mapping):
        return _of_splits(cfg, given, pair)
    train, rest = _map_style(cfg, given, "train"), None
    tests: Any = None
    if cfg.test_args is not None:
        tests = {name: _map_style(cfg, call(args), name) for name, args in by_name(cfg.test_args).items()}
    elif cfg.test_fraction is not None:
        train, rest = _held_out(train, cfg.test_fraction)
        tests = {"": rest}
    return _data(given, train, tests or {}, pair)


def by_name(test_args: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The arguments for each test split; "" is the name of one that has none."""
    if test_args and all(isinstance(value, Mapping) for value in test_args.values()):
        return {str(name): dict(args) for name, args in test_args.items()}
    return {"": dict(test_args)}


def _of_splits(cfg: DataConfig, given: Mapping[str, Any], pair: tuple[str, str] | None) -> Data:
    """Of a dict of splits, as `datasets` gives it where no split is asked for."""
    if "train" not in given:
        raise ConfigError(
            f"data.name: got the splits {', '.join(map(str, given))} from {cfg.name}, expected one named train; name "
            f"the one to train on, such as --data.args.split {next(iter(given), 'NAME')}"
        )
    if cfg.test_args is not None or cfg.test_fraction is not None:
        raise ConfigError(
            f"data.{'test_args' if cfg.test_args is not None else 'test_fraction'}: got it for {cfg.name}, which gives "
            f"the splits {', '.join(map(str, given))}; leave it out, or write --data.args.split train"
        )
    splits = {str(name): _map_style(cfg, split, str(name)) for name, split in given.items()}
    train = splits.pop("train")
    return _data(given["train"], train, splits, pair)


def _data(named: Any, train: Any, tests: Mapping[str, Any], pair: tuple[str, str] | None) -> Data:
    def split(dataset: Any) -> Samples:
        return Samples(Items(dataset, pair), _identity(dataset))

    splits: dict[str, Split] = {name: split(dataset) for name, dataset in tests.items()}
    test = splits.get("") or splits or None
    return Data(split(train), test, classes=_classes(named, pair))


def _map_style(cfg: DataConfig, given: Any, name: str) -> Any:
    """Itself, if it has samples by number. Raises ConfigError."""
    which = "" if name == "train" else f" for the {name or 'test'} split"
    by_number = hasattr(type(given), "__getitem__") and hasattr(type(given), "__len__")
    if isinstance(given, IterableDataset) or (hasattr(type(given), "__iter__") and not by_number):
        raise ConfigError(
            f"data.name: got {type(given).__name__}{which} from {cfg.name}, an iterable data set, which has no order "
            f"that a run can resume in, nor a part for each rank; expected a map-style one; {TURN}"
        )
    if not by_number or isinstance(given, (str, bytes, tuple)):
        raise ConfigError(
            f"data.name: got {type(given).__name__}{which} from {cfg.name}, expected a map-style data set with "
            f"__len__ and __getitem__, a dict of these with one named train, or a dist_train.data.sets.Data"
        )
    return given


def _held_out(dataset: Any, fraction: float) -> tuple[Subset, Subset]:
    """The samples to train on, and those held out, each in its order. Raises ConfigError."""
    n = len(dataset)
    if not 0 < fraction < 1 or n < 2:
        raise ConfigError(
            f"data.test_fraction: got {fraction} of {n} samples, expected above 0 and below 1 of at least 2 samples"
        )
    count = min(max(1, round(fraction * n)), n - 1)
    held = np.zeros(n, bool)
    held[chosen(n, count)] = True
    return Subset(dataset, np.flatnonzero(~held).tolist()), Subset(dataset, np.flatnonzero(held).tolist())


def _classes(dataset: Any, pair: tuple[str, str] | None) -> tuple[str, ...]:
    """Names of classes, where the data set has them: as torchvision's, or the features of one of `datasets`."""
    names = getattr(dataset, "classes", None)
    if isinstance(names, (list, tuple)):
        return tuple(map(str, names))
    features = getattr(dataset, "features", None)
    if not isinstance(features, Mapping):
        return ()
    labels = {key: names for key, kind in features.items() if (names := getattr(kind, "names", None))}
    if pair is not None:
        return tuple(map(str, labels.get(pair[1], ())))
    return tuple(map(str, next(iter(labels.values())))) if len(labels) == 1 else ()


def _identity(dataset: Any) -> str:
    """Text that changes with the samples, as far as the data set tells it without reading them all."""
    if isinstance(dataset, Subset):
        return hashlib.sha256((_identity(dataset.dataset) + repr(dataset.indices)).encode()).hexdigest()
    targets = getattr(dataset, "targets", None)
    if isinstance(targets, torch.Tensor):
        targets = targets.tolist()
    if isinstance(targets, (list, tuple)):
        return hashlib.sha256(repr(targets).encode()).hexdigest()
    return str(getattr(dataset, "_fingerprint", ""))  # of `datasets`
