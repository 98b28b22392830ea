"""What the last evaluation leaves of single samples: the same at every world size, and nothing of it lost."""

import contextlib
import dataclasses
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from user_tasks import IGNORED

from dist_train import backends
from dist_train.config.tree import Config, DataConfig, ModelConfig, TaskConfig, TrainConfig
from dist_train.loop import optim
from dist_train.ranks import dist
from dist_train.run import assemble
from dist_train.tasks import masks, predictions
from dist_train.tasks.base import panels_of

from parity_cells import this_world
from workers import run_ranks

MLP, PIXELS = ModelConfig(hidden=[12], activation="Tanh"), ModelConfig(name="user_tasks:Pixels")
CPU = torch.device("cpu")


def cell_of(data: str, task: str, model: ModelConfig = MLP, **args) -> Config:
    """Eleven test samples, two at a time: as many on each of three ranks, but for one."""
    return Config(
        data=DataConfig(name=f"user_tasks:{data}", args=args),
        task=TaskConfig(task, args={"ignore_index": IGNORED} if task == "segmentation" else {}),
        model=model,
        train=TrainConfig(global_batch_size=7, eval_batch_size=2, device="cpu", precision="float64"),
    )


def leave(cell: Config, folder: Path, limits: dict[str, int], planted: str = "") -> list:
    """In a worker: evaluates the initial model, and leaves what there is to leave. Gives the panels."""
    world = this_world()
    backend = dataclasses.replace(cell.backend, name="ddp" if world.size > 1 else "single")
    cell = dataclasses.replace(cell, backend=backend)
    parts = assemble.build(cell, world.device)
    model, _ = backends.create(cell, world).prepare(parts.model, optim.factory(cell.optim))
    with contextlib.ExitStack() as stack:
        for name, limit in limits.items():
            for module in (predictions, masks):
                if hasattr(module, name):
                    stack.enter_context(patch.object(module, name, limit))
        watch = parts.task.examiner(parts.data, parts.feeds["test"], world)
        evaluation = parts.evaluation(cell, world, {} if watch is None else {"": watch})
        evaluation.run(model, last=True)
        if planted == "gather":
            stack.enter_context(patch.object(dist, "gather_data", lambda value: [value]))
        if watch is not None:
            watch.write(folder)
    return [
        dataclasses.astuple(panel) for panel in panels_of(parts.task, cell.task.name, evaluation.totals[""], parts.data)
    ]


def left(name: str, cell: Config, ranks: int, folder: Path, planted: str = "", **limits: int) -> dict[str, np.ndarray]:
    folder.mkdir()
    run_ranks(leave, ranks, cell, folder, limits, planted)
    assert [path.name for path in folder.iterdir()] == [name]
    with np.load(folder / name, allow_pickle=False) as file:
        return dict(file)


