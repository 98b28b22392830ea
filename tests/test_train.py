"""The loop: the same run at every world size, and the same as a loop written by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dist_train import assemble
from dist_train.backends.ddp import DDP
from dist_train.config import load
from dist_train.losses import loss_fn
from dist_train.order import Plan, global_indices, share
from dist_train.train import evaluate

from data_files import fashion_mnist_root
from ranks import run_ranks
from runs import SMALL_RUN, Ran, largest_difference, train_here, world_here

SGD = ["--optim.name", "SGD", "--optim.momentum", "0.9"]
MSE = ["--data.one_hot", "true", "--train.loss", "mse", "--train.grad_clip", "0.1"]
TOLERANCE = {"train/loss": 1e-5, "train/grad_norm": 1e-5, "eval/loss": 1e-5, "weights": 1e-5}
# More test samples than a rank can have evenly, fewer training samples in the last batch than ranks.
FEW = ["--data.args.n", "66", "--data.args.n_test", "3", "--train.epochs", "8"]


def over_tolerance(one: Ran, other: Ran) -> dict[str, float]:
    """The differences that are too large."""
    return {name: value for name, value in largest_difference(one, other).items() if not value <= TOLERANCE[name]}


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize(
    "extra",
    [SGD, [], [*SGD, "--train.micro_batch_size", "3"], [*SGD, *FEW], MSE],
    ids=["sgd", "adamw", "accumulation", "fewer-samples-than-ranks", "mse"],
)
def test_ddp_is_single(world_size: int, extra: list[str]):
    alone = train_here([*SMALL_RUN, *extra])
    assert len(alone.series("train/loss")) >= 20
    limit = load([*SMALL_RUN, *extra]).train.grad_clip
    assert (alone.series("train/grad_norm") > limit).any(), "clipping has nothing to do"
    for ran in run_ranks(train_here, world_size, [*SMALL_RUN, *extra]):
        assert not over_tolerance(alone, ran)


class NotUndone(DDP):
    """Planted: the mean over ranks is left as DDP makes it."""

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()


class EveryMicroBatch(DDP):
    """Planted: accumulated gradients are exchanged again in every micro-batch."""

    def backward(self, loss: torch.Tensor) -> None:
        super().backward(loss)
        for p in self.bare.parameters():
            torch.distributed.all_reduce(p.grad, torch.distributed.ReduceOp.SUM)


class OwnWeights(DDP):
    """Planted: initial weights that differ by rank, as without DDP's broadcast."""

    def prepare(self, model: nn.Module, optimizer_fn):
        prepared = super().prepare(model, optimizer_fn)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1e-3 * self.world.rank)
        return prepared


def train_with(backend_name: str, argv: list[str]) -> Ran:
    return train_here(argv, globals()[backend_name])


def mean_of_rank_means(argv: list[str]) -> Ran:
    """Planted: each rank divides by its own number of samples; right only where the shares are even."""
    true_size = Plan.batch_size

    def own_size(plan: Plan, step: int) -> int:
        mine = share(true_size(plan, step), plan.rank, plan.world_size)
        return (mine.stop - mine.start) * plan.world_size

    Plan.batch_size = own_size
    try:
        return train_here(argv)
    finally:
        Plan.batch_size = true_size


@pytest.mark.parametrize("fault", [NotUndone, EveryMicroBatch, OwnWeights])
def test_the_comparison_catches_a_backend(fault: type[DDP]):
    argv = [*SMALL_RUN, *SGD, "--train.micro_batch_size", "8"]
    alone = train_here(argv)
    assert not over_tolerance(alone, run_ranks(train_with, 2, "DDP", argv)[0])
    assert over_tolerance(alone, run_ranks(train_with, 2, fault.__name__, argv)[0])


def test_the_comparison_catches_the_mean_of_rank_means():
    argv = [*SMALL_RUN, *SGD]
    alone = train_here(argv)
    assert "train/grad_norm" in over_tolerance(alone, run_ranks(mean_of_rank_means, 2, argv)[0])


