"""Why a float32 run may leave another at a single step: a unit of a ReLU whose input is within rounding of zero."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dist_train.backends.single import Single
from dist_train.config.tree import BackendConfig, Config, ModelConfig, OptimConfig, TrackConfig, TrainConfig
from dist_train.data.order import global_indices
from dist_train.run import assemble
from dist_train.tools.agreement import FLOOR, Trajectory
from dist_train.tools.trajectory import trajectory

from parity_cells import ALONE

JUMP = 3e-5  # far above what is smooth
# What rounding can do to a run of one process: its initial weights are moved by a few roundings, by seed; or its
# batches of 64 are cut in micro-batches, which puts sums in the order that as many ranks would have.
MOVED = [{"moved": seed} for seed in range(5)]
CUT = [{"cut": size} for size in (16, 21, 8, 32)]


def config(seed: int, activation: str = "ReLU", precision: str = "float32") -> Config:
    """92 steps on digits."""
    return Config(
        model=ModelConfig(activation=activation),
        optim=OptimConfig(name="SGD", lr=0.02),
        train=TrainConfig(
            epochs=4, seed=seed, precision=precision, device="cpu", threads=1,
            eval_every_epochs=None,
        ),
        track=TrackConfig(every_steps=1),
    )  # fmt: skip


class Recording(Single):
    """Keeps the weights before a step."""

    step_kept, kept = 0, None

    def prepare(self, model, optimizer_fn):
        self.done = 0
        return super().prepare(model, optimizer_fn)

    def step(self, max_norm, measure):
        if self.done == Recording.step_kept:
            Recording.kept = [p.detach().clone() for p in self.parameters]
        self.done += 1
        return super().step(max_norm, measure)


def run(cell: Config, moved: int | None = None, cut: int | None = None) -> Trajectory:
    return trajectory(
        dataclasses.replace(cell, train=dataclasses.replace(cell.train, micro_batch_size=cut)), ALONE, moved
    )


def weights_before(cell: Config, step: int, **rounding: int) -> list[torch.Tensor]:
    """The weights and biases that a run had before a step, of each layer in turn."""
    Recording.step_kept = step
    run(dataclasses.replace(cell, backend=BackendConfig(f"{__name__}:Recording")), **rounding)
    return Recording.kept


def off(cell: Config, reference: Trajectory, **rounding: int) -> np.ndarray:
    """The relative difference of the gradient norm at each step, signed."""
    return np.array(run(cell, **rounding).grad_norms) / np.array(reference.grad_norms) - 1


def batch(cell: Config, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    parts = assemble.build(cell, torch.device("cpu"))
    n, size = len(parts.feed.split), cell.train.global_batch_size
    epoch, place = divmod(step, -(-n // size))
    return next(iter(parts.feed(iter([global_indices(n, cell.train.seed, epoch, place, size).copy()]), epoch)))


def forward(weights: list[torch.Tensor], inputs: torch.Tensor, masks: list[torch.Tensor] | None = None):
    """Outputs of the network, and the inputs of its ReLUs [samples, units]; with masks, they say which units are on."""
    x, before = inputs.flatten(1), []
    for i in range(0, len(weights) - 2, 2):
        z = F.linear(x, weights[i], weights[i + 1])
        before.append(z)
        x = torch.relu(z) if masks is None else z * masks[i // 2]
    return F.linear(x, weights[-2], weights[-1]), before


def norm(weights: list[torch.Tensor], inputs: torch.Tensor, targets: torch.Tensor, masks: list[torch.Tensor]) -> float:
    """The norm of the gradient in float64, with the units on that the masks say."""
    leaves = [w.double().requires_grad_() for w in weights]
    loss = F.cross_entropy(forward(leaves, inputs.double(), masks)[0], targets)
    return float(torch.linalg.vector_norm(torch.stack([g.norm() for g in torch.autograd.grad(loss, leaves)])))


def find(roundings: list[dict[str, int]]) -> tuple[int, dict[str, int], int, float]:
    """Seed, rounding, step and size of a jump: which run has one is up to the processor."""
    for seed in range(25):
        reference = run(config(seed))
        for rounding in roundings:
            far = off(config(seed), reference, **rounding)
            if np.abs(far).max() > JUMP:
                step = int(np.argmax(np.abs(far) > JUMP))
                return seed, rounding, step, float(far[step])
    raise AssertionError("no run of all had a jump: the network is not what this test was made for")


@pytest.mark.parametrize("roundings", [MOVED, pytest.param(CUT, marks=pytest.mark.full)], ids=["moved", "cut"])
def test_a_step_that_leaves_the_others_has_crossed_a_kink(roundings: list[dict[str, int]]):
    seed, rounding, step, seen = find(roundings)
    whole = config(seed)
    inputs, targets = batch(whole, step)
    a, b = weights_before(whole, step), weights_before(whole, step, **rounding)
    before_a = forward(a, inputs)[1]
    pieces = torch.tensor_split(inputs, -(-len(inputs) // rounding.get("cut", len(inputs))))  # as the run itself did
    before_b = [torch.cat(layer) for layer in zip(*[forward(b, piece)[1] for piece in pieces], strict=True)]
    found = [
        (layer, sample, unit)
        for layer, (x, y) in enumerate(zip(before_a, before_b, strict=True))
        for sample, unit in ((x > 0) != (y > 0)).nonzero().tolist()
    ]
    assert found, f"step {step + 1} jumped, and no unit is on in one run and off in the other"
    for layer, sample, unit in found:  # its input is zero to rounding, in both
        scale = float(before_a[layer].abs().mean())
        for before in (before_a, before_b):
            assert abs(float(before[layer][sample, unit])) < 1e-5 * scale, (layer, sample, unit)
    # The weights are not what explains the jump. Which units are on does, and all of it.
    masks_a, masks_b = ([(z > 0).double() for z in before] for before in (before_a, before_b))
    expected = norm(a, inputs, targets, masks_a)
    by_units, by_weights = (
        norm(*of) / expected - 1 for of in ((a, inputs, targets, masks_b), (b, inputs, targets, masks_a))
    )
    assert abs(by_units - seen) < 0.1 * abs(seen) and abs(by_weights) < 0.1 * abs(seen), (by_units, by_weights, seen)
    # It is gone where there is no kink, and where rounding is finer.
    for other, allowed in (
        (config(seed, "Tanh"), FLOOR["float32"]),
        (config(seed, precision="float64"), FLOOR["float64"]),
    ):
        assert np.abs(off(other, run(other), **rounding)).max() < allowed
