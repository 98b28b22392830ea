"""The errors that are told apart: a user's mistake, and the echo of another rank's failure."""


class OtherRankError(RuntimeError):
    """Another rank failed, and this one ends because of it."""


class CorruptionError(RuntimeError):
    """A rank has computed wrongly, or its memory has changed: found by an audit, alike on all ranks."""


class OutOfMemoryError(RuntimeError):
    """The memory of a device or of the machine has not sufficed. The message says what took it, and what would take
    less; the error that said it first is its cause."""


class LaunchError(RuntimeError):
    """What keeps ranks from meeting, in a line of its own: no mistake in the config, and no code to look at."""


class RankError(RuntimeError):
    """A rank that `launch` started has failed. Its message ends with the traceback of that rank.

    Args:
        rank: which.
        what: has happened there.
        text: of its traceback, if it left one.
    """

    def __init__(self, rank: int, what: str, text: str = ""):
        super().__init__(f"rank {rank}: {what}" + (f"\n\n{text}" if text else ""))
        self.rank, self.what, self.text = rank, what, text

    def __reduce__(self) -> tuple:
        return RankError, (self.rank, self.what, self.text)


class ConfigError(ValueError):
    """The user's mistake. Each line names the config path, what was got, what is expected and how to mend it."""

    def __init__(self, *lines: str):
        # a value that is quoted in a line may itself hold a line's end
        self.lines = tuple(" ".join(line.split("\n")) for line in lines)
        super().__init__("\n".join(self.lines))


class OwnCodeError(ConfigError):
    """The user's own code raises: a line that says where it was called, and lines as Python shows the error."""


class TransformError(ValueError):
    """A transform does not take a sample. The message says which one, and why; who catches it adds the sample."""
