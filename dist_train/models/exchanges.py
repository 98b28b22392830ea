"""What layers exchange among the ranks while a step is computed: recorded, so that a rank's share can be computed again
without the others."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

Exchange = Callable[[torch.Tensor], torch.Tensor]  # a collective, which may work in place


class Tape:
    """The exchanges of a step, in their order.

    Args:
        received: what they gave, where they have taken place already; None where they take place now.

    Attributes:
        sent: what this rank gave, or would have given.
        received: what all ranks were given.
    """

    def __init__(self, received: Sequence[torch.Tensor] | None = None):
        self.plays = received is not None
        self.sent: list[torch.Tensor] = []
        self.received = list(received or ())

    def __call__(self, exchange: Exchange, mine: torch.Tensor) -> torch.Tensor:
        """Exchanges, or gives what that gave."""
        self.sent.append(mine.clone())
        if self.plays:
            return self.received[len(self.sent) - 1].clone()
        found = exchange(mine)
        self.received.append(found.clone())
        return found


_tape: Tape | None = None


def exchanged(exchange: Exchange, mine: torch.Tensor) -> torch.Tensor:
    """What a collective gives for this rank's tensor. Collective, unless it is played from a tape."""
    return exchange(mine) if _tape is None else _tape(exchange, mine)


@contextmanager
def taped(tape: Tape) -> Iterator[None]:
    """Around forward and backward."""
    global _tape
    before, _tape = _tape, tape
    try:
        yield
    finally:
        _tape = before
