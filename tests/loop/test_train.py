"""The loop: a loop written by hand gives the same, evaluation counts each sample once, the same start the same bits."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dist_train.config.load import load
from dist_train.config.tree import Config
from dist_train.data.order import global_indices
from dist_train.run import assemble
from dist_train.tools.agreement import Trajectory, difference
from dist_train.tools.trajectory import trajectory

from data_files import fashion_mnist_root
from parity_cells import ALONE, TOLERANCE, config, run_cells, run_single, this_world
from workers import run_ranks


def replaced(base: Config, section: str, **values) -> Config:
    """A config with some keys of a section changed."""
    return dataclasses.replace(base, **{section: dataclasses.replace(getattr(base, section), **values)})


ONE_HOT = replaced(replaced(config("ddp"), "data", one_hot=True), "train", micro_batch_size=5)
ONE_HOT = replaced(ONE_HOT, "task", loss="mse")
SOFT = replaced(replaced(config("ddp"), "data", one_hot=True), "task", args={"label_smoothing": 0.1})
# Fewer test samples than ranks, and two training samples in the last batch.
FEW = replaced(config("ddp"), "data", args={"n": 66, "n_test": 3, "shape": (1, 6, 6)})
# Shares that differ by a sample in every step, and a rank without any in the last of an epoch.
UNEVEN = {
    backend: replaced(replaced(config(backend), "train", global_batch_size=11), "data", args=FEW.data.args | {"n": 68})
    for backend in ("ddp", "fsdp2", "accelerate")
}
OWN_LOSS = {"mse": ONE_HOT, "label-smoothing": SOFT, "fewer-samples-than-ranks": FEW}
OWN_LOSS |= {f"uneven-shares-{backend}": cell for backend, cell in UNEVEN.items()}


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("name", OWN_LOSS)
def test_every_world_size_trains_the_same(name: str, world_size: int):
    cell = OWN_LOSS[name]
    alone = run_single(replaced(cell, "backend", name="single"))
    assert len(alone.losses) >= 20
    whole = 1 if cell.backend.name == "fsdp2" else world_size  # ranks that are given all of the weights
    for ran in run_ranks(run_cells, world_size, [cell])[:whole]:
        assert difference(ran[0], alone).worst < TOLERANCE["float32"]


def test_the_same_start_gives_the_same_bits():
    one, two = (run_ranks(run_cells, 2, [config("ddp", "AdamW")])[0][0] for _ in range(2))
    assert one.losses == two.losses and one.evaluation == two.evaluation
    assert all((one.weights[name] == two.weights[name]).all() for name in one.weights)


def draws(seed: int) -> tuple[float, float]:
    """The loss of a run with dropout, and what this rank would draw next."""
    cell = replaced(replaced(config("ddp"), "model", dropout=0.5), "train", seed=seed, max_steps=3)
    return trajectory(cell, this_world()).losses[-1], float(torch.rand(()))


def test_dropout_is_drawn_by_seed_and_rank():
    one, again, other = (run_ranks(draws, 2, seed) for seed in (0, 0, 1))
    assert one == again
    assert one[0][1] != one[1][1], "the ranks draw the same masks"
    assert one[0][1] != other[0][1], "the seed does not decide the masks"


# -- evaluation -------------------------------------------------------------------------------------------------------


def evaluate_here(cell: Config) -> dict[str, float]:
    world = this_world()
    parts = assemble.build(cell, world.device)
    return parts.evaluation(cell, world).run(parts.model)


def by_hand(cell: Config) -> dict[str, float]:
    parts = assemble.build(cell, torch.device("cpu"))
    split = parts.data.test
    inputs = (split.tree[0].float() - 0.5 * 255) / (0.25 * 255)
    with torch.no_grad():
        outputs = parts.model(inputs)
    loss = F.cross_entropy(outputs, split.tree[1], reduction="none").double().mean()
    return {"eval/loss": float(loss), "eval/accuracy": float((outputs.argmax(1) == split.tree[1]).double().mean())}


@pytest.mark.parametrize("n_test", [1, 2, 3, 4, 5, 103])
def test_evaluation_counts_each_sample_once(n_test: int):
    cell = replaced(config("ddp"), "data", args={"n": 20, "n_test": n_test, "shape": (1, 6, 6)})
    cell = replaced(cell, "train", eval_batch_size=16)
    expected = by_hand(cell)
    for world_size in (1, 2, 4):
        for got in run_ranks(evaluate_here, world_size, cell):
            assert got["eval/accuracy"] == expected["eval/accuracy"]
            assert got["eval/loss"] == pytest.approx(expected["eval/loss"], rel=1e-6)


@pytest.fixture(scope="session")
def fashion_root(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(fashion_mnist_root(tmp_path_factory))


def test_evaluation_leaves_every_module_in_its_mode():
    """A user's frozen norm stays in evaluation mode, the rest in training."""
    cell = config()
    parts = assemble.build(cell, ALONE.device)
    model = nn.Sequential(parts.model, nn.BatchNorm1d(10), nn.Dropout(0.5))
    model[1].eval()
    modes = [module.training for module in model.modules()]
    parts.evaluation(cell, ALONE).run(model)
    assert [module.training for module in model.modules()] == modes and len(set(modes)) == 2


