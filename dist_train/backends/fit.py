"""What a backend asks of the model itself, once that is there; `rules.py` has what it asks of the config."""

from dist_train.backends.probe import Findings
from dist_train.errors import ConfigError

NAMES_SHOWN = 4


def check_model(backend: str, findings: Findings) -> None:
    """Raises ConfigError where a backend could not train the model as one process does.

    Args:
        backend: its name, `auto` settled.
        findings: what a first forward and backward of the model showed.
    """
    if findings.written and backend != "single":
        raise ConfigError(
            f"model: got a forward that changes weights in place ({some(findings.written)}), as an embedding's "
            f"max_norm does; under {backend} each rank would change its own copy by the samples that it sees; expected "
            f"a forward that only reads weights; take that out, or train in one process, without torchrun"
        )


def some(names: tuple[str, ...]) -> str:
    """The first of the names, and how many more there are."""
    rest = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
