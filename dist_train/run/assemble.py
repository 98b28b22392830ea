"""From a config to the parts of a run, before any process group: what is wrong with them is said by one line."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from dist_train.backends import recompute
from dist_train.backends.precision import Precision, cast
from dist_train.backends.probe import NOTHING, Findings
from dist_train.backends.start import Start
from dist_train.checkpoint import places, weights
from dist_train.checkpoint.manifest import Best
from dist_train.checkpoint.places import Folder
from dist_train.config.arguments import asked, placed
from dist_train.config.lookup import load
from dist_train.config.objects import as_objects
from dist_train.config.own_code import blamed
from dist_train.config.tree import Config, DataConfig, OptimConfig
from dist_train.config.values import unknown
from dist_train.data import BATCH_TRANSFORMS, DATASETS, read
from dist_train.data.batch_transforms import BatchTransform, BatchTransforms
from dist_train.data.feed import Feed
from dist_train.data.order import global_indices, steps_per_epoch
from dist_train.data.rules import parts_of as transform_of
from dist_train.data.sets import Columns, Data, Gathered
from dist_train.errors import ConfigError
from dist_train.loop import optim
from dist_train.loop.evaluate import Evaluation
from dist_train.loop.work import total_steps
from dist_train.models import MODELS, draws
from dist_train.models.blocks import blocks
from dist_train.models.frozen import freeze
from dist_train.models.llama import DECODER, filled
from dist_train.ranks.dist import World
from dist_train.run import deferral
from dist_train.run.batch_statistics import LOOKED_AT, trained_norms
from dist_train.run.look import look
from dist_train.tasks import TASKS
from dist_train.tasks.base import Examiner, Task, units_per_sample
from dist_train.track.words import lower_is_better, parts_of

# Of a model that nobody knows how to call but a loop of the user's own: any step may take another way through it.
UNSEEN = Findings(varies=True)


@dataclass(frozen=True)
class Parts:
    """What a run is made of.

    Args:
        data: the data set.
        task: what the model is trained for.
        model: on the device, with the weights that training starts from; see `start`.
        feeds: batches of each split, by the names of data.splits.
        precision: the formats of the run.
        loaded: lines about what was loaded from model.init_from.
        findings: what a first forward and backward of the model showed.
        optims: of the parts of a model that have an optimizer each, by their name.
        start: gives the model its weights once it is sharded, where it is on the meta device until then.
    """

    data: Data
    task: Task
    model: nn.Module
    feeds: dict[str, Feed]
    precision: Precision
    loaded: tuple[str, ...]
    findings: Findings = NOTHING
    optims: Mapping[str, OptimConfig] = field(default_factory=dict)
    start: Start | None = None

    @property
    def feed(self) -> Feed:
        """Batches of the training split."""
        return self.feeds["train"]

    @property
    def test_feeds(self) -> dict[str, Feed]:
        """Batches of each test split; the name of the only one is empty."""
        return {name: self.feeds[name or "test"] for name in self.data.tests} if self.task.evaluates else {}

    def evaluation(self, config: Config, world: World, examiners: Mapping[str, Examiner] | None = None) -> Evaluation:
        """Of the test splits.

        Args:
            config: the run.
            world: this rank's place.
            examiners: watch the last one, by the name of their split.
        """
        of = config.train, self.task, self.test_feeds, world, self.precision, self.findings.sample_bytes
        return Evaluation(*of, examiners)

    def unfused(self, config: Config) -> bool:
        """Whether no fused kernel may update the weights: it takes no sparse gradients, and computes the last elements
        of a shard by other instructions, so that their last bits would depend on where a shard ends."""
        return bool(self.findings.sparse) or config.backend.reduce == "ordered"

    def describe(self) -> str:
        """A line for people."""
        weights = sum(p.numel() for p in self.model.parameters())
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        tests = "".join(f", {len(split):,} to test{f' as {n}' if n else ''}" for n, split in self.data.tests.items())
        of_these = f", {trained:,} of them trained" if trained < weights else ""
        return f"{len(self.data.train):,} samples to train on{tests}, {weights:,} weights{of_these}"

    def about(self) -> list[str]:
        """What the splits are made of, a line each, of those that say it."""
        splits = self.data.splits.items()
        return [f"{name}: {split.about}" for name, split in splits if isinstance(split, Gathered) and split.about]

    def images(self, seed: int, count: int = 24) -> torch.Tensor | None:
        """The first samples that are trained on, [n, 1 or 3, height, width], uint8 or in [0, 1]; None if a sample is
        no image."""
        split, shape = self.data.train, tuple(self.data.input_shape or ())
        if not self.feed.paired or len(shape) != 3 or shape[0] not in (1, 3):
            return None
        first = global_indices(len(split), seed, 0, 0, min(count, len(split)))
        pixels = self.feed.inputs(first.copy())  # torch takes no read-only array
        if pixels.dtype == torch.uint8:
            return pixels
        low, high = pixels.min(), pixels.max()
        return (pixels - low) / (high - low).clamp(min=1e-12)


def build(
    config: Config, device: torch.device, trained: Folder | None = None, warm: bool = True, defers: bool = False
) -> Parts:
    """Reads the data and builds the model. Raises ConfigError for what only doing so can show.

    Args:
        config: the run.
        device: of this rank.
        trained: the folder of a finished run, or of a checkpoint, whose weights the model gets.
        warm: start from model.init_from; false where a checkpoint's weights follow.
        defers: the model may get its weights once it is sharded, as backend.start says.
    """
    precision = Precision(config.train.precision, device)
    precision.apply()
    cfg, dtype = config.data, precision.dtype
    data = read_data(cfg, cfg.download)
    mixed = batch_transforms(config, data)
    if steps_per_epoch(len(data.train), config.train.global_batch_size, config.train.drop_last) == 0:
        raise ConfigError(
            f"train.drop_last: got true with {len(data.train)} samples in batches of {config.train.global_batch_size}, "
            f"expected at least one whole batch; for example --train.global_batch_size {max(1, len(data.train))}"
        )
    task = make_task(config, data)
    per_epoch = steps_per_epoch(len(data.train), config.train.global_batch_size, config.train.drop_last)
    of_all = device, dtype, cfg.normalize, cfg.one_hot, cfg.workers, config.train.seed, task.loss_of_vectors
    feeds = {
        name: Feed(split, data, *of_all, mixed if name == "train" else None) for name, split in data.splits.items()
    }

    def whole() -> nn.Module:
        return build_model(config, data, dtype, trained, warm)[0].to(device)

    def seen(model: nn.Module, start: Start | None, loaded: tuple[str, ...]) -> Parts:
        optim.check(config.optim, model, total_steps(config.train, per_epoch))
        if config.compile.scope == "step" and trained is None:
            _check_captured(task, data, feeds["train"], device)
        parts = Parts(data, task, model, feeds, precision, loaded, start=start)
        return _looked_at(config, parts, trained is None, whole)

    why = None
    if defers and deferral.defers(config):
        try:
            begun = deferral.begun(config, maker(config, data), dtype, device, warm)
            if begun is not None:
                parts = seen(*begun)
                deferral.check_left(config.backend.start)
                return parts
        except deferral.Whole as error:
            why = deferral.said(str(error))
        begun = None
        deferral.check_left(config.backend.start)
    model, loaded = build_model(config, data, dtype, trained, warm)
    return seen(model.to(device), None, loaded if why is None else (*loaded, why))


def _looked_at(config: Config, parts: Parts, trains: bool, whole: Callable[[], nn.Module]) -> Parts:
    """The parts with what a first look at the model shows.

    Args:
        config: the run.
        parts: without that.
        trains: false where the model is only evaluated.
        whole: builds the model again.

    Raises:
        ConfigError: of what is seen.
        deferral.Whole: the look needs values, which the model does not have yet.
    """
    data, task, model = parts.data, parts.task, parts.model
    if trains:
        recompute.check(model, config)
    if trains and config.train.draws == "keyed":
        draws.frame(model, config.model.blocks, parts=not task.evaluates)
    if not task.evaluates:
        return replace(parts, findings=replace(UNSEEN, norms=tuple(trained_norms(model))))
    with blamed("task.name", config.task.name, "shown the model", ours=config.task.name in TASKS):
        task.begin(model)
    of = task, parts.feed, data, parts.precision, trains
    if parts.start is not None:  # a task may keep what it was shown
        shown = make_task(config, data)
        shown.begin(model)
        findings = deferral.looked(config, model, shown, *of[1:])
    else:
        with blamed("model.name", config.model.name, "called on the first samples", ours=config.model.name in MODELS):
            findings = look(config, model, *of)
    for _ in blocks(model, config.model.blocks):  # are found, or that is said now
        pass
    _check_best(config, data, findings.metrics)
    if findings.written and parts.start is None:  # which the first samples have done now, so again from the start
        looked_at, model = model, whole()
        draws.frame_as(model, looked_at)
    return replace(parts, model=model, findings=findings)


def _check_best(config: Config, data: Data, metrics: tuple[str, ...]) -> None:
    """Raises ConfigError where nothing measures what the best checkpoint is decided by."""
    wanted, keeps = config.checkpoint.best_metric, config.checkpoint.keep_best
    valid = _evaluated(data, metrics)
    if keeps and not valid:
        raise ConfigError(
            f"checkpoint.keep_best: got {keeps} for a data set without a test split, expected one that the best is "
            f"measured on; leave it out"
        )
    if wanted is not None and valid and wanted not in valid:
        raise ConfigError(unknown("checkpoint.best_metric", wanted, valid, "metric"))


def _check_captured(task: Task, data: Data, feed: Feed, device: torch.device) -> None:
    """Raises ConfigError where a step asks the host for something."""
    if not feed.resident:
        kind = f"too large for {device} beside a model" if isinstance(data.train, Columns) else "read from files"
        raise ConfigError(
            f"compile.scope: got step, but the training samples are {kind}, expected them in the device's memory; "
            f"write --compile.scope model"
        )
    if units_per_sample(task) is None:
        raise ConfigError(
            "compile.scope: got step, but the units of this task are counted in every batch, expected as many in each "
            "sample; write --compile.scope model"
        )


def read_data(cfg: DataConfig, download: bool) -> Data:
    """The data set. Raises ConfigError."""
    return read.data(cfg, partial(call, DATASETS, cfg.name, "data"), download)


def batch_transforms(config: Config, data: Data) -> BatchTransforms | None:
    """What is done to batches that are trained on. Raises ConfigError."""
    each = []
    for entry in config.data.batch_transforms:
        name, args = transform_of(entry)
        made = call(BATCH_TRANSFORMS, name, "data.batch_transforms", data.known(), args)
        if not isinstance(made, BatchTransform):
            raise ConfigError(
                f"data.batch_transforms: got {name}, which gives {type(made).__name__}, expected a class that is "
                f"derived from dist_train.data.batch_transforms.BatchTransform"
            )
        each.append(made)
    return BatchTransforms(each, config.train.seed) if each else None


def make_task(config: Config, data: Data) -> Task:
    """What the model is trained for. Raises ConfigError."""
    cfg = config.task
    fields = {"loss": cfg.loss, "metrics": cfg.metrics}
    given = {k: v for k, v in fields.items() if v is not None} | cfg.args
    task = call(TASKS, cfg.name, "task", data.known(), given)
    if not isinstance(task, Task):
        raise ConfigError(
            f"task.name: got {cfg.name}, which gives {type(task).__name__}, expected a class that is derived from "
            f"dist_train.tasks.base.Task"
        )
    return task


def best(config: Config, task: Task, data: Data) -> Best:
    """What decides which checkpoint is the best."""
    return best_of(config.checkpoint.best_metric, task, data)


def best_of(metric: str | None, task: Task, data: Data) -> Best:
    """Which way a metric gets better; None is the task's own, of the first test split."""
    first = next(iter(data.tests), "")
    metric = metric or (f"eval/{first}/{task.best}" if first else f"eval/{task.best}")
    return Best(metric, lower_is_better(parts_of(metric, data.tests)[1], task.lower_is_better))


