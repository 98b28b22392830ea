"""What torch.compile makes during a run."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class Compiled:
    """Counts graphs, those of them that came late, and those from the cache; see meter.Result. The process may have
    compiled before."""

    def __init__(self) -> None:
        self.graphs, self.cached = _graphs(), _cached()
        self.evaluated = 0  # graphs of evaluations
        self.first_epoch: int | None = None  # graphs of its steps
        self.first_evaluation: int | None = None

    def first_epoch_over(self) -> None:
        """After the last step of the first epoch."""
        self.first_epoch = _graphs() - self.graphs - self.evaluated

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Around an evaluation."""
        before = _graphs()
        yield
        self.evaluated += _graphs() - before
        if self.first_evaluation is None:
            self.first_evaluation = self.evaluated

    def counts(self) -> tuple[int, int, int]:
        """Graphs, recompilations and graphs from the cache, so far."""
        graphs = _graphs() - self.graphs
        trained = graphs - self.evaluated
        again = trained - (trained if self.first_epoch is None else self.first_epoch)
        return graphs, again + self.evaluated - (self.first_evaluation or 0), _cached() - self.cached


def _graphs() -> int:
    return _count("stats", "unique_graphs")


def _cached() -> int:
    return _count("aot_autograd", "autograd_cache_hit")


def _count(group: str, name: str) -> int:
    """A counter of torch's compiler; 0 where nothing has imported that, which takes half as long as torch itself."""
    compiler = sys.modules.get("torch._dynamo.utils")
    return compiler.counters[group][name] if compiler else 0
