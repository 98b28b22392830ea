"""The errors that are told apart: a user's mistake, and the echo of another rank's failure."""


class OtherRankError(RuntimeError):
    """Another rank failed, and this one ends because of it."""


class LaunchError(RuntimeError):
    """What keeps ranks from meeting, in a line of its own: no mistake in the config, and no code to look at."""


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
