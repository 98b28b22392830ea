"""Text that is installed with every Python: its language reference, as `help()` shows it."""

import hashlib


def topics() -> list[str]:
    """About 80 documents, 750 KB of English, in the order of their names. They differ by the version of Python.

    Source: pydoc_data/topics.py, made from the Python Language Reference; PSF licence.
    """
    from pydoc_data.topics import topics as found

    return [found[name] for name in sorted(found)]


def digest(documents: list[str]) -> str:
    """A hash over documents."""
    return hashlib.sha256("\0".join(documents).encode()).hexdigest()