def results(config: Config, parts: Parts) -> tuple[tuple[str, ...], frozenset[str]]:
    """The metrics of an evaluation, as they are logged, first that which the best checkpoint is decided by; and those
    of which the least is the best."""
    task, data = parts.task, parts.data
    all_of_them = _evaluated(data, parts.findings.metrics) if task.evaluates else []
    first = best(config, task, data).metric
    lowest = frozenset(name for name in all_of_them if best_of(name, task, data).lowest)
    return tuple(sorted(all_of_them, key=lambda name: name != first)), lowest


def _evaluated(data: Data, metrics: tuple[str, ...]) -> list[str]:
    return [f"eval/{name}/{metric}" if name else f"eval/{metric}" for name in data.tests for metric in metrics]


def build_model(
    config: Config, data: Data, dtype: torch.dtype, trained: Folder | None = None, warm: bool = False
) -> tuple[nn.Module, tuple[str, ...]]:
    """The model on the CPU, and lines about what was loaded into it.

    Its initial weights depend on the seed alone, and on the file of model.init_from: the same on every rank.
    """
    cfg, make = config.model, maker(config, data)
    if trained is not None:
        return weights.trained(make, dtype, trained), ()
    if warm and cfg.init_from is not None:
        return weights.warm_start(make, dtype, places.at(cfg.init_from), cfg.init_strict)
    return cast(make(), dtype), ()


