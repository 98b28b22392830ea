"""torch's optimizers without their ties to its compiler."""

import inspect
from collections.abc import Callable
from functools import cache

import torch

# Methods of torch.optim.Optimizer that torch keeps the compiler out of.
WRAPPED = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")


@cache
def eager(kind: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """The same optimizer without what torch wraps around its methods to keep its compiler out: the first call of one
    would import the compiler, and that takes as long as importing torch does."""

    @torch.no_grad()
    def step(self: torch.optim.Optimizer, closure: Callable | None = None) -> torch.Tensor | float | None:
        return update(self, closure)

    update = inspect.unwrap(kind.step)
    own = {name: inspect.unwrap(getattr(kind, name)) for name in WRAPPED}
    return type(kind.__name__, (kind,), own | {"step": step, "__doc__": kind.__doc__, "__module__": kind.__module__})
