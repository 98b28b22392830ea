"""Random generators that a data set keeps itself, or its transforms: found once, then seeded for each sample.

Left alone they would be copied to every worker, and each copy would draw the same; and what a sample gets would depend
on the samples that this process read before it.
"""

import random
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from multiprocessing.reduction import ForkingPickler
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch

Seeder = Callable[[int], Any]
KINDS = (random.Random, np.random.Generator, np.random.RandomState, np.random.BitGenerator, torch.Generator)
# Of these only what an instance holds is looked at, not their code.
LIBRARIES = {"torch", "torchvision", "datasets", "pyarrow", "numpy", "PIL", "dist_train", *sys.stdlib_module_names}
NOT_OPENED = (str, bytes, bytearray, int, float, complex, torch.Tensor, np.ndarray, np.generic, ModuleType, type(None))
# A list of file names or of samples is no place for a generator: of a longer one only the beginning is looked at.
MOST_ITEMS = 100
MOST_OBJECTS = 20_000


def held(root: Any) -> list[Any]:
    """The generators that `root` holds, in an order that is the same in every process: in attributes, also of its
    classes, in lists, tuples, dicts, closures and partial functions, in what these hold in turn, and in the global
    variables that the code of its own classes and functions names."""
    found, seen, queue = [], {id(root)}, deque([root])
    kept = []  # what an attribute made is kept, for its id not to be another's
    while queue and len(seen) < MOST_OBJECTS:
        here = queue.popleft()
        if isinstance(here, KINDS):
            found.append(here)
            continue
        for below in _below(here):
            if not isinstance(below, NOT_OPENED) and id(below) not in seen:
                seen.add(id(below))
                kept.append(below)
                queue.append(below)
    return found


def seeder(generator: Any) -> Seeder | None:
    """A function that seeds the generator, or None for one that cannot be seeded, such as random.SystemRandom."""
    if isinstance(generator, random.SystemRandom):
        return None
    if isinstance(generator, random.Random):
        return generator.seed
    if isinstance(generator, torch.Generator):
        return generator.manual_seed
    if isinstance(generator, np.random.RandomState):
        return (lambda key: generator.seed(key % 2**32)) if _is_mt19937(generator) else None
    bits = generator.bit_generator if isinstance(generator, np.random.Generator) else generator

    def seed(key: int) -> None:
        bits.state = type(bits)(key).state

    try:
        bits.state = bits.state  # one of another library may not let its state be set
        type(bits)(0)
    except Exception:
        return None
    return seed


def sendable() -> None:
    """Makes a torch.Generator arrive in a worker. As torch sends it, its state is a tensor in shared memory, which is
    gone before the worker opens it."""
    ForkingPickler.register(torch.Generator, _reduced)


def _reduced(generator: torch.Generator) -> tuple[Any, ...]:
    return _rebuilt, (str(generator.device), generator.get_state().numpy().tobytes())


def _rebuilt(device: str, state: bytes) -> torch.Generator:
    return torch.Generator(device).set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))


def _is_mt19937(generator: np.random.RandomState) -> bool:
    state = generator.get_state(legacy=False)
    return isinstance(state, dict) and state["bit_generator"] == "MT19937"


def _below(here: Any) -> Iterator[Any]:
    if isinstance(here, Mapping):
        yield from _first(here.values())
    elif isinstance(here, (list, tuple, set, frozenset, deque)):
        yield from _first(here)
    elif isinstance(here, partial):
        yield from (here.func, *here.args, *here.keywords.values())
    elif isinstance(here, MethodType):
        yield from (here.__self__, here.__func__)
    elif isinstance(here, FunctionType):
        yield from _of_function(here)
        return
    elif isinstance(here, type):
        yield from _of_class(here)
        return
    elif isinstance(here, BuiltinFunctionType):
        return
    yield type(here)
    attributes = getattr(here, "__dict__", None)
    if isinstance(attributes, dict):
        yield from attributes.values()
    for kind in type(here).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            yield getattr(here, name, None)


def _first(items: Any) -> Iterator[Any]:
    for number, item in enumerate(items):
        if number == MOST_ITEMS:
            return
        yield item


def _of_class(kind: type) -> Iterator[Any]:
    if not _in_library(kind):
        yield from (base for base in kind.__bases__ if base is not object)
        for value in kind.__dict__.values():
            yield value.__func__ if isinstance(value, (staticmethod, classmethod)) else value


def _of_function(function: FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not filled yet
            continue
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    if not _in_library(function):
        for name in _names(function.__code__):
            yield function.__globals__.get(name)


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _in_library(of: Any) -> bool:
    return str(getattr(of, "__module__", None)).partition(".")[0] in LIBRARIES
