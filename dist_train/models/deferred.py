"""A model whose weights are made later, one storage at a time, to the same bits as if it had been built at once.

Its constructor is recorded (recording.py). When the weights are wanted, the steps are taken for real in their order,
with torch's generator as it would have been. A storage is allocated when a step first needs it, handed over after the
last step that has to do with it, and freed. What is written over before it is read is not kept: of a draw only the
random numbers are consumed.
"""

import gc
import random
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from dist_train.models.recording import AsOnCpu, Place, Recorder, Step, Unrecordable, leaves, mapped

# Storages that are kept from one value that a constructor reads to the next, in sizes of the largest of them.
KEPT = 8
Give = Callable[[int, Callable[[Place], torch.Tensor]], None]


@dataclass(frozen=True)
class Tensor:
    """A tensor of the model.

    Args:
        module: that has it.
        own: its name there.
        names: its full names; several where the module has several.
        kind: where the module has it.
        place: of its values.
    """

    module: nn.Module
    own: str
    names: tuple[str, ...]
    kind: str
    place: Place


class Deferred:
    """What a constructor does.

    Args:
        recorder: has recorded it.
        tensors: of the model.
    """

    def __init__(self, recorder: Recorder, tensors: list[Tensor]):
        self.steps, self.nbytes, self.begins = recorder.steps, recorder.nbytes, recorder.begins
        self.tensors = tensors

    def replay(self, wanted: Collection[int], give: Give) -> None:
        """Takes the steps that some storages need.

        Args:
            wanted: numbers of storages.
            give: is handed the number of each when its values are there, in the order in which that is so, and a
                function from a place in it to the real tensor, on the CPU. What no step has written is left out.
        """
        plan = planned(self.steps, wanted)
        with _drawing_from(self.begins):
            run(plan, Memory(self.nbytes), wanted, give)


def record(make: Callable[[], nn.Module], least: int = 0) -> tuple[nn.Module, Deferred] | None:
    """The model that `make` builds, on the meta device, and what gives it its values; None if it has less weights than
    `least`.

    Raises:
        Unrecordable: its values could not be made again.
    """
    kept = random.getstate(), np.random.get_state()
    recorder, model = Recorder(_Values()), None
    try:
        with AsOnCpu(recorder), recorder:
            model = make()
        if sum(p.numel() for p in model.parameters()) < least:
            return None
        recorder.check()
        tensors = list(_tensors(model, recorder))
        _check_rest(model, recorder)
        kept = None
        return model, Deferred(recorder, tensors)
    except Exception as error:
        # Perhaps a mistake of its own, which it makes again where it is built as always.
        why = recorder.why or f"does not run on tensors without values ({type(error).__name__}: {error})"
        raise Unrecordable(why) from error
    finally:
        if kept is not None:  # it is called again
            random.setstate(kept[0])
            np.random.set_state(kept[1])


def _tensors(model: nn.Module, recorder: Recorder) -> Iterator[Tensor]:
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(f"{name}." if name else "")
    for module, prefixes in names.items():
        kinds = ("parameter", module._parameters), ("buffer", module._buffers), ("attribute", vars(module))
        for kind, those in kinds:
            for own, tensor in those.items():
                if not isinstance(tensor, torch.Tensor):
                    continue
                if tensor.is_meta:
                    full = tuple(prefix + own for prefix in prefixes)
                    yield Tensor(module, own, full, kind, recorder.place(tensor))
                elif kind == "parameter":
                    recorder.refuse("has weights from elsewhere")


def _check_rest(model: nn.Module, recorder: Recorder) -> None:
    """Raises Unrecordable where the model has tensors in other places than its modules' own."""
    if list(_elsewhere(model, recorder)):
        gc.collect()  # perhaps only something that is no longer used; slower than to look
        if list(_elsewhere(model, recorder)):
            recorder.refuse("keeps tensors in lists or objects of its own")


def _elsewhere(model: nn.Module, recorder: Recorder) -> Iterator[torch.Tensor]:
    known = set()
    for module in model.modules():
        for those in (module._parameters, module._buffers, vars(module)):
            known |= {id(each) for value in those.values() for each in _with_base(value)}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and id(thing) not in known and recorder.knows(thing):
            yield thing


def _with_base(value: Any) -> tuple[Any, ...]:
    """A tensor and, if it is a view, the one that it keeps alive."""
    return (value, value._base) if isinstance(value, torch.Tensor) and not is_lazy(value) else (value,)


# -- taking the steps for real -----------------------------------------------------------------------------------------


