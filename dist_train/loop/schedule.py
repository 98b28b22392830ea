"""The learning rate as a pure function of the step."""

import math
from collections.abc import Callable
from functools import cache

from dist_train.config.lookup import load
from dist_train.config.own_code import blamed
from dist_train.config.tree import OptimConfig
from dist_train.errors import ConfigError


def lr_at(config: OptimConfig, step: int, total_steps: int) -> float:
    """The learning rate of a step, for parameters whose group has none of its own.

    The warm-up rises linearly and reaches `lr` at its end; the schedule runs from there to `total_steps`.

    Args:
        config: the schedule.
        step: optimizer steps done before this one, from 0.
        total_steps: optimizer steps of the whole run.

    Raises:
        ConfigError: the user's own function fails, or gives something else than a number of 0 or more.
    """
    warmup = warmup_steps(config, total_steps)
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    after, length = step - warmup, max(1, total_steps - warmup)
    shape = SHAPES.get(config.schedule)
    return shape(config, after, length, total_steps) if shape else config.lr * _own_factor(config, after, length)


def check_schedule(config: OptimConfig, total_steps: int) -> None:
    """Raises ConfigError where the user's own function fails, or is no function of its arguments alone."""
    for step in {0, warmup_steps(config, total_steps), total_steps // 2, max(0, total_steps - 1)}:
        first, again = (lr_at(config, step, total_steps) for _ in range(2))
        if first != again:
            raise ConfigError(
                f"optim.schedule: got {config.schedule}, which gives {first} and then {again} as the rate of step "
                f"{step}, expected a function of (step, total_steps) alone: a run that is resumed must find the same"
            )


def warmup_steps(config: OptimConfig, total_steps: int) -> int:
    """Optimizer steps of the warm-up."""
    return config.warmup_steps if config.warmup_share is None else round(config.warmup_share * total_steps)


# Each is given the steps since the warm-up, how many of these there are until the end of the run, and the steps of the
# whole run. What a schedule needs of the config is held by rules.py.


def _constant(config: OptimConfig, after: int, length: int, total: int) -> float:
    return config.lr


def _linear(config: OptimConfig, after: int, length: int, total: int) -> float:
    return config.lr + (config.lr_final - config.lr) * (after / length)


def _cosine(config: OptimConfig, after: int, length: int, total: int) -> float:
    return config.lr_final + (config.lr - config.lr_final) * (1 + math.cos(math.pi * (after / length))) / 2


def _polynomial(config: OptimConfig, after: int, length: int, total: int) -> float:
    assert config.power is not None
    return config.lr_final + (config.lr - config.lr_final) * (1 - after / length) ** config.power


def _step(config: OptimConfig, after: int, length: int, total: int) -> float:
    assert config.step_size is not None and config.gamma is not None
    return config.lr * config.gamma ** (after // config.step_size)


def _wsd(config: OptimConfig, after: int, length: int, total: int) -> float:
    asked = config.decay_steps if config.decay_share is None else round(config.decay_share * total)
    decay = min(asked or 1, length)
    return _linear(config, max(0, after - (length - decay)), decay, total)


def _cosine_restarts(config: OptimConfig, after: int, length: int, total: int) -> float:
    assert config.restart_steps is not None
    cycle, factor = config.restart_steps, config.restart_factor or 1
    if factor == 1:
        return _cosine(config, after % cycle, cycle, total)
    while after >= cycle:
        after, cycle = after - cycle, cycle * factor
    return _cosine(config, after, cycle, total)


SHAPES: dict[str, Callable[[OptimConfig, int, int, int], float]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "polynomial": _polynomial,
    "step": _step,
    "wsd": _wsd,
    "cosine_restarts": _cosine_restarts,
}


def _own_factor(config: OptimConfig, after: int, length: int) -> float:
    name = config.schedule
    with blamed("optim.schedule", name, f"called with ({after}, {length})"):
        factor = _own(name)(after, length)
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not (math.isfinite(factor) and factor >= 0):
        raise ConfigError(
            f"optim.schedule: got {factor!r} from {name}({after}, {length}), expected a finite number of 0 or more: by "
            f"what optim.lr is multiplied at step {after} of {length} after the warm-up"
        )
    return factor


@cache
def _own(name: str) -> Callable[[int, int], float]:
    return load({}, name, "optim.schedule")
