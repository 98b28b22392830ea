"""What the layers of a model may need to know of the batch that it is called with."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Counted(Protocol):
    """A batch."""

    size: int
    """How many of its samples count; 0 for a stand-in."""


_batch: Counted | None = None


@contextmanager
def running(batch: Counted) -> Iterator[None]:
    """Around forward and backward of a batch that is trained on."""
    global _batch
    before, _batch = _batch, batch
    try:
        yield
    finally:
        _batch = before


def counts() -> bool:
    """Whether the samples of the batch count: it is no stand-in of a rank that has none."""
    return _batch is None or _batch.size > 0