def maker(config: Config, data: Data) -> Callable[[], nn.Module]:
    """A function that makes the model with its initial weights."""
    cfg = filled(config).model
    least, there = data.known().get("vocab_size", 0), cfg.args.get("vocab_size")
    if cfg.name == DECODER and there is not None and there < least:
        raise ConfigError(
            f"model.args.vocab_size: got {there:,} for data of {least:,} tokens, expected as many at least; take the "
            f"tokenizer of the model: --data.args.tokenizer FOLDER/tokenizer.json"
        )
    fields = {"hidden": cfg.hidden, "activation": cfg.activation, "dropout": cfg.dropout}
    given = {k: v for k, v in fields.items() if v is not None} | cfg.args

    def make() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(config.train.seed)
            model = call(MODELS, cfg.name, "model", data.known(), given)
            _check_model(model, cfg.name)
            with blamed("model.name", cfg.name, "called on zeros", ours=cfg.name in MODELS):
                _settle_lazy(model, data)
            _check_state(model)
            if not model.training:  # as transformers' from_pretrained leaves it
                model.train()
            freeze(model, cfg.frozen)
            return model

    return make


def _settle_lazy(model: nn.Module, data: Data) -> None:
    """Gives lazy modules their shapes, and so their weights, by a forward of zeros."""
    if not any(is_lazy(tensor) for tensor in [*model.parameters(), *model.buffers()]):
        return
    if data.input_shape is None:
        raise ConfigError(
            "model.name: got a model with lazy layers for data without an input_shape, expected layers with their "
            "sizes; or give the shape of an input: Data(..., input_shape=(...))"
        )
    training = {module: module.training for module in model.modules()}
    with torch.no_grad():
        model.eval()(torch.zeros(LOOKED_AT, *data.input_shape))  # not in training, where a norm would remember it
    for module, was in training.items():
        module.training = was


