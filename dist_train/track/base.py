"""The small face of a tracker."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dist_train.loop.meter import Metrics

Summary = dict[str, Any]


class Tracker(Protocol):
    """Who records a run, on rank 0. What it raises is said in a line, and the run goes on without it.

    Args:
        name: the config path that asks for it.
    """

    name: str

    def log(self, metrics: Metrics, line: str | None) -> None:
        """Metrics of a moment, at least `step`, `epoch` and `time_s`; and a line for people, if there is something to
        say. Steps never go back; there may be several moments of one step. Has `event` where something happened."""

    def finish(self, summary: Summary) -> None:
        """What is in summary.json, of a run that came to its end or was stopped."""

    def close(self, code: int) -> None:
        """No more comes; with the exit code of the run. Also without `finish`, where the run failed."""


@dataclass(frozen=True)
class Course:
    """What a run has to go.

    Args:
        at: step that it goes on from; 0 at the start.
        steps: in all.
        steps_per_epoch: of these, in a pass over the data.
        samples_per_step: over all ranks.
        before: folder of the run whose checkpoint this one goes on from, mostly its own; None at the start.
        results: metrics of an evaluation, such as eval/accuracy: first that which the best checkpoint is decided by.
        lowest: those of which the least is the best.
        unit: that the loss is a mean over; see Task.unit.
    """

    at: int
    steps: int
    steps_per_epoch: int
    samples_per_step: int
    before: Path | None
    results: tuple[str, ...] = ()
    lowest: frozenset[str] = frozenset()
    unit: str = "samples"


def numbers(metrics: Metrics) -> dict[str, float]:
    """What can be drawn: the metrics that are numbers, without the step. Nothing of an event."""
    if "event" in metrics:
        return {}
    return {name: value for name, value in metrics.items() if name != "step" and isinstance(value, int | float)}
