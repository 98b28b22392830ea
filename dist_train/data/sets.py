"""What a data set is to the rest of the package: splits of samples, and facts that a model or a task may ask for."""

import hashlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset

from dist_train.data.batch import leaves_of, mapped, names_of
from dist_train.errors import ConfigError

HASHED_ROWS = 1024  # at a time


@dataclass(frozen=True)
class Columns:
    """A split in memory or in mapped files, gathered by number on the device.

    Args:
        tree: a tuple, dict or dataclass of tensors or NumPy arrays [n, ...], of any type; of a pair the first is what
            the model takes, the second its target. uint8 inputs of a pair are pixels, which the model gets divided by
            255; all else it gets as it is, floats in the run's precision.
        identity: text that changes when the samples do, where they are too many to be read for a hash.

    Raises:
        ConfigError: they are no tensors, or of different lengths.
    """

    tree: Any
    identity: str = ""

    def __post_init__(self) -> None:
        tree = mapped(self.tree, _tensor)
        object.__setattr__(self, "tree", tree)
        leaves = self.leaves
        if not leaves:
            raise ConfigError("data.name: got Columns without tensors, expected one at least")
        for name, leaf in zip(names_of(tree), leaves, strict=True):
            if not isinstance(leaf, torch.Tensor) or leaf.dim() == 0:
                got = "a tensor without a dimension" if isinstance(leaf, torch.Tensor) else type(leaf).__name__
                raise ConfigError(
                    f"data.name: got {got} as {name or 'the tree'} of Columns, expected a tensor [samples, ...]; for "
                    f"example torch.as_tensor(...)"
                )
        lengths = {name: len(leaf) for name, leaf in zip(names_of(tree), leaves, strict=True)}
        if len(set(lengths.values())) > 1:
            raise ConfigError(f"data.name: got Columns of lengths {lengths}, expected as many samples in each")

    @property
    def leaves(self) -> list[torch.Tensor]:
        """Its tensors, in order."""
        return leaves_of(self.tree)

    def __len__(self) -> int:
        return len(self.leaves[0])


def InMemory(images: torch.Tensor, labels: torch.Tensor) -> Columns:  # noqa: N802  (it makes one, as a class would)
    """Columns of pictures, uint8 [n, *input_shape], and class numbers, int64 [n]. Raises ConfigError."""
    for what, value in (("images", images), ("labels", labels)):
        if not isinstance(value, (torch.Tensor, np.ndarray)):
            raise ConfigError(
                f"data.name: got {what} of type {type(value).__name__}, expected a tensor; for example "
                f"torch.as_tensor(...)"
            )
    return Columns((images, labels))


@dataclass(frozen=True)
class Samples:
    """A split that is read sample by sample.

    Args:
        dataset: map-style, with any item that `collate` takes. Its __getitem__ may raise ConfigError for a bad sample.
            Of a pair the first is what the model takes, the second its target. A tensor of uint8 there is pixels, which
            are divided by 255. Where the data set has classes, targets are their numbers, or float vectors [classes].
        identity: text that changes when the samples do, such as a hash over their names and classes. A checkpoint holds
            it, so that a run does not go on with other data.
        draws: whether an item may depend on random numbers. Then the global generators of random, NumPy and torch, and
            those that the data set or what it uses keeps, are seeded for each sample. False saves the time of it.
        collate: makes one tree of tensors [samples, ...] of a list of items, such as by padding them; None stacks
            them, as torch's default_collate does.
        describe: text about a sample, by its number, such as the path of its file: for people who look for it.

    Raises:
        ConfigError: the data set has no samples by number.
    """

    dataset: Dataset[Any]
    identity: str = ""
    draws: bool = True
    collate: Callable[[list[Any]], Any] | None = None
    describe: Callable[[int], str] | None = None

    def __post_init__(self) -> None:
        kind = type(self.dataset)
        for method in ("__getitem__", "__len__"):
            inherited = getattr(Dataset, method, None)  # raises NotImplementedError
            if isinstance(self.dataset, IterableDataset) or getattr(kind, method, inherited) is inherited:
                what = "an IterableDataset" if isinstance(self.dataset, IterableDataset) else f"without {method}"
                raise ConfigError(
                    f"data.name: got {kind.__name__}, {what}, which has no order that a run can resume in; expected a "
                    f"map-style Dataset with __len__ and __getitem__"
                )

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]


FromFiles = Samples  # what a data set of one's own may call it


