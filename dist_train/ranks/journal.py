"""Which sharded layers a rank has entered: where a layer's weights are gathered as it is entered, all ranks must enter
the same layers in the same order. Else a gather meets that of another layer: a hang, an abort, or wrong weights."""

import contextlib
import ctypes
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Mapping

from torch import nn

END = "nothing more"
RECENT = 256  # steps of which the layers are kept
LISTED = 8  # ranks that a line names
ABORT_WAIT_S = 8.0

Layers = list[tuple[int, tuple[str, ...]]]  # of steps, by number


class Journal:
    """The journal of one rank. The loop pays for it with one list append a layer.

    Args:
        model: whose forward is followed.
        layers: its modules whose weights are gathered each by itself.
        backend: its name, for the line.
    """

    def __init__(self, model: nn.Module, layers: Iterable[nn.Module], backend: str):
        self.backend = backend
        self.entered: list[str] = []
        self.chain = 0  # over all that was entered in steps that have ended
        self.step = 1
        self.recent: deque[tuple[int, tuple[str, ...]]] = deque(maxlen=RECENT)
        self.aborting = _told_of_aborts()
        names = {module: name for name, module in model.named_modules()}
        for layer in layers:
            layer.register_forward_pre_hook(self._noting(names[layer]), prepend=True)  # before the gather
        model.register_forward_hook(self._noting(END))

    def _noting(self, name: str) -> Callable[..., None]:
        def note(module: nn.Module, *_) -> None:
            if module.training:
                self.entered.append(name)

        return note

    def sum(self) -> int:
        """Of all that was entered so far: the same where that is the same."""
        return self._chained(tuple(self.entered))

    def _chained(self, names: tuple[str, ...]) -> int:
        return zlib.crc32("\n".join(names).encode(), self.chain)

    def turn(self, step: int) -> None:
        """A step has ended."""
        names, self.entered = tuple(self.entered), []
        self.chain = self._chained(names)
        self.recent.append((step, names))
        self.step = step + 1

    def told(self, steps: int = RECENT) -> Layers:
        """The newest steps that have ended, and the one that has not."""
        return [*list(self.recent)[-steps:], (self.step, tuple(self.entered))]

    def difference(self, by_rank: Mapping[int, Layers]) -> str | None:
        """A line about the first layer in which ranks differ. A rank that is merely behind does not differ."""
        journals = {rank: dict(layers) for rank, layers in by_rank.items()}
        for step in sorted({step for layers in journals.values() for step in layers}):
            found = _first_difference({rank: layers[step] for rank, layers in journals.items() if step in layers})
            if found:
                return f"step {step}: {found}; {self.mend}"
        return None

    @property
    def mend(self) -> str:
        """What to do where ranks differ."""
        return (
            f"expected every rank to run the same layers under {self.backend}; leave layers out alike on all ranks "
            f"(draw from a generator seeded alike on every rank), or write torchrun ... --backend.name ddp"
        )


def _first_difference(layers: Mapping[int, Iterable[str]]) -> str | None:
    by_rank = {rank: list(names) for rank, names in layers.items()}
    for i in range(max(map(len, by_rank.values()))):
        ranks: dict[str, list[int]] = {}
        for rank, names in by_rank.items():
            if i < len(names):
                ranks.setdefault(names[i] or "the model", []).append(rank)
        if len(ranks) > 1:
            (one, its), (other, others) = list(ranks.items())[:2]
            return f"{_ranks(its)} ran {one} where {_ranks(others)} ran {other}"
    return None


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:LISTED])) + (" and more" if len(ranks) > LISTED else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"


class Aborting:
    """A thread of a library's has failed in C++ and is about to abort the process, as gloo's does on messages of
    another size than expected. It waits until the ranks' journals have been compared.

    Attributes:
        noted: a thread waits.
        compared: it may go on.
    """

    def __init__(self) -> None:
        self.noted, self.compared = threading.Event(), threading.Event()


_ABORTING: list[tuple[Aborting, object]] = []  # kept as long as the process, which may call it


def _told_of_aborts() -> Aborting:
    if _ABORTING:
        return _ABORTING[0][0]
    aborting, handler_type = Aborting(), ctypes.CFUNCTYPE(None)
    with contextlib.suppress(OSError, AttributeError):  # another C++ library than GNU's: it aborts as ever
        set_terminate = ctypes.CDLL("libstdc++.so.6")._ZSt13set_terminatePFvvE
        set_terminate.argtypes, set_terminate.restype = [ctypes.c_void_p], ctypes.c_void_p
        before: list[int] = []

        def terminate() -> None:
            aborting.noted.set()
            aborting.compared.wait(ABORT_WAIT_S)
            handler_type(before[0])()  # says what has failed, and aborts

        handler = handler_type(terminate)
        _ABORTING.append((aborting, handler))
        before.append(set_terminate(ctypes.cast(handler, ctypes.c_void_p)))
    return aborting
