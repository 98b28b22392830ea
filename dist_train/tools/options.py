"""The options that a command has beside those of the config."""

from collections.abc import Container, Mapping

from dist_train.config.paths import expanded
from dist_train.errors import ConfigError


def split(
    argv: list[str], own: Mapping[str, tuple[str, str]], command: str, paths: Container[str] = ()
) -> tuple[dict[str, str], list[str]]:
    """A command's own options, and what is the config's. Raises ConfigError for an option without a value.

    Args:
        argv: `--option value` or `--option=value`.
        own: each option's default, and a value as an example.
        command: that the error names.
        paths: the options that are paths, in which `~` and variables are replaced.
    """
    options, rest, words = {name: default for name, (default, _) in own.items()}, [], iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name not in own:
            rest.append(word)
            continue
        options[name] = value if equals else next(words, "")
        if not options[name]:
            raise ConfigError(f"{command}: got {name} without a value; for example {name} {own[name][1]}")
        if name in paths:
            options[name] = expanded(options[name], name)
    return options, rest
