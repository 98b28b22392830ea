"""Runs with parameter groups and averaged weights, in the workers: apart from the tests, so that both can import it."""

import dataclasses
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from dist_train.backends.fsdp2 import FSDP2
from dist_train.backends.shards import shards_of
from dist_train.backends.single import Single
from dist_train.checkpoint import manifest, storage
from dist_train.config.tree import BackendConfig, Config, DataConfig, ModelConfig, OptimConfig, TrackConfig, TrainConfig
from dist_train.errors import ConfigError

from resume_cells import run_once, saving

STEPS = 12
GROUPS = [
    {"match": "head.*", "lr": 9e-3, "betas": [0.8, 0.95]},
    {"match": "*.bias", "lr": 1e-3},
    {"match": "norm.*", "weight_decay": 0.3},
]
# Gradients that are 0 but for rounding are 0 to this eps.
ADAMW = OptimConfig(
    name="AdamW", lr=3e-3, weight_decay=0.2, args={"eps": 1e-3}, groups=GROUPS, no_decay=True, ema=0.7, ema_start=2,
    schedule="wsd", warmup_share=0.25, decay_share=0.25, lr_final=1e-3,
)  # fmt: skip


class Mixed(nn.Module):
    """Norms, a weight under two names, frozen weights, weights that no step uses, a scalar, a buffer."""

    def __init__(self, input_shape, classes):
        super().__init__()
        self.inner, self.frozen = nn.Linear(32, 6), nn.Linear(6, 6)
        self.frozen.requires_grad_(False)
        self.norm, self.wide_norm = nn.LayerNorm(6), nn.LayerNorm((2, 3))
        self.first, self.again = nn.Linear(6, 6, bias=False), nn.Linear(6, 6)
        self.again.weight = self.first.weight
        self.unused, self.head = nn.Linear(6, 3), nn.Linear(6, classes)
        self.temperature = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("shift", torch.linspace(-1, 1, 6))

    def forward(self, x):
        x = self.frozen(torch.tanh(self.inner(x.flatten(1)))) + self.shift
        x = self.again(self.first(self.norm(x)).tanh())
        return self.head(self.wide_norm(x.view(-1, 2, 3)).flatten(1) * self.temperature)


class Breaking(Mixed):
    """Gives a loss that is not finite in one of its steps."""

    def __init__(self, input_shape, classes, at: int):
        super().__init__(input_shape, classes)
        self.left = at + 1  # with the step in which it is looked at first

    def forward(self, x):
        outputs = super().forward(x)
        if self.training:
            self.left -= 1
            outputs = outputs * (float("nan") if self.left == 0 else 1.0)
        return outputs


class Scales(torch.optim.Optimizer):
    """An optimizer of a user's own: SGD with momentum, and a setting that only its constructor knows."""

    def __init__(self, params, lr, weight_decay=0.0, rate=0.5, start=1.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "rate": rate})
        self.start = start

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    if not state:
                        state["size"], state["count"] = torch.full_like(p, self.start), torch.zeros(())
                    state["count"] += 1
                    state["size"].lerp_(p.grad.abs(), group["rate"])
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(p.grad / (state["size"] + 0.1), alpha=-group["lr"])


