"""Each task gives the same under every backend and at every world size, and says what does not fit."""

import dataclasses
from contextlib import nullcontext
from functools import cache
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from user_tasks import IGNORED

from dist_train.config.tree import (
    BackendConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    TaskConfig,
    TrackConfig,
    TrainConfig,
)
from dist_train.data.batch import Batch
from dist_train.errors import ConfigError, OwnCodeError
from dist_train.loop.evaluate import Sums
from dist_train.ranks import dist
from dist_train.ranks.launcher import Launcher
from dist_train.run import assemble
from dist_train.run.check import check
from dist_train.run.look import check_shares
from dist_train.tasks.base import units_of, units_per_sample
from dist_train.tasks.classification import Classification
from dist_train.tasks.multi_label import MultiLabel
from dist_train.tasks.regression import Regression
from dist_train.tasks.segmentation import Segmentation
from dist_train.tools.agreement import Trajectory, difference
from dist_train.tools.trajectory import trajectory

from faults import averaged, own_units
from parity_cells import ALONE, TOLERANCE, this_world
from workers import run_ranks

STEPS, BATCH = 6, 7
CPU = torch.device("cpu")
MLP = ModelConfig(hidden=[12], activation="Tanh")


def config(
    data: str, task: TaskConfig, model: ModelConfig = MLP, micro_batch_size: int | None = None, **args
) -> Config:
    """Steps of 7, 7 and 2 of 16 samples: on three ranks the last leaves one of them without any."""
    return Config(
        data=DataConfig(name=f"user_tasks:{data}", args=args),
        task=task,
        model=model,
        optim=OptimConfig(name="SGD", lr=0.05, momentum=0.9),
        train=TrainConfig(
            epochs=STEPS, max_steps=STEPS, global_batch_size=BATCH, micro_batch_size=micro_batch_size, device="cpu",
            eval_every_epochs=None,
        ),
        track=TrackConfig(every_steps=1),
    )  # fmt: skip


def task(name: str, loss: str | None = None, metrics: list | None = None, **args) -> TaskConfig:
    return TaskConfig(name, loss, args, metrics)


PIXELS = ModelConfig(name="user_tasks:Pixels")
CELLS = {
    "classification": config(
        "classed",
        task(
            "classification", metrics=["accuracy", "top_2_accuracy", "f1"], class_weights=[1, 2, 0.5, 1], ignore_index=3
        ),
        micro_batch_size=2,
    ),
    "regression": config("numbers", task("regression", "huber", delta=0.7), micro_batch_size=2),
    "one number": config("numbers", task("regression", "l1"), k=0),
    "multi_label": config("labels", task("multi_label", pos_weight=[1, 2, 3], metrics=["f1", "exact_match"])),
    "segmentation": config(
        "masks",
        task("segmentation", class_weights=[1, 2, 0.5], ignore_index=IGNORED),
        PIXELS,
        micro_batch_size=2,
    ),
    "masks in files": config("masks", task("segmentation", ignore_index=IGNORED), PIXELS, files=True),
    "model_loss": config("numbers", task("model_loss"), ModelConfig(name="user_tasks:OwnLoss"), micro_batch_size=2),
    "words": config("sentences", task("user_tasks:NextWord"), ModelConfig(name="user_tasks:Words"), micro_batch_size=2),
    "contrastive": config("numbers", task("user_tasks:Contrastive")),
}
# What is rounded; all other metrics are made of counts.
ROUNDED = ("eval/loss", "eval/mae", "eval/rmse", "eval/r2")
BACKENDS = ("ddp", "fsdp2", "deepspeed:2", "deepspeed:3", "accelerate")


def under(cell: Config, backend: str) -> Config:
    name, _, stage = backend.partition(":")
    return dataclasses.replace(cell, backend=BackendConfig(name=name, zero_stage=int(stage) if stage else None))


@cache
def reference(name: str) -> Trajectory:
    """In one process, without micro-batches."""
    cell = CELLS[name]
    return trajectory(under(dataclasses.replace(cell, train=dataclasses.replace(cell.train, micro_batch_size=None)),
                            "single"), ALONE)  # fmt: skip


def run_cells(cells: list[Config], planted: str = "") -> list[Trajectory]:
    """In a worker: each config's run, with a fault."""
    plants = {"units by rank": (dist, "sum_later", own_units), "metrics by rank": (Sums, "over_ranks", averaged)}
    with patch.object(*plants[planted]) if planted else nullcontext():
        return [trajectory(cell, this_world()) for cell in cells]


