"""Which tensors there are at each moment of a step, how large they are and what they are for; and what is sent between
ranks. For tensors without values: nothing is computed, and sizes are all that is asked for."""

import weakref
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_train.backends.shards import local_of
from dist_train.doctor.traffic import Sent, sent_by

# What a storage is for, by the phase that has made it and that it outlives.
KEPT = {"forward": "activations", "data": "activations", "backward": "gradients"}
# The phase in which a tensor without a value is said to be 1: backends and optimizers ask what does not change a size,
# such as the number of the step. A model that asks computes something else by the answer, so that is an error.
ASKS = "update"
KINDS = ("weights", "gradients", "optimizer", "gathered", "activations", "temporary")


@dataclass(frozen=True)
class Moment:
    """Bytes that there were at once.

    Args:
        phase: in which.
        parts: by kind, all of KINDS.
    """

    phase: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Of all kinds."""
        return sum(self.parts.values())


class Ledger(TorchDispatchMode):
    """Keeps count within its context. To be entered within that of fake tensors, before the model is made."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}  # of what is there, by the storage's own number
        self.numbers: dict[int, int] = {}  # of a storage that is there, by its place in torch
        self.events: list[tuple[int, int]] = []  # a storage's number, and how many bytes more or less it has
        self.phases: list[tuple[int, str]] = [(0, "")]  # the event that each begins at
        self.kinds: dict[int, str] = {}  # that were told
        self.kept: dict[int, str] = {}  # the kinds of those that have outlived their phase
        self.fresh: list[int] = []  # of this phase
        self.gathered: set[int] = set()  # storages that are emptied and filled again, or filled by other ranks
        self.sent: list[Sent] = []
        self.patched = ExitStack()
        self.paused = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: torch would import its compiler for that, which takes as long as importing torch does."""
        return False

    def enter(self, phase: str) -> None:
        """A phase begins, and ends that before it."""
        kind = KEPT.get(self.phase)
        if kind:
            self.kept |= {number: kind for number in self.fresh if number in self.sizes}
        self.fresh = []
        self.phases.append((len(self.events), phase))

    @property
    def phase(self) -> str:
        """That goes on."""
        return self.phases[-1][1]

    def tell(self, kind: str, tensors: Iterable[torch.Tensor]) -> None:
        """Says what these are for, sharded or not."""
        for tensor in tensors:
            number = self.numbers.get(local_of(tensor).untyped_storage()._cdata)
            if number is not None:
                self.kinds[number] = kind

    def peak(self, *phases: str) -> Moment:
        """The moment with the most bytes, of some phases."""
        now = most = at = 0
        bounds = [start for start, _ in self.phases[1:]] + [len(self.events)]
        found = ""
        for (start, phase), stop in zip(self.phases, bounds, strict=True):
            for index in range(start, stop):
                now += self.events[index][1]
                if phase in phases and now > most:
                    most, at, found = now, index + 1, phase
        held: Counter[int] = Counter()
        for number, change in self.events[:at]:
            held[number] += change
        parts = dict.fromkeys(KINDS, 0)
        for number, count in held.items():
            parts[self._kind(number)] += count
        return Moment(found, parts)

    def _kind(self, number: int) -> str:
        if number in self.kinds:
            return self.kinds[number]
        return "gathered" if number in self.gathered else self.kept.get(number, "temporary")

    def __enter__(self) -> "Ledger":
        ours, resize, infer = self, torch.UntypedStorage.resize_, ShardingPropagator._propagate_tensor_meta_non_cached

        def resize_(storage: torch.UntypedStorage, size: int) -> None:  # which no operator is seen for
            resize(storage, size)
            ours._resized(storage)

        def inferred(*args: Any) -> Any:  # with whole tensors in the place of shards, which are never there
            ours.paused = True
            try:
                return infer(*args)
            finally:
                ours.paused = False

        self.patched.enter_context(patch.object(torch.UntypedStorage, "resize_", resize_))
        self.patched.enter_context(patch.object(ShardingPropagator, infer.__name__, inferred))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self.patched.close()
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if _is_sharded(types):
            return NotImplemented  # which computes with the parts, and comes here with those
        if func is torch.ops.aten._local_scalar_dense.default and types and self.phase == ASKS:
            return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
        if not types and any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves((args, kwargs))):
            with unset_fake_temporarily():  # what has values keeps them, such as the numbers of ranks in a mesh
                out = func(*args, **(kwargs or {}))
        else:
            out = func(*args, **(kwargs or {}))
        if self.paused:
            return out
        given = None
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.numbers:
                if given is None:
                    given = {id_ for id_ in map(_place, tree_leaves((args, kwargs))) if id_ is not None}
                if _place(tensor) not in given:
                    self._made(tensor.untyped_storage())
        if func.namespace in ("c10d", "_c10d_functional"):
            self._exchanged(func, args, out)
        return out

    def _exchanged(self, func: Any, args: tuple, out: Any) -> None:
        found = sent_by(func, args, out)
        if found is None:
            return
        sent, filled = found
        self.sent.append(sent)
        if sent.kind == "all_gather":
            numbers = (self.numbers.get(tensor.untyped_storage()._cdata) for tensor in filled)
            self.gathered.update(number for number in numbers if number is not None)

    def _made(self, storage: torch.UntypedStorage) -> None:
        place = storage._cdata
        self.numbers[place] = self._add(storage.nbytes())
        weakref.finalize(storage, self._gone, place).atexit = False

    def _add(self, count: int) -> int:
        number = len(self.events)  # each adds one
        self.sizes[number] = 0
        self.fresh.append(number)
        self._change(number, count)
        return number

    def _change(self, number: int, count: int) -> None:
        self.sizes[number] += count
        self.events.append((number, count))

    def _gone(self, place: int) -> None:
        number = self.numbers.pop(place)
        self._change(number, -self.sizes[number])
        del self.sizes[number]

    def _resized(self, storage: torch.UntypedStorage) -> None:
        number = self.numbers.get(storage._cdata)
        if number is not None:
            self.gathered.add(number)
            self._change(number, storage.nbytes() - self.sizes[number])


def _place(value: Any) -> int | None:
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else None


def _is_sharded(types: Any) -> bool:
    return any(issubclass(kind, DTensor) for kind in types)
