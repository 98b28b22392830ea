"""From a config to the parts of a run, before any process group: what is wrong with them is said by one line."""

from dataclasses import dataclass

import torch
from torch import nn

from dist_train import optim
from dist_train.config import Config
from dist_train.data import DATASETS
from dist_train.data.feed import Feed
from dist_train.data.sets import Data
from dist_train.errors import ConfigError
from dist_train.lookup import load
from dist_train.models import MODELS
from dist_train.order import steps_per_epoch
from dist_train.precision import Precision


@dataclass(frozen=True)
class Parts:
    """What a run is made of.

    Args:
        data: the data set.
        model: on the device, with the initial weights of the seed.
        feed: batches of the training split.
        test_feed: batches of the test split.
        precision: the formats of the run.
    """

    data: Data
    model: nn.Module
    feed: Feed
    test_feed: Feed
    precision: Precision

    def describe(self) -> str:
        """A line for people."""
        weights = sum(p.numel() for p in self.model.parameters())
        return f"{len(self.data.train):,} samples to train on, {len(self.data.test):,} to test, {weights:,} weights"


def build(config: Config, device: torch.device) -> Parts:
    """Reads the data and builds the model. Raises ConfigError for what only doing so can show."""
    precision = Precision(config.train.precision, device)
    precision.apply()
    cfg, dtype = config.data, precision.dtype
    data = _call(load(DATASETS, cfg.name, "data.name"), "data.args", root=cfg.root, download=cfg.download, **cfg.args)
    if steps_per_epoch(len(data.train), config.train.global_batch_size, config.train.drop_last) == 0:
        raise ConfigError(
            f"train.drop_last: got true with {len(data.train)} samples in batches of {config.train.global_batch_size}, "
            f"expected at least one whole batch; for example --train.global_batch_size {max(1, len(data.train))}"
        )
    model = build_model(config, data).to(device, dtype)
    optim.factory(config.optim)([nn.Parameter(torch.zeros(2, 2))])  # its arguments are right, or that is said now
    feeds = [
        Feed(split, data, device, dtype, cfg.normalize, cfg.one_hot, cfg.workers, config.train.seed)
        for split in (data.train, data.test)
    ]
    return Parts(data, model, *feeds, precision)


def build_model(config: Config, data: Data) -> nn.Module:
    """The model with initial weights that depend on the seed alone: drawn on the CPU, the same on every rank."""
    cfg = config.model
    fields = {"hidden": cfg.hidden, "activation": cfg.activation, "dropout": cfg.dropout}
    given = {k: v for k, v in fields.items() if v is not None} | cfg.args
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.train.seed)
        return _call(
            load(MODELS, cfg.name, "model.name"),
            "model.args",
            input_shape=data.input_shape,
            classes=len(data.classes),
            **given,
        )


def _call(function, path: str, **arguments):
    try:
        return function(**arguments)
    except TypeError as error:
        raise ConfigError(f"{path}: got {arguments}, which {function.__name__} refuses: {error}") from error