def _check_state(model: nn.Module) -> None:
    """Raises ConfigError where a checkpoint could not hold what the model keeps."""
    for name, value in model.state_dict().items():
        if not isinstance(value, torch.Tensor):
            raise ConfigError(
                f"model: got {type(value).__name__} as {name} in its state, expected tensors alone, as a checkpoint "
                f"executes nothing when it is read; return a tensor from get_extra_state, or register a buffer"
            )


def _check_model(model: Any, name: str) -> None:
    if not isinstance(model, nn.Module):
        got = "nothing" if model is None else f"something of type {type(model).__name__}"
        raise ConfigError(
            f"model.name: got {name}, which gives {got}, expected a torch.nn.Module: a class that is derived from it, "
            f"or a function that returns one"
        )


def call(
    registry: Mapping[str, str], name: str, section: str, known: Mapping[str, Any], given: Mapping[str, Any]
) -> Any:
    """Calls what a section of the config names. Raises ConfigError: for arguments that it does not take, and for an
    error in the user's own code, with its file and line.

    Args:
        registry: names of ours.
        name: one of them, or module:attribute.
        section: of the config, or the path of a list of names.
        known: passed to the arguments that ask for it by name, and to no others.
        given: passed in any case.
    """
    path, args = (section, section) if "." in section else (f"{section}.name", f"{section}.args")
    function = load(registry, name, path)
    with blamed(path, name, "called", ours=name in registry):
        arguments = asked(function, known) | as_objects(function, given, known, args)
    refused = f"{args}: got {asked(function, known) | dict(given)}, which {name} refuses"
    first, rest = placed(function, arguments)
    try:
        inspect.signature(function).bind(*first, **rest)
    except TypeError as error:
        raise ConfigError(f"{refused}: {error}") from None
    except ValueError:
        pass  # of a class in C, which cannot be asked before
    try:
        with blamed(path, name, "called", ours=name in registry):
            return function(*first, **rest)
    except TypeError as error:  # of ours, which take what they are given
        raise ConfigError(f"{refused}: {error}") from error
