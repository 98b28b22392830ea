"""Whether an optimizer of the user's own updates pieces of a weight as it updates the whole."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dist_train.backends.initial import maker
from dist_train.errors import ConfigError

STEPS = 2
ROWS, COLUMNS = 8, 3
Cut = Callable[[torch.Tensor], Sequence[torch.Tensor]]
INSTEAD = "expected it to look at each weight by itself; write --backend.name ddp"


def check_pieces(
    name: str, optimizer: torch.optim.Optimizer, arguments: Mapping[str, Any], where: str, cut: Cut, joined: Cut
) -> None:
    """Takes steps with a small matrix, and with pieces of it. Raises ConfigError where they differ.

    Args:
        name: of the optimizer.
        optimizer: whose first group has the settings.
        arguments: of optim.args.
        where: in words, who cuts weights so.
        cut: from a matrix to its pieces, as the optimizer is given them.
        joined: from the pieces to the numbers that they hold, in the order of the matrix.
    """
    make, device = maker(optimizer, arguments), optimizer.param_groups[0]["params"][0].device
    weight = torch.linspace(-1, 1, ROWS * COLUMNS, device=device).view(ROWS, COLUMNS).roll(1, 0)
    gradients = [weight.sin() + 0.1 * step for step in range(STEPS)]
    whole = _stepped(make, [weight.clone()], [[gradient] for gradient in gradients])
    try:
        pieces = _stepped(make, cut(weight.clone()), [cut(gradient) for gradient in gradients])
    except Exception as error:  # of any kind: the code is the user's, and so is what it meets in a shard
        raise ConfigError(
            f"optim.name: got {name}, which fails with parts of weights ({type(error).__name__}: {error}), as {where} "
            f"has them; {INSTEAD}"
        ) from error
    found = torch.cat([part.reshape(-1) for part in joined(pieces)])
    if not torch.allclose(found, whole[0].reshape(-1), rtol=1e-5, atol=1e-7):
        raise ConfigError(
            f"optim.name: got {name}, which updates parts of a weight otherwise than the whole of it, but {where} has "
            f"parts alone; {INSTEAD}"
        )


def _stepped(
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    tensors: Sequence[torch.Tensor],
    gradients: Sequence[Sequence[torch.Tensor]],
) -> list[torch.Tensor]:
    parameters = [nn.Parameter(tensor) for tensor in tensors]
    optimizer = make(parameters)
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    return [parameter.detach() for parameter in parameters]