def compare(names: list[str], backend: str, ranks: int, planted: str = "") -> None:
    runs = run_ranks(run_cells, ranks, [under(CELLS[name], backend) for name in names], planted, timeout_s=240)
    for rank, of_rank in enumerate(runs):
        for name, run in zip(names, of_rank, strict=True):
            expected, where = reference(name), f"{name} under {backend} on rank {rank} of {ranks}"
            assert run.evaluation.keys() == expected.evaluation.keys() and "eval/loss" in run.evaluation
            for metric, value in run.evaluation.items():
                exact = 0.0 if metric not in ROUNDED else TOLERANCE["float32"]
                assert abs(value - expected.evaluation[metric]) <= exact * abs(value), f"{where}: {metric}"
            if not rank:  # the others may have no weights
                found = difference(run, expected)
                assert found.worst < TOLERANCE["float32"], f"{where}: {found}"


SOME = ["words", "contrastive", "segmentation", "regression"]


@pytest.mark.parametrize(
    ("backend", "ranks", "names"),
    [
        ("single", 1, ["classification", "regression", "segmentation", "model_loss", "words"]),
        ("ddp", 3, list(CELLS)),
        ("fsdp2", 2, list(CELLS)),
        ("deepspeed:2", 3, SOME),
        ("deepspeed:3", 2, SOME),
        ("accelerate", 3, SOME),
    ],
)
def test_a_task_is_the_same_everywhere(backend: str, ranks: int, names: list[str]):
    if backend == "single":  # micro-batches alone
        for name in names:
            assert difference(trajectory(under(CELLS[name], "single"), ALONE), reference(name)).worst < 1e-5, name
    else:
        compare(names, backend, ranks)


@pytest.mark.full
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_task_is_the_same_everywhere_in_full(backend: str, ranks: int):
    compare(list(CELLS), backend, ranks)


@pytest.mark.parametrize(
    ("planted", "name"), [("units by rank", "words"), ("units by rank", "segmentation"), ("metrics by rank", "words")]
)
def test_a_planted_fault_is_seen(planted: str, name: str):
    with pytest.raises(AssertionError, match=f"{name} under ddp on rank 0 of 2"):
        compare([name], "ddp", 2, planted)


def test_units_of_a_task_that_are_not_those_of_its_loss_are_seen():
    cell = dataclasses.replace(CELLS["words"], task=task("user_tasks:PerSample"))
    assert difference(trajectory(under(cell, "single"), ALONE), reference("words")).worst > 1e-2


# -- each loss against torch's -----------------------------------------------------------------------------------------


def batch_of(inputs: torch.Tensor, targets: torch.Tensor) -> Batch:
    return Batch((inputs, targets), torch.arange(len(inputs)), len(inputs))


OUTPUTS, MANY = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1)
TRUTH, NUMBERS = torch.randint(4, (9,), generator=MANY), torch.randn(9, 4, generator=MANY)
LABELS, MASK = torch.randint(2, (9, 4), generator=MANY), torch.randint(4, (9, 2, 3), generator=MANY)
WEIGHTS = [1.0, 2.0, 0.5, 3.0]
PICTURES = OUTPUTS[:, :, None, None] * torch.arange(1.0, 7).view(2, 3)


@pytest.mark.parametrize(
    ("made", "outputs", "targets", "expected"),
    [
        (lambda: Classification(classes=4), OUTPUTS, TRUTH, F.cross_entropy(OUTPUTS, TRUTH)),
        (
            lambda: Classification(classes=4, class_weights=WEIGHTS, ignore_index=1, label_smoothing=0.1),
            OUTPUTS,
            TRUTH,
            F.cross_entropy(OUTPUTS, TRUTH, torch.tensor(WEIGHTS), ignore_index=1, label_smoothing=0.1),
        ),
        (lambda: Regression(), OUTPUTS, NUMBERS, F.mse_loss(OUTPUTS, NUMBERS)),
        (lambda: Regression("l1"), OUTPUTS[:, :1], NUMBERS[:, 0], F.l1_loss(OUTPUTS[:, 0], NUMBERS[:, 0])),
        (lambda: Regression("l1"), OUTPUTS[:, 0], NUMBERS[:, :1], F.l1_loss(OUTPUTS[:, 0], NUMBERS[:, 0])),
        (lambda: Regression("huber", 0.3), OUTPUTS, NUMBERS, F.huber_loss(OUTPUTS, NUMBERS, delta=0.3)),
        (lambda: Regression("smooth_l1", 0.3), OUTPUTS, NUMBERS, F.smooth_l1_loss(OUTPUTS, NUMBERS, beta=0.3)),
        (lambda: MultiLabel(), OUTPUTS, LABELS, F.binary_cross_entropy_with_logits(OUTPUTS, LABELS.float())),
        (
            lambda: MultiLabel(WEIGHTS),
            OUTPUTS,
            LABELS,
            F.binary_cross_entropy_with_logits(OUTPUTS, LABELS.float(), pos_weight=torch.tensor(WEIGHTS)),
        ),
        (lambda: Segmentation(classes=4, target_shape=(2, 3)), PICTURES, MASK, F.cross_entropy(PICTURES, MASK)),
        (lambda: Segmentation(classes=4), PICTURES, MASK.to(torch.uint8), F.cross_entropy(PICTURES, MASK)),
        (
            lambda: Segmentation(classes=4, class_weights=WEIGHTS, ignore_index=2),
            PICTURES,
            MASK,
            F.cross_entropy(PICTURES, MASK, torch.tensor(WEIGHTS), ignore_index=2),
        ),
    ],
)
def test_a_loss_over_its_units_is_torchs(made, outputs, targets, expected):
    one, batch = made(), batch_of(torch.zeros(9), targets)
    one.check(batch, outputs)
    model = nn.Module()
    model.forward = lambda inputs: outputs
    sums = one.sums(model.eval(), batch)
    assert float(sums["loss"] / units_of(one, batch)) == pytest.approx(float(expected), rel=1e-6)
    assert set(one.sums(model.train(), batch)) == {"loss"}  # metrics cost nothing in training


