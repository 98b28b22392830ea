"""The one error that a user's input can cause, and how it is said."""


class ConfigError(ValueError):
    """The user's mistake. Each line names the config path, what was got, what is expected and how to mend it."""

    def __init__(self, *lines: str):
        super().__init__("\n".join(lines))
        self.lines = lines
