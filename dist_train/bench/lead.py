"""Leads the processes of a benchmark: starts each run, then lets all take turns, round after round."""

import contextlib
import dataclasses
import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

from dist_train.bench import ranks
from dist_train.bench.ranks import NotRun, Ranks
from dist_train.bench.slices import CEILING, NAMES, OURS, RUN_IN_STEPS, WARM_STEPS, Ready
from dist_train.bench.table import Run
from dist_train.config.tree import Config
from dist_train.errors import ConfigError
from dist_train.loop.shortened import shortened
from dist_train.ranks.launcher import Launcher
from dist_train.run.check import check

SLICE_S = 0.2
LEAST_STEPS, MOST_STEPS = 3, 5000  # of a slice


@dataclass(frozen=True, eq=False)
class Cell:
    """A backend, with DeepSpeed's stage, on some ranks.

    Args:
        backend: its name.
        ranks: how many.
        config: with it.
    """

    backend: str
    ranks: int
    config: Config

    def with_batch(self, batch_size: int, steps: int) -> Config:
        """The config with so many samples a step, and so many steps."""
        config = shortened(self.config, steps)
        return dataclasses.replace(config, train=dataclasses.replace(config.train, global_batch_size=batch_size))

    def check(self, batch_size: int) -> None:
        """Raises ConfigError where the config does not fit."""
        alone = self.backend == "single"
        launcher = Launcher() if alone else Launcher("torchrun", 0, self.ranks, 0, self.ranks)
        check(self.with_batch(batch_size, 1), launcher, writes=False)


def steps_of(slice_steps: int, repeats: int) -> int:
    """Of ours, until all its slices are over."""
    return WARM_STEPS + repeats * (RUN_IN_STEPS + slice_steps)


def shuffled(names: list[str], turn: int) -> list[str]:
    """Whose turn it is, one after the other: who comes first in a process finds it cold."""
    return random.Random(turn).sample(names, len(names))


class Lead:
    """All cells at one batch size.

    Args:
        cells: that are measured.
        batch_size: of a step over all ranks.
        steps: of a slice; None for as many as ours take SLICE_S for.
        repeats: rounds.
        starts: of each run in processes of its own, beside that of the processes that take turns.

    Attributes:
        ready: what the first rank of each start said of itself.
    """

    def __init__(self, cells: list[Cell], batch_size: int, steps: int | None, repeats: int, starts: int):
        self.cells, self.batch_size, self.repeats, self.starts = cells, batch_size, repeats, starts
        self.steps, self.ready = steps, list[Ready]()
        self.runs: dict[tuple[Cell, str], Run] = {}
        self.step_s: dict[Cell, list[float]] = {}

    def measure(self) -> list[Run]:
        """The runs, cell by cell. One that could not run says why."""
        able = []
        for cell in self.cells:
            with self._excused(cell):
                cell.check(self.batch_size)
                for _ in range(self.starts):
                    self._start_each(cell)
                able.append(cell)
        with contextlib.ExitStack() as stack:
            taking = {}
            for cell in able:
                with self._excused(cell):
                    config = cell.with_batch(self.batch_size, steps_of(self._steps(cell), self.repeats))
                    processes = stack.enter_context(ranks.of(config, OURS, cell.ranks))
                    self._started(cell, OURS, processes)
                    processes.warm()
                    taking[cell] = processes
            for turn in range(self.repeats):
                begin = time.perf_counter()
                for cell in list(taking):
                    with self._excused(cell, taking):
                        self._turns(cell, taking[cell], turn)
                if turn == 0:
                    about_s = (time.perf_counter() - begin) * self.repeats
                    self._say(f"{self.repeats} rounds, about {about_s:.0f} s")
            for cell, processes in taking.items():
                with self._excused(cell):
                    processes.end()
        return [self.runs[cell, name] for cell in self.cells for name in NAMES if (cell, name) in self.runs]

    def _start_each(self, cell: Cell) -> None:
        """Ours and its references, each alone."""
        names = [OURS]
        for name in names:
            config = cell.with_batch(self.batch_size, WARM_STEPS)
            with ranks.of(config, name, cell.ranks) as processes:
                self._started(cell, name, processes)
                processes.end()
            if name == OURS:  # the ceiling of several ranks is that of one
                others = processes.ready[0].references
                names += [other for other in others if other != CEILING or cell.ranks == 1]

    def _turns(self, cell: Cell, processes: Ranks, turn: int) -> None:
        """A slice of each, in another order in each round."""
        for name in shuffled([OURS, *processes.ready[0].references], turn):
            self._run(cell, name).slices.append(processes.turn(name, self._steps(cell)))

    def _steps(self, cell: Cell) -> int:
        if self.steps is not None:
            return self.steps
        return min(MOST_STEPS, max(LEAST_STEPS, round(SLICE_S / statistics.median(self.step_s[cell][: self.starts]))))

    def _run(self, cell: Cell, name: str) -> Run:
        return self.runs.setdefault((cell, name), Run(cell.backend, name, cell.ranks, self.batch_size))

    def _started(self, cell: Cell, name: str, processes: Ranks) -> None:
        run = self._run(cell, name)
        run.starts_s.append(processes.start_s)
        run.peak_bytes.append(max(ready.peak_bytes for ready in processes.ready))
        self.ready.append(processes.ready[0])
        if name == OURS:
            self.step_s.setdefault(cell, []).append(max(ready.step_s for ready in processes.ready))
        self._say(f"{run.title} started in {processes.start_s:.1f} s")

    @contextlib.contextmanager
    def _excused(self, cell: Cell, taking: dict[Cell, Ranks] | None = None) -> Iterator[None]:
        """A cell that cannot go on does not end the others."""
        try:
            yield
        except (ConfigError, NotRun) as error:
            ours = self._run(cell, OURS)
            ours.why, ours.failed = str(error), isinstance(error, NotRun) and not error.refused
            for (of, _), run in self.runs.items():
                if of is cell:
                    run.slices.clear()
            if taking is not None:
                del taking[cell]

    def _say(self, text: str) -> None:
        print(f"batch {self.batch_size}: {text}", flush=True)