@pytest.mark.parametrize("scope", ["model", "step"])
def test_an_evaluation_changes_nothing_of_the_training(scope: str):
    """With dropout, which a model that is left in evaluation mode does not have."""
    cell = replaced(replaced(config(), "model", dropout=0.5), "compile", scope=scope)
    often, never = (run_single(replaced(cell, "train", eval_every_steps=every)) for every in (2, None))
    assert often.losses == never.losses
    assert all((often.weights[name] == never.weights[name]).all() for name in never.weights)


def test_evaluation_is_a_hand_written_loop_exactly(fashion_root: str):
    """Batches of the same size, summed in the same way: not a bit differs."""
    cell = load(["--data.name", "fashion_mnist", "--data.root", fashion_root, "--train.eval_batch_size", "1000"])
    got = evaluate_here(cell)
    parts = assemble.build(cell, torch.device("cpu"))
    loss_sum, correct = 0.0, 0
    with torch.no_grad():
        for i in range(0, 10_000, 1000):
            labels = parts.data.test.tree[1][i : i + 1000]
            inputs = parts.data.test.tree[0][i : i + 1000].float().sub_(0.2860 * 255).div_(0.3530 * 255)
            outputs = parts.model(inputs)
            loss_sum += F.cross_entropy(outputs, labels, reduction="sum").item()
            correct += int((outputs.argmax(1) == labels).sum())
    assert got == {"eval/loss": loss_sum / 10_000, "eval/accuracy": correct / 10_000}


# -- the tutorial -----------------------------------------------------------------------------------------------------


def test_the_tutorials_recipe_is_the_tutorials_loop(fashion_root: str):
    """configs/tutorial.yaml against PyTorch's quickstart, over 200 steps in the same order."""
    options = {"--data.root": fashion_root, "--train.max_steps": "200", "--track.every_steps": "1"}
    options["--train.precision"] = "float64"  # in float32 rounding would decide at a kink
    cell = load(["--config", "configs/tutorial.yaml", *(word for pair in options.items() for word in pair)])
    ran: Trajectory = run_single(cell)

    torch.manual_seed(cell.train.seed)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    ).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    split = assemble.build(cell, torch.device("cpu")).data.train
    losses = []
    for step in range(200):
        index = torch.tensor(global_indices(len(split), cell.train.seed, 0, step, 64))
        loss = F.cross_entropy(model(split.tree[0][index].double() / 255), split.tree[1][index])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert np.max(np.abs(np.array(ran.losses) - losses) / losses) < 1e-9
    for ours, theirs in zip(ran.weights.values(), model.parameters(), strict=True):
        expected = theirs.detach().double().numpy()
        assert np.linalg.norm(ours - expected) / np.linalg.norm(expected) < 1e-9
