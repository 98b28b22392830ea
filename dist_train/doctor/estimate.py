"""What a rank of a run holds and sends, as it is estimated."""

from dataclasses import dataclass

from dist_train.doctor.ledger import Moment
from dist_train.doctor.traffic import Route

MICRO_BATCH = ("data", "forward", "backward")


@dataclass(frozen=True)
class Estimate:
    """Of a rank.

    Args:
        peak: the moment of the training or of an evaluation with the most bytes.
        samples: at once, then; 0 while weights are updated.
        micro: samples of the largest micro-batch.
        micro_batches: of a step.
        held: bytes of all weights with buffers, of all gradients and of the optimizer's state that a rank has.
        state: bytes of weights and optimizer state of the whole model, as a checkpoint holds them.
        data: bytes of the data set, where it is held in memory.
        start: the most bytes until the first step.
        sent: bytes that a rank sends in a step, by where they go.
        formula: the backend is not traced, but computed from one that is.
    """

    peak: Moment
    samples: int
    micro: int
    micro_batches: int
    held: dict[str, int]
    state: int
    data: int
    start: int
    sent: dict[Route, int]
    formula: bool = False

    @property
    def busiest(self) -> str:
        """When the peak is: in a micro-batch, an evaluation, or an update of the weights."""
        return "micro-batch" if self.peak.phase in MICRO_BATCH else self.peak.phase
