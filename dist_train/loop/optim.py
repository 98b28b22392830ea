"""The optimizer from its config."""

from collections.abc import Iterable

import torch
from torch import nn

from dist_train.config.lookup import load
from dist_train.config.own_code import blamed
from dist_train.config.tree import OptimConfig
from dist_train.errors import ConfigError
from dist_train.loop.eager import eager
from dist_train.loop.groups import groups_of
from dist_train.loop.hidden import MUON
from dist_train.loop.muon import Muon
from dist_train.loop.own_optimizer import Factory, check_groups, check_kind, check_state, is_own
from dist_train.loop.schedule import check_schedule

# Optimizers whose update torch has as one kernel, and on which devices. Torch takes it only if asked to, though it is
# much faster than a kernel for each operation and tensor: AdamW of 670,000 weights takes a fifth of the time on a CPU.
FUSED = {"Adam": ("cpu", "cuda"), "AdamW": ("cpu", "cuda"), "SGD": ("cpu", "cuda"), "Adagrad": ("cpu",)}
FUSED_SHARDED = ("Adam", "AdamW")  # for which torch 2.14 knows how to split it over DTensors, too
OURS: dict[str, type[torch.optim.Optimizer]] = {MUON: Muon}  # in the place of torch's, or of none in torch 2.8
# Arguments in optim.args with which the user chooses how the update is computed.
CHOOSES_KERNELS = {"fused", "foreach", "differentiable"}


def factory(config: OptimConfig, model: nn.Module | None = None, unfused: bool = False) -> Factory:
    """A function from parameters with their names to the optimizer. Backends call it after they have sharded them.

    Args:
        config: of the optimizer.
        model: that no backend has prepared, for optim.groups and optim.no_decay; None leaves these out.
        unfused: no fused kernel fits; see Parts.unfused.

    Raises:
        ConfigError: a pattern of optim.groups matches nothing in the model.
    """
    given = {"weight_decay": config.weight_decay, "momentum": config.momentum}
    settings = {k: v for k, v in given.items() if v is not None} | config.args
    groups, own = groups_of(config, model), is_own(config)
    kind = load({}, config.name, "optim.name") if own else OURS.get(config.name) or getattr(torch.optim, config.name)
    if own:
        check_kind(config.name, kind)
    elif not settings.get("differentiable"):
        kind = eager(kind)

    def build(named: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        arranged = groups.arranged(named)
        name = "AdamW" if config.name == MUON else config.name
        parameters = [p for group in arranged if group.get("optimizer") != MUON for p in group["params"]]
        fuses = not own and not unfused and not CHOOSES_KERNELS & settings.keys() and _fuses(name, parameters)
        fused = {"fused": True} if fuses else {}
        refuser = "it" if config.name in OURS else "torch.optim"
        try:
            with blamed("optim.name", config.name, f"called with {settings}", ours=not own):
                optimizer = kind(arranged, lr=config.lr, **settings, **fused)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"optim: got {config.name} with {settings}, which {refuser} refuses: {error}") from error
        check_groups(config, optimizer)
        return optimizer

    return build


def check(config: OptimConfig, model: nn.Module, total_steps: int) -> None:
    """Raises ConfigError for what is wrong with the optimizer, its groups or its schedule.

    Args:
        config: of the optimizer.
        model: that no backend has prepared.
        total_steps: optimizer steps of the run.
    """
    build = factory(config, model)
    build((name, nn.Parameter(torch.zeros(2, 2))) for name, _ in model.named_parameters())
    if is_own(config):
        check_state(config.name, build)
    check_schedule(config, total_steps)


def _fuses(name: str, parameters: list[torch.nn.Parameter]) -> bool:
    """Whether an optimizer has one kernel for the update of these parameters."""
    if name not in FUSED_SHARDED and any(type(p) is not torch.nn.Parameter for p in parameters):
        return False
    return all(p.device.type in FUSED.get(name, ()) and p.is_floating_point() for p in parameters)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Gives every parameter group its learning rate, where that of optim.lr is `lr` now."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
