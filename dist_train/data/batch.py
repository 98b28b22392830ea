"""A batch: a tree of tensors that knows which samples it is of; and trees."""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

Rebuild = Callable[[Sequence[Any]], Any]


class Batch:
    """Some samples of a split, on the device.

    `inputs, targets = batch` and `batch["key"]` reach into the tree.

    Args:
        tree: a tuple, dict or dataclass of tensors whose first dimension is the samples.
        ids: numbers of the samples in the split, int64 [samples].
        size: how many samples count: all, or none where a rank's share is empty. Then the tree is a stand-in of some
            samples that count for nothing, as many layers take no batch without any.
    """

    __slots__ = ("ids", "size", "tree")

    def __init__(self, tree: Any, ids: torch.Tensor, size: int):
        self.tree, self.ids, self.size = tree, ids, size

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[Any]:
        return iter(self.tree)

    def __getitem__(self, key: Any) -> Any:
        return self.tree[key]


def like(batch: Batch, count: int) -> Batch:
    """A batch of so many samples, all zeros, with tensors of the same kinds: for what only asks for sizes."""

    def zeros(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return torch.zeros(count, *leaf.shape[1:], dtype=leaf.dtype, device=leaf.device)

    return Batch(mapped(batch.tree, zeros), torch.zeros(count, dtype=torch.int64), count)


def flatten(tree: Any) -> tuple[list[Any], Rebuild]:
    """The leaves of a tree of tuples, lists, dicts and dataclasses, in order, and what makes a like tree of others.

    torch's own pytree knows no dataclasses by itself, and takes longer than a gather of a small batch.
    """
    children = _children(tree)
    if children is None:
        return [tree], lambda leaves: leaves[0]
    values, make = children
    parts = [flatten(value) for value in values]
    if all(_children(value) is None for value in values):  # what most are
        return list(values), make
    counts = [len(leaves) for leaves, _ in parts]

    def rebuild(leaves: Sequence[Any]) -> Any:
        built, at = [], 0
        for (_, inner), count in zip(parts, counts, strict=True):
            built.append(inner(leaves[at : at + count]))
            at += count
        return make(built)

    return [leaf for leaves, _ in parts for leaf in leaves], rebuild


def leaves_of(tree: Any) -> list[Any]:
    """The leaves of a tree, in order."""
    children = _children(tree)
    return [tree] if children is None else [leaf for value in children[0] for leaf in leaves_of(value)]


def is_branch(tree: Any) -> bool:
    """Whether it has leaves below it, and is none itself."""
    return _children(tree) is not None


def branches_of(tree: Any) -> list[Any]:
    """All nodes of a tree that are no leaves."""
    children = _children(tree)
    return [] if children is None else [tree, *(node for value in children[0] for node in branches_of(value))]


def names_of(tree: Any, name: str = "") -> list[str]:
    """What each leaf is called, such as `0`, `labels` or `image.pixels`."""
    if _children(tree) is None:
        return [name]
    dot = f"{name}." if name else ""
    return [found for key, value in _keyed(tree) for found in names_of(value, f"{dot}{key}")]


def mapped(tree: Any, function: Callable[[Any], Any]) -> Any:
    """A like tree, whose leaves are what the function gives for those of this one."""
    children = _children(tree)
    if children is None:
        return function(tree)
    values, make = children
    return make([mapped(value, function) for value in values])


def _children(tree: Any) -> tuple[list[Any], Rebuild] | None:
    """The branches of a node, and what makes a like node of others; None for a leaf."""
    kind = type(tree)
    if kind is tuple or kind is list:
        return list(tree), kind
    if isinstance(tree, torch.Tensor):
        return None
    if isinstance(tree, Mapping):
        keys = list(tree)
        if dataclasses.is_dataclass(tree):  # transformers' ModelOutput
            return [tree[key] for key in keys], lambda values: kind(**dict(zip(keys, values, strict=True)))
        return [tree[key] for key in keys], lambda values: dict(zip(keys, values, strict=True))
    if isinstance(tree, tuple):  # a NamedTuple
        return list(tree), lambda values: kind(*values)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        fields = [field.name for field in dataclasses.fields(tree)]
        values = [getattr(tree, name) for name in fields]
        return values, lambda values: _like(tree, fields, values)
    return None


def _like(tree: Any, fields: list[str], values: list[Any]) -> Any:
    """A dataclass with other values. A copy, as one may take other arguments than its fields, or refuse tensors."""
    made = copy.copy(tree)
    for name, value in zip(fields, values, strict=True):
        object.__setattr__(made, name, value)  # also of one that is frozen
    return made


def _keyed(tree: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(tree, Mapping):
        yield from tree.items()
    elif isinstance(tree, (tuple, list)):
        yield from enumerate(tree)
    else:
        yield from ((field.name, getattr(tree, field.name)) for field in dataclasses.fields(tree))