def test_pixels_are_counted_only_where_they_must_be():
    known = units_per_sample(Segmentation(classes=3, target_shape=(4, 6)))
    assert known == 24
    assert units_per_sample(Segmentation(classes=3, target_shape=(4, 6), ignore_index=1)) is None
    assert units_per_sample(Segmentation(classes=3)) is None  # masks may have several sizes
    assert units_per_sample(Regression()) == units_per_sample(MultiLabel()) == 1
    one = Segmentation(classes=4, target_shape=(4, 6))
    with pytest.raises(ConfigError, match=r"got masks \[9, 2, 3\], expected the size \(4, 6\)"):
        one.fitted(PICTURES, MASK)


def test_what_a_data_set_says_of_its_targets():
    known = {name: assemble.read_data(CELLS[name].data, False).known() for name in CELLS}
    assert (known["regression"]["outputs"], known["one number"]["outputs"]) == (2, 1)
    assert known["multi_label"]["outputs"] == known["multi_label"]["classes"] == 3
    assert known["segmentation"] == {"input_shape": (2, 4, 6), "classes": 3, "outputs": 3, "target_shape": (4, 6)}
    assert "target_shape" not in known["masks in files"] and known["words"] == {"vocab_size": 7}


# -- what does not fit -------------------------------------------------------------------------------------------------


def wrong(*shape: int) -> ModelConfig:
    return ModelConfig(name="user_tasks:Wrong", args={"shape": list(shape)})


@pytest.mark.parametrize(
    ("cell", "line"),
    [
        (
            config("numbers", task("regression"), wrong(3)),
            "model: got outputs torch.float32 [2, 3], expected a float tensor [2, 2], as the targets of 2 samples are",
        ),
        (
            config("numbers", task("regression"), wrong(2), k=0),
            "model: got outputs torch.float32 [2, 2], expected a float tensor [2] or [2, 1], as the targets",
        ),
        (
            config("labels", task("multi_label"), wrong(2)),
            "model: got outputs torch.float32 [2, 2], expected a float tensor [2, 3]: a logit for each label",
        ),
        (
            config("classed", task("multi_label"), wrong(4)),
            "data.name: got targets torch.int64 [2], expected [2, 4] for task.name multi_label",
        ),
        (
            config("numbers", task("multi_label"), wrong(2)),
            "expected 0 to 1 for task.name multi_label; for other numbers write --task.name regression",
        ),
        (
            config("masks", task("segmentation", ignore_index=IGNORED), wrong(2, 4, 6)),
            "model: got outputs torch.float32 [2, 2, 4, 6], expected a float tensor [2, 3, 4, 6]: a number for each of",
        ),
        (
            config("masks", task("segmentation"), PIXELS),
            "data.name: got the class number 255 in a mask, expected 0 to 2; for pixels that are of no class write "
            "--task.args.ignore_index 255",
        ),
        (
            config("numbers", task("segmentation"), wrong(2)),
            "task.name: got segmentation of a data set without classes",
        ),
        (
            config("labels", task("classification", class_weights=[1, 2]), wrong(3)),
            "task.args.class_weights: got 2 numbers, expected one for each of 3 classes",
        ),
        (
            config("labels", task("multi_label", pos_weight=[1, 2]), wrong(3)),
            "task.args.pos_weight: got 2 numbers, expected one for all labels, or one for each of 3",
        ),
        (
            config("numbers", task("model_loss"), ModelConfig(name="user_tasks:Wrong", args={"shape": [2]})),
            "own code raises an error",  # it takes no target
        ),
        (
            config("numbers", task("model_loss", metrics=["mae"])),
            "task.args: got {'metrics': ['mae']}, which model_loss refuses",
        ),
        (
            config("numbers", task("user_tasks:NotATask")),
            "task.name: got user_tasks:NotATask, which gives NotATask, expected a class that is derived from",
        ),
    ],
)
def test_what_does_not_fit_is_said_before_ranks_join(cell: Config, line: str):
    with pytest.raises(ConfigError) as found:
        assemble.build(cell, CPU)
    assert line in found.value.lines[0], found.value.lines


