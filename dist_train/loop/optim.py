"""The optimizer from its config, and the learning rate as a pure function of the step."""

import inspect
import math
from collections.abc import Callable, Iterable
from functools import cache

import torch

from dist_train.config.tree import OptimConfig
from dist_train.errors import ConfigError

# Optimizers whose update torch has as one kernel, and on which devices. Torch takes it only if asked to, though it is
# much faster than a kernel for each operation and tensor: AdamW of 670,000 weights takes a fifth of the time on a CPU.
FUSED = {"Adam": ("cpu", "cuda"), "AdamW": ("cpu", "cuda"), "SGD": ("cpu", "cuda"), "Adagrad": ("cpu",)}
FUSED_SHARDED = ("Adam", "AdamW")  # for which torch 2.14 knows how to split it over DTensors, too
# Methods of torch.optim.Optimizer that torch keeps the compiler out of.
WRAPPED = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
# Arguments in optim.args with which the user chooses how the update is computed.
CHOOSES_KERNELS = {"fused", "foreach", "differentiable"}


def factory(
    config: OptimConfig, sparse: bool = False
) -> Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer]:
    """A function from parameters to the optimizer. Backends call it after they have sharded the parameters.

    Args:
        config: of the optimizer.
        sparse: some gradients are sparse, which no fused kernel takes.
    """
    given = {"weight_decay": config.weight_decay, "momentum": config.momentum}
    settings = {k: v for k, v in given.items() if v is not None} | config.args
    kind = getattr(torch.optim, config.name)
    if not settings.get("differentiable"):
        kind = _eager(kind)

    def build(parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        parameters = list(parameters)
        fuses = not sparse and not CHOOSES_KERNELS & settings.keys() and _fuses(config.name, parameters)
        fused = {"fused": True} if fuses else {}
        try:
            return kind(parameters, lr=config.lr, **settings, **fused)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"optim: got {config.name} with {settings}, which torch.optim refuses: {error}"
            ) from error

    return build


@cache
def _eager(kind: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """The same optimizer without what torch wraps around its methods to keep its compiler out: the first call of one
    would import the compiler, and that takes as long as importing torch does."""

    @torch.no_grad()
    def step(self: torch.optim.Optimizer, closure: Callable | None = None) -> torch.Tensor | float | None:
        return update(self, closure)

    update = inspect.unwrap(kind.step)
    own = {name: inspect.unwrap(getattr(kind, name)) for name in WRAPPED}
    return type(kind.__name__, (kind,), own | {"step": step, "__doc__": kind.__doc__, "__module__": kind.__module__})


def _fuses(name: str, parameters: list[torch.nn.Parameter]) -> bool:
    """Whether an optimizer has one kernel for the update of these parameters."""
    if name not in FUSED_SHARDED and any(type(p) is not torch.nn.Parameter for p in parameters):
        return False
    return all(p.device.type in FUSED.get(name, ()) and p.is_floating_point() for p in parameters)


def lr_at(config: OptimConfig, step: int, total_steps: int) -> float:
    """The learning rate of a step.

    The warm-up rises linearly and reaches `lr` at step `warmup_steps`; the decays run from there to `total_steps`.

    Args:
        config: the schedule.
        step: optimizer steps done before this one, from 0.
        total_steps: optimizer steps of the whole run.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    after = step - config.warmup_steps
    done = after / max(1, total_steps - config.warmup_steps)
    if config.schedule == "linear":
        return config.lr + (config.lr_final - config.lr) * done
    if config.schedule == "cosine":
        return config.lr_final + (config.lr - config.lr_final) * (1 + math.cos(math.pi * done)) / 2
    if config.schedule == "step":
        assert config.step_size is not None and config.gamma is not None  # held by rules.py
        return config.lr * config.gamma ** (after // config.step_size)
    return config.lr


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Gives every parameter group this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr
