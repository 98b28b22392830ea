"""What a model draws in training, keyed: a function of (seed, step, place in the model, number of the sample in the
data set, position in the sample), and so the same at any world size, micro-batch size and backend.

While a micro-batch is trained on, torch's functions that drop at random are replaced where the model's layers find
them. Modules, their parameters and their names stay as they are.
"""

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from dist_train.models.blocks import LISTS, blocks
from dist_train.models.draw_bits import mixed, mixed_number, sample_keys, wrapped
from dist_train.models.draw_functions import replacements
from dist_train.models.draw_places import Kind, now

CPU = torch.device("cpu")
FUNCTIONS = (FunctionType, BuiltinFunctionType)
# Modules that are a frame of their own (draw_places.py), with the hooks that say so, and the kinds of their draws.
FRAMES: WeakKeyDictionary[nn.Module, tuple[list[RemovableHandle], dict[int, Kind]]] = WeakKeyDictionary()


class Draws:
    """Those of a model in training.

    Args:
        seed: of the run.
        rank: of this process; only for what the model draws from torch's own generator.
        model: its layers' modules of Python are looked through for functions that are replaced.
        kind: of train.draws; "torch" leaves all as it is.
        device: of the model.
        part: this rank's of the layers, and of how many ranks that split them; see Now.
    """

    def __init__(
        self, seed: int, rank: int, model: nn.Module, kind: Literal["keyed", "torch"] = "keyed",
        device: torch.device = CPU, part: tuple[int, int] = (0, 1),
    ):  # fmt: skip
        self.part = part
        self.seed, self.keyed, self.device = mixed_number(seed), kind == "keyed", device
        self.own = mixed_number(wrapped(self.seed + rank + 1))
        self.places = list(_places(model)) if self.keyed else []
        if self.keyed:
            _show_compiler()
        self.ahead = any(module in FRAMES for module in model.modules())
        self.begun = (-1, 0)  # the step, and its forwards so far

    def of(
        self, samples: torch.Tensor, step: int, again: int = 0, on_device: torch.Tensor | None = None
    ) -> AbstractContextManager[None]:
        """Around forward and backward of a micro-batch.

        Args:
            samples: their numbers in the data set, int64 [samples].
            step: of the run, counted from its first start.
            again: how often the step has passed over these samples before.
            on_device: the step as int64 [1], where what is done now is done for other steps as well.
        """
        if not self.keyed:
            return nullcontext()
        return _Drawing(self, samples, step, again, on_device)

    def keys(self, samples: torch.Tensor, step: int, again: int, on_device: torch.Tensor | None) -> torch.Tensor:
        """See draw_bits.sample_keys."""
        if samples.device != self.device:
            pinned = samples.pin_memory() if self.device.type == "cuda" else samples  # else it would be waited for
            samples = pinned.to(self.device, non_blocking=True)
        if on_device is None:
            return sample_keys(mixed_number(wrapped(self.seed + (step << 16) + again)), samples)
        return sample_keys(mixed((on_device << 16) + wrapped(self.seed + again)), samples)

    def own_seed(self, step: int) -> int:
        """For what the model draws from torch's own generator in the forward that begins."""
        self.begun = (step, self.begun[1] + 1 if self.begun[0] == step else 0)
        return mixed_number(wrapped(self.own + (step << 16) + self.begun[1]))


class _Drawing:
    """See Draws.of. A class, as a generator would take twice as long."""

    __slots__ = ("of",)

    def __init__(self, *of: Any):
        self.of = of

    def __enter__(self) -> None:
        draws, samples, step, again, on_device = self.of
        now.begin(partial(draws.keys, samples, step, again, on_device), draws.own_seed(step), draws.part)
        if draws.ahead:
            now.ask()
        for module, name, ours, _ in draws.places:
            setattr(module, name, ours)

    def __exit__(self, *error: object) -> None:
        for module, name, _, theirs in self.of[0].places:
            setattr(module, name, theirs)
        now.end()


def frame(model: nn.Module, named: list[str] | None, parts: bool) -> None:
    """Makes frames of a model, and of its layers that some backend compiles by themselves.

    Args:
        model: before a backend has prepared it.
        named: model.blocks.
        parts: its children may be models by themselves.
    """
    for module in dict.fromkeys([model, *(model.children() if parts else ()), *blocks(model, named)]):
        if not isinstance(module, LISTS):
            _frame(module, {})


def frame_as(model: nn.Module, other: nn.Module) -> None:
    """Makes the frames that another model of the same layers has."""
    for module, like in zip(model.modules(), other.modules(), strict=True):
        if like in FRAMES:
            _frame(module, FRAMES[like][1])


def _frame(module: nn.Module, kinds: dict[int, Kind]) -> None:
    def enter(module: nn.Module, args: Any) -> None:
        if now.frame is not None:
            now.enter(module, kinds)

    FRAMES[module] = [module.register_forward_pre_hook(enter), module.register_forward_hook(_leave)], kinds


@contextmanager
def looking(draws: Draws, samples: torch.Tensor) -> Iterator[None]:
    """Around a first forward and backward of few samples, which shows where a model draws, and for what."""
    now.looks = True
    try:
        with draws.of(samples, 0):
            yield
    finally:
        now.looks = False


def drawn(model: nn.Module) -> bool:
    """Whether the first look has come to a draw that is keyed."""
    return any(module in FRAMES and FRAMES[module][1] for module in model.modules())


def settle(model: nn.Module) -> None:
    """Takes back the frames in which the last forward has drawn nothing."""
    drawn = now.drawn()
    for module in model.modules():
        if module in FRAMES and module not in drawn:
            for handle in FRAMES.pop(module)[0]:
                handle.remove()


def forget() -> None:
    """Lets go of the keys of the last forward, which stay until the next one."""
    now.past = []


def _leave(module: nn.Module, args: Any, outputs: Any) -> None:
    if now.frame is not None:
        now.leave()


def _show_compiler() -> None:
    """Has torch's compiler look into our functions. Once, it lists those of torch that it takes as a whole, by what
    their names stand for then."""
    rules = sys.modules.get("torch._dynamo.trace_rules")
    if rules is not None and not set(replacements().values()).isdisjoint(rules.get_torch_obj_rule_map()):
        rules.get_torch_obj_rule_map.cache_clear()
        rules.get_torch_obj_rule_map()


def _places(model: nn.Module) -> Iterator[tuple[ModuleType, str, Any, Any]]:
    """Where functions are replaced: module and name, ours and theirs."""
    ours = replacements()
    kinds = {kind for module in model.modules() for kind in type(module).__mro__}  # fully_shard derives its own
    files = {sys.modules[kind.__module__] for kind in kinds if kind.__module__ in sys.modules}
    for file in [F, *sorted(files - {F}, key=lambda file: file.__name__)]:
        for name, value in list(vars(file).items()):
            if isinstance(value, FUNCTIONS) and value in ours:
                yield file, name, ours[value], value
