"""What a model keeps beside its weights: one value on all ranks, and no trace of a step that is left out."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dist_train import backends
from dist_train.backends.buffers import Buffers
from dist_train.backends.probe import Findings, probe
from dist_train.config.tree import BackendConfig, Config, TrainConfig
from dist_train.errors import ConfigError
from dist_train.models.statistics import Statistics

from parity_cells import ALONE, this_world
from workers import run_ranks

BACKENDS = ("ddp", "fsdp2", "accelerate", "deepspeed:0", "deepspeed:2", "deepspeed:3")
SHARES = (0, 3, 4)  # samples of a rank, the last one's the most


class Norms(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.norm, self.out = nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("constant", torch.ones(3))

    def forward(self, x):
        if self.training:
            self.seen = self.seen + len(x)  # in the place of the one before
        return self.out(self.norm(self.body(x)).tanh()) * self.constant


class Dropped(nn.Module):
    """Leaves layers out; by `draw`, which nothing outside of the model sees."""

    def __init__(self, hidden: bool):
        super().__init__()
        self.layers, self.out = nn.ModuleList(nn.Linear(6, 6) for _ in range(3)), nn.Linear(6, 3)
        self.hidden, self.calls = hidden, -1

    def forward(self, x):
        self.calls += 1
        for number, layer in enumerate(self.layers):
            if self.hidden and self.calls in (0, 1):  # the first look and a first step
                x = layer(x)
            elif self.hidden or torch.rand(()) < 0.5:
                x = layer(x) if number != 1 else x
        return self.out(x)


def prepared(model: nn.Module, backend: str, config: Config | None = None, world=None):
    """The backend, its model to call, and the optimizer."""
    look = torch.randn(2, 6)
    findings = probe(model, lambda: F.cross_entropy(model(look), torch.tensor([0, 1])))
    name, _, stage = backend.partition(":")
    config = dataclasses.replace(config or Config(), backend=BackendConfig(name, int(stage) if stage else None))
    made = backends.create(config, world or this_world(), findings)
    called, _ = made.prepare(model, lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1))
    return made, called


def take_step(backend, called, inputs, targets, count):
    with backend.accumulate(last=True):
        backend.backward(F.cross_entropy(called(inputs), targets, reduction="sum") / count)
    return backend.step(None, measure=True)


def train_norms(backend: str, steps: int, settles: bool = True) -> list[dict[str, np.ndarray]]:
    """In a worker: the buffers after each step, of shares that differ by rank."""
    torch.manual_seed(0)
    model = Norms()
    made, called = prepared(model, backend)
    if not settles:
        made.buffers.settle = lambda taken: None
    torch.manual_seed(1 + this_world().rank)
    size, found = this_world().size, []
    for _ in range(steps):
        share = SHARES[-size:][this_world().rank]
        take_step(made, called, torch.randn(share, 6), torch.randint(0, 3, (share,)), sum(SHARES[-size:]))
        found.append({name: value.numpy().copy() for name, value in model.named_buffers()})
    return found


def differ(runs: list[list[dict[str, np.ndarray]]]) -> bool:
    return any(
        not np.array_equal(value, first[name])
        for steps in zip(*runs, strict=True)
        for first in [steps[-1]]
        for buffers in steps
        for name, value in buffers.items()
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_buffers_are_the_last_ranks_on_all_after_every_step(backend: str):
    runs = run_ranks(train_norms, 2, backend, 4)
    assert not differ(runs)
    own = run_ranks(train_norms, 2, backend, 1, False)  # what each rank's forward made of the first step
    assert differ(own) and not differ([runs[0][:1], own[1]])
    assert all(np.isfinite(value).all() for value in runs[0][-1].values())
    assert int(runs[0][-1]["seen"]) == 4 * SHARES[-1] and int(runs[0][-1]["norm.num_batches_tracked"]) == 4


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_step_that_is_left_out_leaves_no_trace(precision: str):
    torch.manual_seed(0)
    config = Config(train=TrainConfig(nonfinite="skip", precision=precision, device="cpu"))
    model = Norms()
    made, called = prepared(model, "single", config, ALONE)
    inputs, targets = torch.randn(8, 6), torch.randint(0, 3, (8,))
    take_step(made, called, inputs, targets, 8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = {name: value.tensor.clone() for name, value in made.state().items() if hasattr(value, "tensor")}
    poison = inputs.clone()
    poison[0, 0] = float("nan")
    assert not take_step(made, called, poison, targets, 8).isfinite()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(made.state()[name].tensor, value) for name, value in state.items())
    take_step(made, called, inputs, targets, 8)
    assert not torch.equal(model.norm.running_mean, before["norm.running_mean"])


def test_a_step_that_keeps_its_poison_would_be_seen():
    """Planted: buffers that are not put back."""
    model = Norms()
    buffers = Buffers(
        model, Findings(buffers=("norm.running_mean", "seen")), ranks=1, skips=True, statistics=Statistics({}, [])
    )
    model.norm.running_mean.fill_(float("nan"))
    model.seen = model.seen + 1
    buffers.settle(taken=True)
    assert model.norm.running_mean.isnan().all()
    model.norm.running_mean.zero_()
    buffers.settle(taken=False)
    assert model.norm.running_mean.isnan().all() and int(model.seen) == 1


def drop_layers(backend: str, hidden: bool, steps: int = 6):
    """In a worker: trains, and gives weights, and which of them have state of the optimizer; or the refusal."""
    torch.manual_seed(0)
    model = Dropped(hidden)
    made, called = prepared(model, backend)
    torch.manual_seed(this_world().rank)
    try:
        for _ in range(steps):
            take_step(made, called, torch.randn(4, 6), torch.randint(0, 3, (4,)), 8)
    except ConfigError as error:
        return error.lines[0]
    return {name: value.numpy() for name, value in made.weights().items()}


@pytest.mark.parametrize("backend", ["ddp", "accelerate"])
def test_layers_that_ranks_leave_out_at_random_are_trained(backend: str):
    one, other = run_ranks(drop_layers, 2, backend, False)
    assert all(np.array_equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("backend", ["ddp", "accelerate"])
def test_a_way_that_varies_unseen_is_refused_in_a_line(backend: str):
    lines = run_ranks(drop_layers, 2, backend, True)
    assert all("got no gradient for some weights in a step (layers.1.weight, layers.1.bias)" in line for line in lines)