def config(
    backend: str = "single", optim: OptimConfig = ADAMW, precision: str = "float32", model: str = "Mixed", **train
) -> Config:
    """Four epochs of 12, 12 and 4 samples, evaluated in their middle too."""
    name, _, stage = backend.partition(":") if backend.startswith("deepspeed") else (backend, "", "")
    args = {"at": 5} if model == "Breaking" else {}
    return Config(
        data=DataConfig(name="synthetic", args={"n": 28, "n_test": 7, "shape": (2, 4, 4), "classes": 3}),
        model=ModelConfig(name=f"optim_cells:{model}", args=args),
        optim=optim,
        train=TrainConfig(
            epochs=4, global_batch_size=12, precision=precision, device="cpu", eval_every_steps=2, **train
        ),
        backend=BackendConfig(name=name, zero_stage=int(stage) if stage else None),
        track=TrackConfig(every_steps=1),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run left.

    Args:
        model: weights and buffers of its newest checkpoint, by name.
        averages: those of the checkpoint.
        left: weights.pt; empty if it was cut off.
        evaluations: `eval/loss` by step.
        lines: what was said of the averages at a resume.
    """

    model: dict[str, np.ndarray]
    averages: dict[str, np.ndarray]
    left: dict[str, np.ndarray]
    evaluations: dict[int, float]
    lines: list[str]


def run(cell: Config, folder: Path, cut_after: int | None = None) -> Outcome:
    """In a worker: a run, from its checkpoint if it has one. It saves where it is cut off, or at its end."""
    done = run_once(saving(cell, folder, every_steps=cut_after or STEPS), cut_after)
    found = saved(folder)
    parts = [
        {name.removeprefix(of): value for name, value in found.items() if name.startswith(of)}
        for of in ("model.", "ema.")
    ]
    evaluations = {line["step"]: line["eval/loss"] for line in done.metrics if "eval/loss" in line}
    return Outcome(*parts, done.weights, evaluations, done.state_lines)


def saved(folder: Path) -> dict[str, np.ndarray]:
    """All that the newest checkpoint of a run holds, by name."""
    newest, _ = manifest.listed(folder)[0][0]
    tensors = storage.tensors(newest).items()
    found = {name: torch.zeros(entry.size, dtype=entry.properties.dtype) for name, entry in tensors}
    storage.read(newest, {name: shards_of(value) for name, value in found.items()})
    return {name: wide(value) for name, value in found.items()}


def wide(value: torch.Tensor) -> np.ndarray:
    return value.double().numpy()


def refused(cell: Config, folder: Path) -> str:
    """In a worker: the lines with which a run is refused; empty if it is not."""
    try:
        run(cell, folder)
    except ConfigError as error:
        return "\n".join(error.lines)
    return ""


def run_all(runs: list[tuple[Config, Path, int | None]]) -> list[Outcome]:
    """In a worker: one after another."""
    return [run(*of) for of in runs]


class Counting(torch.optim.SGD):
    """Counts in an attribute of its own."""

    count = 0

    def step(self, closure=None):
        super().step()
        self.count += 1


class CountingInGroups(torch.optim.SGD):
    def step(self, closure=None):
        super().step()
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1


class CountingAsNumber(torch.optim.SGD):
    def step(self, closure=None):
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["count"] = 1


class Shared(torch.optim.SGD):
    def step(self, closure=None):
        super().step()
        self.state["all"]["norm"] = torch.zeros(())


class Failing(torch.optim.SGD):
    def step(self, closure=None):
        raise ArithmeticError("no step")


class OwnGroups(torch.optim.SGD):
    def __init__(self, params, lr):
        super().__init__([p for group in params for p in group["params"]], lr=lr)


class Whole(torch.optim.Optimizer):
    """Looks at whole weights."""

    def __init__(self, params, lr, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad / (p.grad.norm() + 1e-3), alpha=-group["lr"])


class OfShards(Whole):
    """Looks at what this rank holds of a weight."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p, g = (t.to_local() if hasattr(t, "to_local") else t for t in (p, p.grad))
                    p.add_(g / (g.norm() + 1e-3), alpha=-group["lr"])


# -- planted faults ----------------------------------------------------------------------------------------------------


class RatesLost(Single):
    def load(self, saved, read):
        lines = super().load(saved, read)
        for group in self.optimizer.param_groups:
            group["lr_scale"] = 1.0
        return lines


class AnothersShard(FSDP2):
    def trained(self):
        """Those of the next rank, as they were at the start."""
        others = []
        for p, mine in zip([p for p in self.model.parameters() if p.requires_grad], super().trained(), strict=True):
            whole = p.full_tensor() if isinstance(p, DTensor) else p
            parts = whole.detach().chunk(self.world.size) if whole.dim() else [whole.detach()]
            other = parts[(self.world.rank + 1) % len(parts)]
            others.append(other.clone() if other.shape == mine.shape else mine)
        return others


class NotGatheredAgain(FSDP2):
    def refresh(self):
        """Nothing."""


class TakesAll(Single):
    @property
    def taken(self):
        return True

    @taken.setter
    def taken(self, value):
        """Nothing."""
