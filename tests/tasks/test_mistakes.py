"""evaluation.npz: each test sample counted once, the worst are the worst, the same at every world size."""

import dataclasses
import json
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dist_train import backends
from dist_train.config.tree import Config, DataConfig, TaskConfig, TrainConfig
from dist_train.data.sets import Columns
from dist_train.loop import optim
from dist_train.ranks import dist
from dist_train.run import assemble
from dist_train.tasks import mistakes, worst

from checkpoint_runs import DDP, SINGLE, resumed_from, root
from faults import moments
from parity_cells import ALONE, config, this_world
from workers import run_ranks
from zygote import Zygote

N = 101


def cell_of(backend: str = "ddp", loss: str = "cross_entropy", n_test: int = N, **data) -> Config:
    base = config(backend)
    args = {"n": 66, "n_test": n_test, "shape": (1, 6, 6), "noise": 0.7}
    return dataclasses.replace(
        base,
        data=DataConfig(**({"name": "synthetic", "args": args} | data), one_hot=loss == "mse"),
        task=TaskConfig(loss=loss),
        train=TrainConfig(eval_batch_size=16, device="cpu", precision="float64"),
    )


def write(cell: Config, folder: Path, planted: str = "", equal: bool = False) -> float:
    """In a worker: evaluates the initial model and writes the file. Gives the accuracy."""
    world = this_world()
    parts = assemble.build(cell, world.device)
    if equal:
        for parameter in parts.model.parameters():
            parameter.data.zero_()
    model, _ = backends.create(cell, world).prepare(parts.model, optim.factory(cell.optim))
    watch = parts.task.examiner(parts.data, parts.feeds["test"], world)
    result = parts.evaluation(cell, world, {"": watch}).run(model, last=True)
    plants = {"": {}, "sum": {"sum_": lambda tensor: tensor}, "gather": {"gather_data": lambda value: [value]}}
    with patch.multiple(dist, **plants[planted]) if planted else patch.dict({}):
        watch.write(folder)
    return result["eval/accuracy"]


def written(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / mistakes.NAME, allow_pickle=False) as file:
        return dict(file)


def run(ranks: int, folder: Path, cell: Config, **keys) -> tuple[dict[str, np.ndarray], float]:
    folder.mkdir()
    accuracy = run_ranks(_write, ranks, cell, folder, keys)[0] if ranks else write(cell, folder, **keys)
    assert [path.name for path in folder.iterdir()] == [mistakes.NAME]
    return written(folder), accuracy


def _write(cell: Config, folder: Path, keys: dict) -> float:
    return write(cell, folder, **keys)


def check_whole(cell: Config, got: dict[str, np.ndarray], accuracy: float) -> None:
    """Against the model run by hand on the whole split at once."""
    parts = assemble.build(cell, torch.device("cpu"))
    split, n = parts.data.test, len(parts.data.test)
    ((inputs, targets),) = parts.feeds["test"]([np.arange(n)])
    with torch.no_grad():
        outputs = parts.model(inputs)
    labels = targets if targets.dim() == 1 else targets.argmax(1)
    losses = {
        "cross_entropy": lambda: -outputs.log_softmax(1).gather(1, labels[:, None])[:, 0],
        "nll": lambda: -outputs.gather(1, labels[:, None])[:, 0],
        "mse": lambda: (outputs - F.one_hot(labels, outputs.shape[1])).square().mean(1),
    }[cell.task.loss]()
    sure = {"cross_entropy": outputs.softmax(1), "nll": outputs.exp(), "mse": outputs}[cell.task.loss]
    sure = sure.max(1).values.clamp(0, 1)
    confusion = np.zeros((len(parts.data.classes),) * 2, np.int64)
    np.add.at(confusion, (labels.numpy(), outputs.argmax(1).numpy()), 1)
    assert got["confusion"].sum() == n and np.trace(got["confusion"]) / n == accuracy
    assert np.array_equal(got["confusion"], confusion)
    order = np.argsort(-losses.numpy(), kind="stable")[: mistakes.WORST]
    assert got["worst_index"].tolist() == order.tolist()
    assert np.allclose(got["worst_loss"], losses[order], rtol=1e-9)
    assert got["worst_true"].tolist() == labels[order].tolist()
    assert got["worst_predicted"].tolist() == outputs.argmax(1)[order].tolist()
    assert np.allclose(got["worst_confidence"], sure[order], rtol=1e-9)
    if isinstance(split, Columns):
        assert np.array_equal(got["worst_images"], split.tree[0][order].numpy())
    kinds = {"confusion": "int64", "worst_loss": "float64", "worst_confidence": "float64", "worst_images": "uint8"}
    kinds |= dict.fromkeys(("worst_index", "worst_true", "worst_predicted"), "int64")
    assert {name: str(value.dtype) for name, value in got.items() if name != "classes"} == kinds
    assert got["classes"].tolist() == list(parts.data.classes) and got["classes"].dtype.kind == "U"


