"""Text that is installed with every Python: its language reference, as `help()` shows it."""


def topics() -> list[str]:
    """About 80 documents, 460 KB of English, in the order of their names. They differ by the version of Python.

    Source: pydoc_data/topics.py, made from the Python Language Reference; PSF licence.
    """
    from pydoc_data.topics import topics as found

    return [found[name] for name in sorted(found)]
