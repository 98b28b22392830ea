"""What a constructor does to tensors, recorded without doing it: its model is on the meta device, and takes no memory.

Torch shows each operation, with its tensors, to a dispatch mode. A tensor is noted as a view of a numbered storage, so
that aliases need no care: `nn.Parameter(t)`, `.data` and slices are views of the storage of `t`. The constructor is
told that its tensors are on the CPU. A value that it reads is computed, from the steps since the last such value.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

CPU, META = torch.device("cpu"), torch.device("meta")
BROUGHT_BYTES = 1 << 26  # of values that a constructor may have from elsewhere, such as NumPy
# These leave open what a tensor holds.
EMPTY = {"empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided"}
# These do not look at what was in the tensor that they write.
FILLS = {"bernoulli_", "cauchy_", "copy_", "exponential_", "fill_", "geometric_", "log_normal_", "normal_", "random_"}
FILLS |= {"uniform_", "zero_"}
LIFTS = {"lift", "lift_fresh", "lift_fresh_copy"}  # how values that come from elsewhere begin to be a tensor
# What a constructor is told of its tensors, and readers that do not come down to an operation.
DEVICE, IS_META, IS_CPU = (getattr(torch.Tensor, name).__get__ for name in ("device", "is_meta", "is_cpu"))
TOLD = {DEVICE: CPU, IS_META: False, IS_CPU: True}
READERS = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__}


class Unrecordable(Exception):
    """What a constructor does cannot be recorded: the reason, which goes on `its constructor ...`."""


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: in a storage, by its number."""

    storage: int
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def covers(self, nbytes: int) -> bool:
        """Whether it is each byte of so many, once."""
        dense = 1
        for step, count in sorted(zip(self.stride, self.size, strict=True)):
            if count != 1 and step != dense:
                return False
            dense *= count
        return self.offset == 0 and dense * self.dtype.itemsize == nbytes


@dataclass(frozen=True, eq=False)
class Step:
    """An operation.

    Args:
        function: of torch.
        args: with places for tensors.
        kwargs: the same.
        made: the places of what it gives in new storages, by the number of the output.
        reads: storages whose values it needs.
        writes: storages that it changes, also the new ones.
        replaces: those of them of which nothing is left that was there before.
        draws: from torch's generator.
        fills: it draws alike whatever its tensors hold.
    """

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    made: dict[int, Place]
    reads: frozenset[int]
    writes: frozenset[int]
    replaces: frozenset[int]
    draws: bool
    fills: bool