CELLS = {
    "cross_entropy": cell_of(),
    "nll": cell_of(loss="nll"),
    "mse": cell_of(loss="mse"),
    "fewer samples than ranks": cell_of(n_test=1),
    "files": cell_of(name="user_data:squares", args={}),
}


@pytest.mark.parametrize("name", CELLS)
def test_it_is_the_same_at_every_world_size(name: str, tmp_path: Path):
    cell = CELLS[name]
    alone = dataclasses.replace(cell, backend=dataclasses.replace(cell.backend, name="single"))
    got, accuracy = run(0, tmp_path / "0", alone)
    check_whole(alone, got, accuracy)
    fsdp2 = dataclasses.replace(cell, backend=dataclasses.replace(cell.backend, name="fsdp2"))
    for ranks, other in ((2, cell), (2, fsdp2)):
        again, accuracy = run(ranks, tmp_path / f"{ranks}-{other.backend.name}", other)
        check_whole(alone, again, accuracy)


@pytest.mark.parametrize("planted", ["sum", "gather"])
def test_a_lost_part_is_seen(planted: str, tmp_path: Path):
    got, accuracy = run(2, tmp_path / "run", cell_of(), planted=planted)
    with pytest.raises(AssertionError):
        check_whole(cell_of("single"), got, accuracy)


def test_of_equal_losses_the_first_samples_are_taken(tmp_path: Path):
    for ranks, backend in ((0, "single"), (2, "ddp")):
        got, _ = run(ranks, tmp_path / str(ranks), cell_of(backend), equal=True)
        assert got["worst_index"].tolist() == list(range(mistakes.WORST))


def test_what_is_not_a_number_is_the_worst(tmp_path: Path):
    cell = cell_of("single")
    parts = assemble.build(cell, torch.device("cpu"))
    watch = parts.task.examiner(parts.data, parts.feeds["test"], ALONE)
    outputs = torch.zeros(N, 10)
    outputs[70, 0], outputs[50] = float("inf"), float("nan")
    outputs[90, (parts.data.test.tree[1][90] + 1) % 10] = 5.0
    for some in (slice(0, 60), slice(60, N)):
        watch(parts.feeds["test"].of(np.arange(N)[some]), outputs[some])
    watch.write(tmp_path)
    assert written(tmp_path)["worst_index"][:4].tolist() == [50, 70, 90, 0]


def test_above_a_thousand_classes_there_is_no_matrix(tmp_path: Path):
    args = {"n": 66, "n_test": 30, "shape": (1, 2, 2), "classes": 1001}
    got, _ = run(0, tmp_path / "run", cell_of("single", args=args))
    assert "confusion" not in got and len(got["classes"]) == 1001 and len(got["worst_index"]) == mistakes.WORST


def test_floats_are_scaled_by_their_own_range():
    image = torch.tensor([[-1.0, 0.0], [1.0, float("nan")]])
    assert worst.pixels(image).tolist() == [[0, 128], [255, 128]]
    assert worst.pixels(torch.full((2, 2), 3.0)).tolist() == [[0, 0], [0, 0]]
    assert worst.pixels(torch.tensor([[7]], dtype=torch.uint8)).tolist() == [[7]]


# -- in a run ----------------------------------------------------------------------------------------------------------


def agrees(folder: Path) -> bool:
    summary, got = json.loads((folder / "summary.json").read_text()), written(folder)["confusion"]
    return got.sum() == 9 and np.trace(got) / 9 == summary["eval/accuracy"]


@pytest.mark.parametrize("kind", [SINGLE, DDP], ids=lambda kind: kind.backend)
def test_a_run_leaves_it_also_where_it_was_killed_after_its_last_step(kind, zygote: Zygote, references, tmp_path: Path):
    zygote.run(kind.run(tmp_path / "whole"))[0].check()
    assert agrees(tmp_path / "whole")
    folder = tmp_path / "killed"
    # When the checkpoint of step 12 stands, that of step 6 goes.
    moment = next(m for m in moments(references(kind).events[0]) if m[:2] == ("rename", "step-00000006"))
    zygote.run(kind.run(folder, plant={0: ("kill_at", root(folder), moment)}, kill_all=True))
    assert not (folder / mistakes.NAME).exists()
    ended = zygote.run(kind.run(folder))[0].check()
    assert resumed_from(ended) == 12 and agrees(folder)
    one, two = written(folder), written(tmp_path / "whole")
    assert one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)