def by_hand(cell: Config) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The whole split at once: inputs, outputs, targets, and the loss of each number."""
    parts = assemble.build(dataclasses.replace(cell, backend=dataclasses.replace(cell.backend, name="single")), CPU)
    ((inputs, targets),) = parts.feeds["test"]([np.arange(len(parts.data.test))])
    with torch.no_grad():
        outputs = parts.model(inputs)
    outputs = outputs["out"] if isinstance(outputs, dict) else outputs
    outputs, targets = parts.task.fitted(outputs, targets)
    return inputs, outputs, targets, parts.task.loss_of(outputs, targets, "none")


def check_predictions(cell: Config, got: dict[str, np.ndarray], points: int, worst: int) -> None:
    _, outputs, targets, loss = by_hand(cell)
    true, predicted = (one.reshape(len(one), -1).double().numpy() for one in (targets, outputs))
    n = len(true)
    index, some = got["index"], slice(0, predictions.OUTPUTS)
    assert len(index) == len(set(index.tolist())) == min(points, n) and index.min() >= 0 and index.max() < n
    assert int(got["outputs"]) == true.shape[1]
    order = np.argsort(-loss.numpy(), kind="stable")[:worst]
    assert got["worst_index"].tolist() == order.tolist()
    assert np.allclose(got["worst_loss"], loss[order], rtol=1e-9)
    for prefix, samples in (("", index), ("worst_", order)):
        assert np.array_equal(got[f"{prefix}true"], true[samples, some])
        assert np.allclose(got[f"{prefix}predicted"], predicted[samples, some], rtol=1e-9)


@pytest.mark.parametrize("k", [0, 2, 9])
def test_predictions_are_the_same_at_every_world_size(k: int, tmp_path: Path):
    cell = cell_of("numbers", "regression", k=k)
    drawn = []
    for ranks in (1, 2, 3):
        got = left(predictions.NAME, cell, ranks, tmp_path / str(ranks), POINTS=6, WORST=4)
        check_predictions(cell, got, 6, 4)
        drawn.append(got["index"].tolist())
    assert drawn[0] == drawn[1] == drawn[2]


def test_fewer_samples_than_ranks_and_than_points(tmp_path: Path):
    cell = cell_of("numbers", "regression", n_test=2)
    check_predictions(cell, left(predictions.NAME, cell, 3, tmp_path / "3"), 2, 2)


def check_masks(cell: Config, got: dict[str, np.ndarray], worst: int) -> None:
    inputs, outputs, targets, loss = by_hand(cell)
    counts = targets != IGNORED
    number = counts.flatten(1).sum(1)
    loss = loss.flatten(1).sum(1) / number
    order = np.argsort(-loss.numpy(), kind="stable")[:worst]
    assert got["index"].tolist() == order.tolist() and np.allclose(got["loss"], loss[order], rtol=1e-9)
    predicted = outputs.argmax(1)
    right = ((predicted == targets) & counts).flatten(1).sum(1) / number
    assert np.allclose(got["right"], right[order])
    height, width = targets.shape[1:]
    assert np.array_equal(got["true"][:, :height, :width], targets.where(counts, -1)[order])
    assert np.array_equal(got["predicted"][:, :height, :width], predicted[order])
    assert (got["true"][:, height:] == masks.OUTSIDE).all() and (got["true"][:, :, width:] == masks.OUTSIDE).all()
    assert got["classes"].tolist() == ["sky", "sea", "land"]
    for i, sample in enumerate(order):
        image = got[f"image_{i}"].astype(float)
        given = inputs[sample].double().numpy()
        assert image.shape == given.shape and np.corrcoef(image.ravel(), given.ravel())[0, 1] > 0.999


@pytest.mark.parametrize("files", [False, True])
def test_the_worst_masks_are_the_same_at_every_world_size(files: bool, tmp_path: Path):
    cell = cell_of("masks", "segmentation", PIXELS, files=files)
    for ranks in (1, 2, 3):
        check_masks(cell, left(masks.NAME, cell, ranks, tmp_path / str(ranks), WORST=4), 4)


@pytest.mark.parametrize("kind", ["predictions", "masks"])
def test_what_keeps_only_the_samples_of_rank_0_is_seen(kind: str, tmp_path: Path):
    of = {"predictions": ("numbers", "regression"), "masks": ("masks", "segmentation", PIXELS)}
    cell = cell_of(*of[kind])
    name = {"predictions": predictions.NAME, "masks": masks.NAME}[kind]
    got = left(name, cell, 2, tmp_path / "run", "gather", WORST=6)
    with pytest.raises(AssertionError):
        if kind == "predictions":
            check_predictions(cell, got, predictions.POINTS, 6)
        else:
            check_masks(cell, got, 6)


def test_the_scores_of_labels_are_the_same_at_every_world_size(tmp_path: Path):
    cell = cell_of("labels", "multi_label")
    _, outputs, targets, _ = by_hand(cell)
    guessed, actual = outputs > 0, targets > 0.5
    expected = {}
    for i, name in enumerate("abc"):
        hits, predicted, true = (int(one[:, i].sum()) for one in (guessed & actual, guessed, actual))
        scores = (2 * hits / max(1, predicted + true), hits / max(1, predicted), hits / max(1, true))
        expected[name] = (*scores, true, predicted)
    for ranks in (1, 2, 3):
        ((title, columns, rows, _),) = run_ranks(leave, ranks, cell, tmp_path, {})[0]
        assert title == "Labels" and columns == ("label", "F1", "precision", "recall", "true", "predicted")
        assert {row[0]: tuple(row[1:]) for row in rows} == {k: pytest.approx(v) for k, v in expected.items()}
        assert [row[1] for row in rows] == sorted(row[1] for row in rows)
