"""backend.reduce ordered: gradients are added up in an order that does not depend on who computed them.

The global batch is cut into slices of train.micro_batch_size samples. The gradient of each slice is computed by itself,
with the same kernels wherever that is, and the slices' gradients are the leaves of one binary tree, by their number.
Ranks take slices by turns, so that what they bring in a micro-batch are leaves that follow each other, and every sum in
the tree has the same two operands at any number of ranks.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from dist_train.backends.probe import Findings
from dist_train.backends.shards import local_of, real_of
from dist_train.config.tree import Config
from dist_train.ranks import dist


class Tree:
    """Adds up tensors that come one after another, as the leaves of a binary tree. Two of a level are added as soon as
    they are there, so it holds one for each level at most."""

    def __init__(self) -> None:
        self.levels: list[torch.Tensor | None] = []

    def add(self, leaf: torch.Tensor) -> None:
        """The next one. Its memory is the tree's from now on."""
        for i, before in enumerate(self.levels):
            if before is None:
                self.levels[i] = leaf
                return
            leaf, self.levels[i] = before.add_(leaf), None
        self.levels.append(leaf)

    def total(self) -> torch.Tensor:
        """The sum of all, with which the tree is empty again: what is not full is added from the end."""
        found: torch.Tensor | None = None
        for before in self.levels:
            if before is not None:
                found = before if found is None else before.add_(found)
        assert found is not None, "no gradient came"
        self.levels = []
        return found


def ordered(config: Config, findings: Findings, named: Iterable[tuple[str, nn.Parameter]]) -> "Ordered | None":
    """What adds up the gradients of these parameters, by name, if the config asks for it."""
    if config.backend.reduce != "ordered":
        return None
    unused = findings.unused
    return Ordered([p for name, p in named if p.requires_grad and name not in unused and p.numel()])


class Ordered:
    """The gradients of parameters of which each rank has those of its slice, whole.

    Args:
        parameters: that are trained.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]):
        self.parameters, self.tree = list(parameters), Tree()

    def take(self) -> None:
        """Takes the gradients of a micro-batch away, those of all ranks in their order. Collective."""
        if not self.parameters:
            return
        found = [p.grad for p in self.parameters]
        # Beside them how many slices had each: a gradient that no slice has is none, as in one process.
        there = self.parameters[0].new_tensor([float(g is not None) for g in found], dtype=torch.float32)
        parts = [_flat(p if g is None else local_of(g), g is None) for p, g in zip(self.parameters, found, strict=True)]
        for leaf in dist.stack(torch.cat([*parts, there.to(parts[0].dtype)])):
            self.tree.add(leaf.clone())  # a part of the whole would keep all of it
        for parameter in self.parameters:
            parameter.grad = None

    def settle(self) -> None:
        """Gives each parameter the gradient of the step."""
        if not self.parameters:
            return
        locals_ = [local_of(p) for p in self.parameters]
        sizes = [real_of(p).numel() for p in locals_]
        *parts, there = self.tree.total().split([*sizes, len(self.parameters)])
        for parameter, local, part, count in zip(self.parameters, locals_, parts, there.tolist(), strict=True):
            if count:
                like = parameter.detach().clone()
                real_of(local_of(like)).copy_(part.view(real_of(local).shape))
                parameter.grad = like


def _flat(tensor: torch.Tensor, zeros: bool) -> torch.Tensor:
    values = real_of(tensor.detach()).reshape(-1)
    return torch.zeros_like(values) if zeros else values