def test_the_same_run_gives_the_same_bits():
    runs = [run_ranks(train_here, 2, [*SMALL_RUN, *SGD])[0] for _ in range(2)]
    assert runs[0].lines[-1]["eval/loss"] == runs[1].lines[-1]["eval/loss"]
    assert all((runs[0].weights[name] == runs[1].weights[name]).all() for name in runs[0].weights)


def test_float64_agrees_to_its_own_precision():
    argv = [*SMALL_RUN, *SGD, "--train.precision", "float64", "--train.micro_batch_size", "5"]
    alone = train_here(argv)
    difference = largest_difference(alone, run_ranks(train_here, 4, argv)[0])
    assert max(difference.values()) < 1e-12


# -- evaluation -------------------------------------------------------------------------------------------------------


def evaluate_here(argv: list[str]) -> dict[str, float]:
    config, world = load(argv), world_here()
    torch.set_num_threads(1)
    parts = assemble.build(config, world.device)
    return evaluate(parts.model, loss_fn("cross_entropy"), parts.test_feed, config.train.eval_batch_size, world)


def by_hand(argv: list[str]) -> dict[str, float]:
    parts = assemble.build(load(argv), torch.device("cpu"))
    split = parts.data.test
    inputs = (split.images.float() - 0.5 * 255) / (0.25 * 255)
    with torch.no_grad():
        outputs = parts.model(inputs)
    loss = F.cross_entropy(outputs, split.labels, reduction="none").double().mean()
    return {"eval/loss": float(loss), "eval/accuracy": float((outputs.argmax(1) == split.labels).double().mean())}


@pytest.mark.parametrize("n_test", [1, 2, 3, 4, 5, 103])
def test_evaluation_counts_each_sample_once(n_test: int):
    argv = [*SMALL_RUN, "--data.args.n_test", str(n_test), "--train.eval_batch_size", "16"]
    expected = by_hand(argv)
    for world_size in (1, 2, 4):
        for got in run_ranks(evaluate_here, world_size, argv):
            assert got["eval/accuracy"] == expected["eval/accuracy"]
            assert got["eval/loss"] == pytest.approx(expected["eval/loss"], rel=1e-6)


def test_evaluation_is_a_hand_written_loop_exactly(fashion_root: str):
    """Batches of the same size, summed in the same way: not a bit differs."""
    config = load(["--data.name", "fashion_mnist", "--data.root", fashion_root, "--train.eval_batch_size", "1000"])
    parts = assemble.build(config, torch.device("cpu"))
    got = evaluate(parts.model, loss_fn("cross_entropy"), parts.test_feed, 1000, world_here())
    loss_sum, correct = 0.0, 0
    with torch.no_grad():
        for i in range(0, 10_000, 1000):
            labels = parts.data.test.labels[i : i + 1000]
            inputs = parts.data.test.images[i : i + 1000].float().sub_(0.2860 * 255).div_(0.3530 * 255)
            outputs = parts.model(inputs)
            loss_sum += F.cross_entropy(outputs, labels, reduction="sum").item()
            correct += int((outputs.argmax(1) == labels).sum())
    assert got == {"eval/loss": loss_sum / 10_000, "eval/accuracy": correct / 10_000}


# -- the tutorial -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def fashion_root(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(fashion_mnist_root(tmp_path_factory))


def test_the_tutorials_recipe_is_the_tutorials_loop(fashion_root: str):
    """configs/tutorial.yaml against PyTorch's quickstart, over 200 steps in the same order."""
    argv = ["--config", "configs/tutorial.yaml", "--data.root", fashion_root, "--train.max_steps", "200"]
    ran = train_here([*argv, "--track.every_steps", "1", "--train.threads", "1", "--train.device", "cpu"])

    config = load(argv)
    torch.manual_seed(config.train.seed)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    split = assemble.build(config, torch.device("cpu")).data.train
    losses = []
    for step in range(200):
        index = torch.tensor(global_indices(len(split), config.train.seed, 0, step, 64))
        loss = F.cross_entropy(model(split.images[index].float() / 255), split.labels[index])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert np.max(np.abs(ran.series("train/loss") - losses) / losses) < 1e-5
    theirs = np.concatenate([p.detach().numpy().ravel() for p in model.parameters()])
    ours = np.concatenate([w.ravel() for w in ran.weights.values()])
    assert np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) < 1e-5