@dataclass(frozen=True)
class Gathered:
    """A split whose batches are gathered by a function, such as windows of tokens in mapped files.

    Args:
        n: samples, at most 2**62.
        gather: makes the tree of tensors [batch, ...] on the CPU of samples by number, int64 [batch]. Called in the
            process that trains, ahead of the step; so it must be fast, and the same for the same numbers.
        identity: text that changes when the samples do. A checkpoint holds it.
        describe: text about a sample, by its number, for people who look for it.
        about: what its samples are made of, said once at the start of training.
    """

    n: int
    gather: Callable[[np.ndarray], Any]
    identity: str
    describe: Callable[[int], str] | None = None
    about: str = ""

    def __len__(self) -> int:
        return self.n


Split = Columns | Samples | Gathered
SPLITS = (Columns, Samples, Gathered)


@dataclass(frozen=True)
class Data:
    """A data set.

    Args:
        train: what an epoch passes over.
        test: what is evaluated: a split, several by name, or None.
        input_shape: shape of a sample's input, such as (1, 28, 28); None where that says nothing.
        classes: names by class number; empty where there are none.
        mean: of the training pixels in [0, 1]: a number per channel, or one for all.
        std: their standard deviation, likewise.
        facts: more that a model or a task may ask for by the name of an argument, such as {"vocab_size": 50257}. Known
            without it are input_shape, classes (a count), outputs (how many numbers a model gives for a sample: one for
            each class; without classes as many as the float targets of pairs in memory have), and target_shape of pairs
            in memory.
        keep: writes into the run's folder what must be there after the data is gone, such as a tokenizer.

    Raises:
        ConfigError: the parts do not fit together. A data set may be the user's own function.
    """

    train: Split
    test: Split | Mapping[str, Split] | None = None
    input_shape: tuple[int, ...] | None = None
    classes: tuple[str, ...] = ()
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    facts: Mapping[str, Any] = field(default_factory=dict)
    keep: Callable[[Path], None] | None = None

    @property
    def tests(self) -> dict[str, Split]:
        """The test splits by name; "" where there is one, which has none."""
        if self.test is None:
            return {}
        return dict(self.test) if isinstance(self.test, Mapping) else {"": self.test}

    @property
    def splits(self) -> dict[str, Split]:
        """All splits, by the name that messages have for them."""
        return {"train": self.train} | {name or "test": split for name, split in self.tests.items()}

    def known(self) -> dict[str, Any]:
        """What a model or a task may ask for by the name of an argument."""
        found: dict[str, Any] = {}
        if self.input_shape is not None:
            found["input_shape"] = tuple(self.input_shape)
        found |= _known_of_targets(self.train)
        if self.classes:
            found["classes"] = found["outputs"] = len(self.classes)
        return found | dict(self.facts)

    def fingerprint(self) -> str:
        """A hash over what the data set holds: of data in memory all of it, of data in files what `Samples` says."""
        shape = None if self.input_shape is None else tuple(self.input_shape)
        digest = hashlib.sha256(repr((shape, tuple(self.classes), self.mean, self.std)).encode())
        if self.facts:
            digest.update(repr(sorted(self.facts.items())).encode())
        digest.update("".join(self.tests).encode())
        for split in self.splits.values():
            digest.update(str(len(split)).encode())
            if isinstance(split, Columns) and not split.identity:
                for leaf in split.leaves:
                    for piece in leaf.split(HASHED_ROWS):  # no copy of all, where they do not lie in a row
                        digest.update(bytes_of(piece).data)
            else:
                digest.update(split.identity.encode())
        return digest.hexdigest()

    def __post_init__(self) -> None:
        """What would otherwise show as wrong numbers, or as an error far from its cause."""
        if self.input_shape is not None:
            _sequence("input_shape", self.input_shape, "the sizes of a sample, such as (1, 28, 28)")
            if not all(isinstance(size, Integral) and size > 0 for size in self.input_shape):
                raise ConfigError(
                    f"data.name: got input_shape {tuple(self.input_shape)}, expected whole numbers above 0"
                )
        _sequence("classes", self.classes, "their names in order, such as ('cat', 'dog') or tuple('0123456789')")
        self._check_stats()
        if self.test is not None and not isinstance(self.test, (*SPLITS, Mapping)):
            raise _no_split("test", self.test)
        if not isinstance(self.train, SPLITS):
            raise _no_split("train", self.train)
        for name in self.test if isinstance(self.test, Mapping) else ():
            if not isinstance(name, str) or name in ("", "train") or "/" in name:
                raise ConfigError(
                    f"data.name: got {name!r} as the name of a test split, expected text other than train, without a /"
                )
        for name, split in self.splits.items():
            if not isinstance(split, SPLITS):
                raise _no_split(name, split)
            if len(split) == 0:
                raise ConfigError(f"data.name: got no samples in the {name} split, expected at least one")
            if isinstance(split, Columns):
                _check_pair(name, split, self.input_shape, len(self.classes))

    def _check_stats(self) -> None:
        shape = tuple(self.input_shape or ())
        for name, values in (("mean", self.mean), ("std", self.std)):
            _sequence(name, values, "a number per channel, or one for all: (0.5,)")
            if len(values) not in (1, *shape[:1]):
                raise ConfigError(f"data.name: got {name} {tuple(values)}, expected a number per channel of {shape}")
            if not all(isinstance(value, Real) and math.isfinite(value) for value in values):
                raise ConfigError(f"data.name: got {name} {tuple(values)}, expected finite numbers")
        if not all(value > 0 for value in self.std):
            raise ConfigError(f"data.name: got std {tuple(self.std)}, expected numbers above 0")