class Recorder(TorchDispatchMode):
    """Records while it is entered.

    Args:
        value_of: gives the real tensor of a place, as it is after the steps so far.

    Attributes:
        steps: in their order.
        nbytes: of each storage.
        begins: the state of torch's generator before the first draw; None if nothing was drawn.
        why: why it cannot be recorded; empty while it can.
    """

    def __init__(self, value_of: Callable[["Recorder", Place], torch.Tensor]):
        super().__init__()
        self.value_of = value_of
        self.steps: list[Step] = []
        self.nbytes: list[int] = []
        self.begins: torch.Tensor | None = None
        self.why = ""
        self._numbers: dict[int, int] = {}  # of storages, by their address
        self._storages: list[torch.UntypedStorage] = []  # kept, so that no other gets the address
        self._brought: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._generator: torch.Tensor | None = None  # where it stands if nobody has touched it

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: torch would import its compiler for that, which takes as long as importing torch does."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():  # as it would tell us what it tells the constructor
            return self._recorded(func, args, kwargs or {})

    def place(self, tensor: torch.Tensor) -> Place:
        """Of a tensor that the constructor has made."""
        if tensor.layout != torch.strided or tensor.is_conj() or tensor.is_neg():
            self.refuse("makes tensors that are not plain ones")
        number = self._numbers.get(tensor.untyped_storage()._cdata)
        if number is None:
            self.refuse("makes tensors on the meta device")
        self.nbytes[number] = max(self.nbytes[number], tensor.untyped_storage().nbytes())
        return Place(number, tensor.dtype, tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride()))

    def knows(self, tensor: torch.Tensor) -> bool:
        """Whether the constructor has made it."""
        return tensor.is_meta and tensor.untyped_storage()._cdata in self._numbers

    def refuse(self, why: str) -> Any:
        """Raises Unrecordable. The constructor may catch that, so it is kept."""
        self.why = self.why or why
        raise Unrecordable(why)

    def check(self) -> None:
        """Raises Unrecordable where it was refused and the constructor went on, and where values that came from
        elsewhere have changed there."""
        if self.why:
            raise Unrecordable(self.why)
        if not all(torch.equal(kept, brought) for kept, brought in self._brought):
            self.refuse("writes to arrays that are not torch's")

    def _recorded(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        tensors = [leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        name, draws = func.overloadpacket.__name__, torch.Tag.nondeterministic_seeded in func.tags
        if name in LIFTS and not tensors[0].is_meta:
            return self._constant(tensors[0])
        if tensors and not any(tensor.is_meta for tensor in tensors):  # all from elsewhere
            if draws:
                self.refuse("draws into tensors that it has from elsewhere")
            return func(*args, **kwargs)
        if not any(_is_tensor(result) for result in func._schema.returns) and not func._schema.is_mutable:
            return func(*self._values(args), **self._values(kwargs))
        self._check(tensors, _apart(func, args, kwargs)[0], kwargs, draws)
        args, kwargs = (mapped(tree, self._on_meta) for tree in (args, kwargs))
        written, others = _apart(func, args, kwargs)
        own = {"device": META} if _takes(func, "device") and (not tensors or "device" in kwargs) else {}
        own |= {key: value for key, value in (("pin_memory", False), ("generator", None)) if key in kwargs}
        try:
            # Torch would import its compiler to fill a tensor on meta, which takes seconds, and changes nothing there.
            found = args[0] if name in FILLS - {"copy_"} else func(*args, **(kwargs | own))
        except Exception:  # its form depends on values; a mistake of the constructor's own is one again
            if draws:
                self.refuse("draws numbers whose count depends on values")
            real = func(*self._values(args), **self._values(kwargs))
            found = mapped(real, lambda leaf: _like(leaf) if isinstance(leaf, torch.Tensor) else leaf)
        made = self._made(found)
        if (made or written) and torch.Tag.inplace_view not in func.tags and name not in EMPTY:
            self._note(func, args, kwargs, written, others, made)  # not of views, and of what has no values yet
        return found

    def _made(self, found: Any) -> dict[int, Place]:
        """What an operation gives in new storages, by the number of the output."""
        made = {}
        for i, leaf in enumerate(leaves(found)):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in self._numbers:
                self._register(leaf)
                made[i] = self.place(leaf)
        return made

    def _note(
        self, func: Any, args: tuple, kwargs: dict[str, Any], written: list[torch.Tensor], others: list[torch.Tensor],
        made: dict[int, Place],
    ) -> None:  # fmt: skip
        draws = torch.Tag.nondeterministic_seeded in func.tags
        if draws:
            self._drawn()
        changed = [self.place(tensor) for tensor in written]
        looks = not (func.overloadpacket.__name__ in FILLS or _is_out(func))
        reads = frozenset(self.place(tensor).storage for tensor in [*others, *(written if looks else [])])
        new = {place.storage for place in made.values()}
        whole = set() if looks else {at.storage for at in changed if at.covers(self.nbytes[at.storage])}
        args, kwargs = (mapped(tree, self._noted) for tree in (args, kwargs))
        kwargs = {key: CPU if key == "device" and value is not None else value for key, value in kwargs.items()}
        writes, replaces = frozenset(new | {at.storage for at in changed}), frozenset(new | whole) - reads
        self.steps.append(Step(func, args, kwargs, made, reads, writes, replaces, draws, draws and not reads))

    def _check(
        self, tensors: list[torch.Tensor], written: list[torch.Tensor], kwargs: dict[str, Any], draws: bool
    ) -> None:  # fmt: skip
        device = kwargs.get("device")
        if device is not None and torch.device(device).type not in ("cpu", "meta"):
            self.refuse(f"makes tensors on {device}")
        generator = kwargs.get("generator")
        if draws and generator is not None and generator is not torch.default_generator:
            self.refuse("draws from a generator of its own")
        if any(leaf.is_meta and not self.knows(leaf) for leaf in tensors):
            self.refuse("makes tensors on the meta device")
        if not all(leaf.is_meta for leaf in written):
            self.refuse("writes to tensors that it has from elsewhere")

    def _drawn(self) -> None:
        """Moves torch's generator by one number, so that it is seen if somebody else puts it anywhere."""
        before = torch.default_generator.get_state()
        if self.begins is None:
            self.begins = before
        elif not torch.equal(before, self._generator):
            self.refuse("seeds torch's generator, or puts it back")
        torch.empty(1).uniform_()
        self._generator = torch.default_generator.get_state()

    def _register(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self._numbers[storage._cdata] = len(self._storages)
        self._storages.append(storage)
        self.nbytes.append(storage.nbytes())

    def _constant(self, tensor: torch.Tensor) -> torch.Tensor:
        """The twin on meta of a tensor with values from elsewhere."""
        if tensor.device != CPU or tensor.layout != torch.strided:
            self.refuse(f"has tensors from elsewhere on {tensor.device}")
        kept = tensor.detach().clone()
        self._brought.append((kept, tensor.detach()))
        if sum(each.nbytes for each, _ in self._brought) > BROUGHT_BYTES:
            self.refuse("has large tensors from elsewhere")
        twin = torch.empty_like(kept, device=META)
        self._register(twin)
        place = self.place(twin)
        made = frozenset([place.storage])
        step = torch.ops.aten.clone.default, (kept,), {}, {0: place}, frozenset(), made, made, False, False
        self.steps.append(Step(*step))
        return twin

    def _on_meta(self, leaf: Any) -> Any:
        if isinstance(leaf, (torch.UntypedStorage, torch.TypedStorage)):
            self.refuse("handles the storages of tensors")
        return self._constant(leaf) if isinstance(leaf, torch.Tensor) and not leaf.is_meta else leaf

    def _noted(self, leaf: Any) -> Any:
        return self.place(leaf) if isinstance(leaf, torch.Tensor) else leaf

    def _values(self, tree: Any) -> Any:
        return mapped(tree, lambda leaf: self.value(leaf) if isinstance(leaf, torch.Tensor) else leaf)

    def value(self, tensor: torch.Tensor) -> torch.Tensor:
        """The real tensor of one that the constructor has made; one from elsewhere as it is."""
        return self.value_of(self, self.place(tensor)) if tensor.is_meta else tensor


class AsOnCpu(TorchFunctionMode):
    """Tells a constructor that its tensors are on the CPU, and gives it values that it asks for as a whole."""

    def __init__(self, recorder: Recorder):
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in TOLD and self.recorder.knows(args[0]):
            return TOLD[func]
        if func in READERS and self.recorder.knows(args[0]):
            args = (self.recorder.value(args[0]), *args[1:])
        elif func is torch.Tensor.data_ptr and self.recorder.knows(args[0]):
            self.recorder.refuse("asks for the address of a tensor")
        return func(*args, **(kwargs or {}))


def _apart(func: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The tensors that an operation writes to, and those that it only reads."""
    found: tuple[list[torch.Tensor], list[torch.Tensor]] = [], []
    for i, argument in enumerate(func._schema.arguments):
        given = args[i] if i < len(args) else kwargs.get(argument.name)
        reads = argument.alias_info is None or not argument.alias_info.is_write
        found[reads].extend(leaf for leaf in leaves(given) if isinstance(leaf, torch.Tensor))
    return found


def _is_out(func: Any) -> bool:
    return any(argument.is_out for argument in func._schema.arguments)


def _takes(func: Any, name: str) -> bool:
    return any(argument.name == name for argument in func._schema.arguments)


def _is_tensor(result: Any) -> bool:
    return "Tensor" in str(result.type)


def _like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=META)


def mapped(tree: Any, function: Callable[[Any], Any]) -> Any:
    """Arguments or results of an operation: a like tree with other leaves."""
    if isinstance(tree, (list, tuple)):
        return type(tree)(mapped(value, function) for value in tree)
    if isinstance(tree, dict):
        return {key: mapped(value, function) for key, value in tree.items()}
    return function(tree)


def leaves(tree: Any) -> Iterator[Any]:
    """Of arguments or results of an operation, in order."""
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, (list, tuple, Iterator)):
        for value in tree:
            yield from leaves(value)
    else:
        yield tree
