"""backend.reduce ordered: the same bits on any number of ranks, under every backend that has it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dist_train.backends.ordered import Tree
from dist_train.config.load import load
from dist_train.data.order import Plan, global_indices
from dist_train.errors import ConfigError
from dist_train.ranks.launcher import Launcher
from dist_train.run.check import check

from checkpoint_runs import same, weights
from zygote import Run, Zygote

# 4 slices a step, of which the last has 2 samples of 5; 3 in the last step of an epoch, of 13 samples.
ARGV = (
    *("--data.name", "synthetic", "--data.args", "{n: 64, n_test: 9, shape: [1, 6, 6], classes: 5}"),
    *("--train.global_batch_size", "17", "--train.micro_batch_size", "5", "--train.epochs", "3"),
    *("--train.device", "cpu", "--train.threads", "1", "--track.every_steps", "1", "--train.grad_clip", "0.5"),
)
ORDERED = ("--backend.reduce", "ordered")
MLP = ("--model.hidden", "[33, 17]")
CONV = ("--model.name", "user_ordered:Convolutions")
UNEVEN = ("--model.name", "user_ordered:Uneven", "--optim.ema", "0.9")


def bits(folder: Path) -> list[tuple[float, float]]:
    """Loss and gradient norm of every step."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(line["train/loss"], line["train/grad_norm"]) for line in lines if "train/loss" in line]


def trained(zygote: Zygote, folder: Path, *argv: str, backend: str = "single", ranks: int = 1) -> Path:
    zygote.run(Run([*ARGV, *argv, "--backend.name", backend, "--run.dir", str(folder)], ranks))[0].check()
    return folder


@pytest.mark.parametrize(
    ("model", "cells"),
    [
        (MLP, [("ddp", 2), ("ddp", 3), ("fsdp2", 3), ("fsdp2", 4)]),
        (CONV, [("fsdp2", 2), ("ddp", 4)]),
        (UNEVEN, [("ddp", 3), ("fsdp2", 2), ("fsdp2", 4, "--backend.mesh", "{replicate: 2, shard: 2}")]),
    ],
    ids=["mlp", "conv", "uneven"],
)
def test_the_same_bits_everywhere(model: tuple[str, ...], cells: list[tuple], zygote: Zygote, tmp_path: Path):
    one = trained(zygote, tmp_path / "one", *ORDERED, *model)
    for backend, ranks, *argv in cells:
        other = trained(zygote, tmp_path / f"{backend}{ranks}", *ORDERED, *model, *argv, backend=backend, ranks=ranks)
        assert bits(other) == bits(one) and len(bits(one)) == 12
        assert same(weights(other), weights(one))


def test_without_it_the_bits_differ(zygote: Zygote, tmp_path: Path):
    """So the test above can fail."""
    one = trained(zygote, tmp_path / "one", *MLP)
    other = trained(zygote, tmp_path / "other", *MLP, backend="ddp", ranks=3)
    assert bits(other) != bits(one) and not same(weights(other), weights(one))


def test_a_resume_elsewhere_has_the_same_bits(zygote: Zygote, tmp_path: Path):
    save = ("--checkpoint.every_steps", "3")
    one = trained(zygote, tmp_path / "one", *ORDERED, *MLP, *save)
    cut = Run(
        [*ARGV, *ORDERED, *MLP, *save, "--backend.name", "ddp", "--run.dir", str(tmp_path / "run")],
        2,
        dict.fromkeys(range(2), ("at_phase", "forward", 8, "kill")),
        kill_all=True,
    )
    assert set(zygote.run(cut)[0].codes) == {-9}
    resumed = trained(zygote, tmp_path / "run", *ORDERED, *MLP, *save, backend="fsdp2", ranks=3)
    assert same(weights(resumed), weights(one))


def test_the_tree_does_not_depend_on_who_brings_what():
    leaves = torch.randn(11, 1000, generator=torch.Generator().manual_seed(0)) * 1e3
    totals = []
    for size in (1, 2, 3, 4, 7):  # ranks; those that bring nothing in the last round bring zeros
        tree = Tree()
        for leaf in [*leaves, *torch.zeros(-len(leaves) % size, 1000)]:
            tree.add(leaf.clone())
        totals.append(tree.total())
    assert all(torch.equal(total, totals[0]) for total in totals)
    assert torch.allclose(totals[0], leaves.double().sum(0).float(), rtol=1e-5, atol=1e-2)
    in_turn = leaves.clone()[0]
    for leaf in leaves[1:]:
        in_turn += leaf
    assert not torch.equal(in_turn, totals[0])


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("before", [0, 1])
def test_slices_are_dealt_by_turns(world: int, before: int):
    plans = [Plan(64, 0, 17, 5, False, rank, world, 5, True) for rank in range(world)]
    rounds = [list(plan.indices(1, 2, before)) for plan in plans]
    (numbers,) = {len(of_rank) for of_rank in rounds}
    assert numbers == sum(micro for _, micro in plans[0].sizes(2))
    at = 0
    for step in (2, 3):
        batch = global_indices(64, 0, 1, step, 17)
        slices = [batch[first : first + 5] for first in range(0, len(batch), 5)]
        dealt = [rounds[rank][at + i] for i in range(plans[0].micro_batches(step)) for rank in range(world)]
        for slice_, got in zip(slices, dealt, strict=False):
            first = np.flatnonzero(batch == slice_[0])[0]
            expected = np.concatenate([batch[np.arange(first - before, first)], slice_])
            assert got.tolist() == expected.tolist()
        assert not any(len(got) for got in dealt[len(slices) :])
        at += plans[0].micro_batches(step)


SHARD = "backend.reduce: got ordered with backend.mesh {replicate: 2}, which shares out no weights"
TENSOR = "backend.reduce: got ordered with backend.mesh {tensor: 2, shard: -1}, but sums within a layer depend on how"


@pytest.mark.parametrize(
    ("argv", "ranks", "line"),
    [
        (["--backend.name", "fsdp2", "--backend.mesh", "{tensor: 2, shard: -1}"], 4, TENSOR),
        (
            ["--backend.name", "fsdp2", "--backend.mesh", "{replicate: 2}"],
            2,
            "backend.reduce: got ordered with backend",
        ),
        (["--backend.name", "deepspeed"], 2, "backend.reduce: got ordered with backend deepspeed, whose engine sums"),
        (["--backend.name", "accelerate"], 2, "backend.reduce: got ordered with backend accelerate, whose Distr"),
        (["--train.micro_batch_size", "null"], 1, "backend.reduce: got ordered without train.micro_batch_size"),
        (["--train.threads", "null"], 1, "backend.reduce: got ordered without train.threads"),
        (["--train.precision", "float16"], 1, "backend.reduce: got ordered with float16"),
        (["--compile.scope", "step"], 1, "backend.reduce: got ordered with compile.scope step"),
    ],
)
def test_refused(argv: list[str], ranks: int, line: str):
    launcher = Launcher("torchrun" if ranks > 1 else "none", 0, ranks, 0, ranks)
    with pytest.raises(ConfigError) as caught:
        check(load([*ARGV, *ORDERED, *argv]), launcher, writes=False)
    assert caught.value.lines[0].startswith(line), caught.value.lines