@pytest.mark.parametrize(
    ("of", "line"),
    [
        (
            task("regression", "hubber"),
            "task.loss: got unknown loss 'hubber', expected one of mse, l1, huber, smooth_l1",
        ),
        (task("regression", delta=0.5), "task.args.delta: got 0.5 with task.loss mse, which does not have it"),
        (task("regression", "huber", delta=0), "task.args.delta: got 0, expected a finite number above 0"),
        (task("multi_label", "mse"), "task.loss: got 'mse', but multi_label does not have it"),
        (task("multi_label", pos_weight=[1, "a"]), "task.args.pos_weight: got [1, 'a'], expected a finite number"),
        (task("segmentation", class_weights=3), "task.args.class_weights: got 3, expected a list of finite numbers"),
        (task("segmentation", ignore_index="void"), "task.args.ignore_index: got 'void', expected a class number"),
        (task("segmentation", metrics=["mean_io"]), "task.metrics: got unknown metric 'mean_io'"),
        (task("regresion"), "task.name: got unknown name 'regresion', expected one of none, classification, "),
    ],
)
def test_what_a_config_says_wrong_is_said_at_once(of: TaskConfig, line: str):
    cell = Config(data=DataConfig(name="diabetes"), task=of)
    with pytest.raises(ConfigError) as found:
        check(cell, Launcher(), writes=False)
    assert found.value.lines[0].startswith(line), found.value.lines


# -- a task of one's own -----------------------------------------------------------------------------------------------


def test_a_classifier_of_six_lines_is_the_package_s():
    own = trajectory(under(config("classed", task("user_tasks:Classify")), "single"), ALONE)
    ours = trajectory(under(config("classed", task("classification")), "single"), ALONE)
    assert own.losses == ours.losses and own.evaluation == ours.evaluation
    assert all(np.array_equal(own.weights[name], value) for name, value in ours.weights.items())


@pytest.mark.parametrize("at", ["units", "training", "evaluation"])
def test_an_error_in_it_is_shown_with_its_line(at: str):
    with pytest.raises(OwnCodeError) as found:
        assemble.build(config("classed", task("user_tasks:Broken", at=at)), CPU)
    head, *rest = found.value.lines
    assert head.startswith("task.name: got user_tasks:Broken, and your own code raises an error when it is called on")
    assert "user_tasks.py" in rest[0] and rest[-1] == "KeyError: 'mine'"


def test_an_error_in_the_model_is_not_blamed_on_the_task():
    for name in ("user_tasks:Classify", "classification"):
        with pytest.raises(OwnCodeError) as found:
            assemble.build(config("classed", task(name), ModelConfig(name="user_tasks:BrokenModel")), CPU)
        assert found.value.lines[0].startswith("model.name: got user_tasks:BrokenModel, and your own code raises")


@pytest.mark.parametrize(
    ("at", "line"), [("no number", "got [3, 4] as the units of"), ("no loss", "got loss [2, 4] torch.float32 from the")]
)
def test_what_it_gives_is_looked_at(at: str, line: str):
    with pytest.raises(ConfigError, match=f"task.name: {line.replace('[', '.')}"):
        assemble.build(config("classed", task("user_tasks:Broken", at=at)), CPU)


def test_a_loss_that_mixes_samples_takes_no_pieces():
    cell = CELLS["contrastive"]
    findings = assemble.build(cell, CPU).findings

    def checked(ranks: int, **train) -> None:
        check_shares(dataclasses.replace(cell, train=dataclasses.replace(cell.train, **train)), findings, 16, ranks)

    checked(1)
    checked(2, micro_batch_size=4)  # no share is larger
    with pytest.raises(ConfigError, match=r"train.micro_batch_size: got 4 in steps of 7 samples on 1 ranks.*mixes_"):
        checked(1, micro_batch_size=4)
    with pytest.raises(ConfigError, match=r"train.eval_batch_size: got 4.*leave it out"):
        checked(1, eval_batch_size=4)
