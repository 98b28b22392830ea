"""What a run has come to. No torch here."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dist_train.checkpoint.rules import WEIGHTS
from dist_train.ranks import ending


@dataclass(frozen=True)
class Outcome:
    """What a run has come to, the same on every rank.

    Args:
        status: finished; or preempted: it was asked to end by a signal or its time limit, is saved, and goes on from
            there when it is started again in its folder.
        why: it ended before its last step: who asked; None where it did not.
        folder: of the run.
        steps: optimizer steps, since its first start.
        epochs: passes over the data.
        samples: seen, over all ranks.
        train_s: seconds of training, evaluation left out.
        metrics: of the last evaluation, `eval/...`.
    """

    status: Literal["finished", "preempted"]
    why: str | None
    folder: Path
    steps: int
    epochs: float
    samples: int
    train_s: float
    metrics: dict[str, float]

    @property
    def code(self) -> int:
        """The exit code of a script that trains this alone: 0, or 75 where it is to be started again."""
        return ending.OK if self.status == "finished" else ending.STOPPED

    @property
    def weights(self) -> Path:
        """The file of the final weights, for `torch.load(..., weights_only=True)`."""
        return self.folder / WEIGHTS