def kinds_of(dataset: Any) -> list[type]:
    """The class of a data set, and of those that it wraps, as torch's Subset does."""
    inside = getattr(dataset, "dataset", None)
    return [type(dataset), *(kinds_of(inside) if inside is not None else ())]


def bytes_of(tensor: torch.Tensor) -> np.ndarray:
    """What a tensor of any type holds, uint8 [bytes], for a hash."""
    flat = tensor.resolve_conj().contiguous().flatten()
    return (torch.view_as_real(flat) if flat.is_complex() else flat).view(torch.uint8).numpy()


def _tensor(leaf: Any) -> Any:
    """An array as a tensor of the same memory. Raises ConfigError."""
    if not isinstance(leaf, np.ndarray):
        return leaf
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nor is it written
            return torch.from_numpy(leaf)
    except (TypeError, ValueError) as error:  # text and objects; another byte order, a step below 0
        raise ConfigError(
            f"data.name: got an array {leaf.dtype} {list(leaf.shape)} in Columns, which torch does not take: {error}; "
            f"expected numbers in this machine's order, such as array.astype(numpy.float32)"
        ) from None


def _known_of_targets(split: Split) -> dict[str, Any]:
    """The shape of a target, and how many numbers it is, of pairs in memory."""
    tree = split.tree if isinstance(split, Columns) else None
    if not isinstance(tree, tuple) or len(tree) != 2 or not isinstance(tree[1], torch.Tensor):
        return {}
    shape = tuple(tree[1].shape[1:])
    numbers = {"outputs": math.prod(shape)} if tree[1].is_floating_point() and len(shape) < 2 else {}
    return {"target_shape": shape} | numbers


def _no_split(name: str, got: Any) -> ConfigError:
    return ConfigError(
        f"data.name: got {type(got).__name__} as the {name} split, expected dist_train.data.sets.Columns(tree), "
        f"InMemory(images, labels), Samples(dataset) or Gathered(n, gather, identity)"
    )


def _sequence(name: str, value: Any, expected: str) -> None:
    """Raises ConfigError for a number, a text, or what has no order."""
    if isinstance(value, (str, bytes)) or not isinstance(value, (Sequence, np.ndarray)):
        raise ConfigError(f"data.name: got {name} {value!r}, expected {expected}")


def _check_pair(name: str, split: Columns, shape: tuple[int, ...] | None, classes: int) -> None:
    """Of a pair of inputs and targets, what the data set says of both."""
    if not isinstance(split.tree, tuple) or len(split.tree) != 2:
        return
    inputs, targets = split.tree
    if shape is not None and isinstance(inputs, torch.Tensor) and tuple(inputs.shape[1:]) != tuple(shape):
        raise ConfigError(
            f"data.name: got {name} images {inputs.dtype} {list(inputs.shape)}, expected {[len(split), *shape]} for "
            f"input_shape {tuple(shape)}"
        )
    if not classes or not isinstance(targets, torch.Tensor) or targets.dim() > 1 or targets.is_floating_point():
        return
    if targets.dtype != torch.int64 or targets.min() < 0 or targets.max() >= classes:
        raise ConfigError(
            f"data.name: got {name} labels {targets.dtype} {list(targets.shape)} from {targets.min()} to "
            f"{targets.max()}, expected torch.int64 [{len(split)}] from 0 to {classes - 1}"
        )
