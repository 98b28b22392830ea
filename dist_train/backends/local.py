"""The gradients that a rank has computed by itself, before ranks exchange theirs."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

See = Callable[[str, torch.Tensor, torch.Tensor], None]  # of a parameter: its name, itself and its gradient


def told(name: str, see: See) -> Callable[[torch.Tensor], None]:
    """A hook of a parameter, to be called when a backward has added to its gradient."""

    def come(parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            see(name, parameter, parameter.grad)

    return come


@contextmanager
def seen(named: Iterable[tuple[str, nn.Parameter]], see: See) -> Iterator[None]:
    """Around forwards and backwards: hands over each of the parameters when a backward has added to its gradient.

    torch calls such hooks within the addition, and those of DistributedDataParallel, which exchange, after it.
    """
    handles = [p.register_post_accumulate_grad_hook(told(name, see)) for name, p in named if p.requires_grad]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def coming(named: Iterable[tuple[str, nn.Parameter]], see: See) -> Iterator[None]:
    """The same with each gradient by itself, before it is added to what is there: for a library whose own hooks take it
    away at once."""
    handles = [p.register_hook(partial(see, name, p)) for name, p in named]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def aside(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Puts gradients aside, and back at the end; those that came meanwhile go."""
    kept = [(p, p.grad) for p in parameters]
    try:
        for parameter, _ in kept:
            parameter.grad = None
        yield
    finally:
        for parameter, gradient in kept:
            parameter.grad = gradient