class Memory:
    """Real storages by number, allocated as they are asked for."""

    def __init__(self, nbytes: list[int]):
        self.nbytes = nbytes
        self.storages: dict[int, torch.UntypedStorage] = {}

    def view(self, place: Place) -> torch.Tensor:
        """The real tensor of a place."""
        if place.storage not in self.storages:
            self.storages[place.storage] = _allocated(self.nbytes[place.storage])
        storage = self.storages[place.storage]
        return torch.empty(0, dtype=place.dtype).set_(storage, place.offset, place.size, place.stride)

    def take(self, step: Step) -> None:
        """Does what the step says."""
        found = list(leaves(step.function(*self._real(step.args), **self._real(step.kwargs))))
        for i, place in step.made.items():
            made, storage = found[i], found[i].untyped_storage()
            lies = (made.storage_offset(), tuple(made.shape), tuple(made.stride()), storage.nbytes())
            if lies == (place.offset, place.size, place.stride, self.nbytes[place.storage]):
                self.storages.setdefault(place.storage, storage)
            else:
                self.view(place).copy_(made)

    def _real(self, tree: Any) -> Any:
        return mapped(tree, lambda leaf: self.view(leaf) if isinstance(leaf, Place) else leaf)


def _allocated(nbytes: int) -> torch.UntypedStorage:
    return torch.empty(nbytes, dtype=torch.uint8).untyped_storage()


@dataclass(frozen=True)
class Planned:
    """A step, and whether only its draws are wanted."""

    step: Step
    only_draws: bool


def planned(
    steps: list[Step], wanted: Iterable[int], begin: int = 0, there: Iterable[int] = (), consumes: bool = False
) -> list[Planned]:
    """Which steps give the wanted storages their values.

    Args:
        steps: all of them.
        wanted: numbers of storages.
        begin: the step at which torch's generator stands, and at which some storages are there already.
        there: their numbers.
        consumes: all draws; else those after the last that is needed are left out.

    Raises:
        Unrecordable: a draw from before `begin` is needed again.
    """
    live, plan = set(wanted), list[Planned]()
    drawing = consumes  # whether a later step draws what is needed
    for i in range(len(steps) - 1, -1, -1):
        if i == begin - 1:
            live -= set(there)
        step = steps[i]
        needed = bool(step.writes & live) or (i >= begin and drawing and step.draws and not step.fills)
        if needed and step.draws and i < begin:
            raise Unrecordable("reads values of tensors")
        if needed:
            live = (live - step.replaces) | step.reads
            drawing = drawing or step.draws
            plan.append(Planned(step, only_draws=False))
        elif step.draws and drawing and i >= begin:
            plan.append(Planned(step, only_draws=True))
    return plan[::-1]


def run(plan: list[Planned], memory: Memory, wanted: Collection[int], give: Give | None = None) -> None:
    """Takes steps.

    Args:
        plan: the steps.
        memory: of the storages.
        wanted: see Deferred.replay.
        give: see Deferred.replay; None keeps all storages in memory.
    """
    last = {n: i for i, each in enumerate(plan) if not each.only_draws for n in each.step.reads | each.step.writes}
    ends: dict[int, list[int]] = {}
    for number, i in last.items():
        ends.setdefault(i, []).append(number)
    for i, each in enumerate(plan):
        (Memory(memory.nbytes) if each.only_draws else memory).take(each.step)
        for number in ends.get(i, ()) if give is not None else ():
            if number in wanted:
                give(number, memory.view)
            memory.storages.pop(number, None)


@contextmanager
def _drawing_from(state: torch.Tensor | None) -> Iterator[None]:
    """With torch's generator in a state, which then is as before."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        if state is not None:
            torch.default_generator.set_state(state)
        yield


class _Values:
    """The values that a constructor reads while it is recorded. Each takes the steps since the one before, so that a
    weight that is drawn until all its numbers fit is drawn no more often than it would be."""

    def __init__(self) -> None:
        self.at = 0  # the steps so far, at the last value that was drawn
        self.state: torch.Tensor | None = None  # of torch's generator then
        self.there: dict[int, torch.UntypedStorage] = {}

    def __call__(self, recorder: Recorder, place: Place) -> torch.Tensor:
        """See Recorder."""
        steps, memory, found = recorder.steps, Memory(recorder.nbytes), list[torch.Tensor]()
        try:
            plan = planned(steps, [place.storage], self.at, self.there)
            draws = any(each.step.draws for each in plan)
            if draws:
                plan = planned(steps, [place.storage], self.at, self.there, consumes=True)
        except Unrecordable as error:
            recorder.refuse(str(error))
        memory.storages |= self.there
        touched = {n for each in plan if not each.only_draws for n in each.step.reads | each.step.writes}
        sizes = [recorder.nbytes[n] for n in touched]
        few = sum(sizes) <= KEPT * max(sizes, default=0)

        def give(number: int, view: Callable[[Place], torch.Tensor]) -> None:
            found.append(view(place).clone())

        # Without the modes that record.
        with torch._C._DisableTorchDispatch(), _drawing_from(self.state if self.at else recorder.begins):
            run(plan, memory, [place.storage], None if few else give)
            if draws:
                self.at, self.state = len(steps), torch.default_generator.get_state()
                self.there = {n: memory.storages[n] for n in touched} if few else {}
            return found[0] if found else memory.view(place).clone()
