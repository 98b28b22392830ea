"""train.early_stopping: ends a run whose metric no longer gets better."""

import math
from collections.abc import Mapping
from typing import Any

from dist_train.checkpoint.manifest import Best
from dist_train.errors import ConfigError
from dist_train.run.hooks import Hook
from dist_train.run.running import Run


class EarlyStopping(Hook):
    """Counts evaluations since the best one.

    Args:
        best: the metric, and which way it gets better.
        patience: evaluations in a row that may be no better.
        min_delta: by which a better one is better at least.
    """

    name = "early_stopping"

    def __init__(self, best: Best, patience: int, min_delta: float):
        self.of, self.patience, self.min_delta = best, patience, min_delta
        self.best: float | None = None
        self.best_step = self.worse = 0

    def after_evaluation(self, run: Run, metrics: Mapping[str, float]) -> None:
        """See Hook."""
        name = self.of.metric
        if name not in metrics:
            raise ConfigError(
                f"train.early_stopping: got the metric {name}, expected one of {', '.join(metrics)}; write "
                f"--train.early_stopping.metric {next(iter(metrics), 'eval/loss')}"
            )
        value = metrics[name]
        if self._better(value):
            self.best, self.best_step, self.worse = value, run.step, 0
            return
        self.worse += 1
        if self.worse >= self.patience:
            best = "a number" if self.best is None else f"better than {self.best:.6g}, of step {self.best_step}"
            times = f"{self.worse} evaluation{'s' if self.worse > 1 else ''}"
            by = f" by more than {self.min_delta}" if self.min_delta else ""
            run.stop(f"train.early_stopping: in {times} {name} was not {best}{by}")

    def _better(self, value: float) -> bool:
        if self.best is None:
            return not math.isnan(value)
        return (self.best - value if self.of.lowest else value - self.best) > self.min_delta

    def state(self) -> dict[str, float | int]:
        """See Hook."""
        best: dict[str, float | int] = {} if self.best is None else {"best": self.best}
        return best | {"best_step": self.best_step, "worse": self.worse}

    def load(self, state: Mapping[str, Any]) -> None:
        """See Hook."""
        self.best, self.best_step, self.worse = state.get("best"), state["best_step"], state["worse"]
