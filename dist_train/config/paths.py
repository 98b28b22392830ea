"""Paths as people write them: `~` is the home folder, `$NAME` and `${NAME}` are variables of the environment."""

import os
import re

from dist_train.errors import ConfigError

# Arguments that are paths, by the name of a data set of ours.
IN_DATA_ARGS = {
    "csv_images": ("annotations", "test_annotations", "image_dir"),
    "image_folder": ("folder", "train", "test"),
    "text": ("files", "test_files", "tokenizer", "tokens", "test_tokens"),
}
_MARKED = re.compile(r"\$(?:([$~])|([A-Za-z_][A-Za-z0-9_]*)|\{([A-Za-z_][A-Za-z0-9_]*)\})")


def expanded(text: str, name: str) -> str:
    """The path itself, as the file system takes it. `$$` is a dollar sign, and `$~` a tilde. Raises ConfigError.

    Args:
        text: what the user wrote.
        name: the config path or the option that an error names.
    """

    def value(found: re.Match) -> str:
        literal, *variable = found.groups()
        if literal:
            return literal
        key = variable[0] or variable[1]
        if not os.environ.get(key):
            state = "empty" if key in os.environ else "not set"
            raise ConfigError(
                f"{name}: got {text}, but the variable {key} is {state}; set it, or write the path itself (a dollar "
                f"sign is written $$)"
            )
        return os.environ[key]

    path = _MARKED.sub(value, text)
    if path.startswith("~") and not text.startswith("$~"):
        path = os.path.expanduser(path)
        if path.startswith("~"):
            raise ConfigError(
                f"{name}: got {text}, but there is no home folder of {path.partition('/')[0]}; write the path itself "
                f"(a folder of that name here is ./{path})"
            )
    return _nameable(path, name)


def written(path: str) -> str:
    """A path as text from which `expanded` makes it again."""
    text = path.replace("$", "$$")
    return "$" + text if text.startswith("~") else text


def typed(word: str) -> str:
    """A word of the command line as text, also where the locale is not the terminal's: there Python gives bytes for
    what it has no characters for."""
    return os.fsencode(word).decode("utf-8", "surrogateescape")


def _nameable(path: str, name: str) -> str:
    """A path whose characters the locale does not have, in the form in which Python gives file names to it: as their
    bytes in UTF-8."""
    try:
        os.fsencode(path)
        return path
    except UnicodeEncodeError:
        pass
    try:
        return path.encode("utf-8", "surrogateescape").decode("ascii", "surrogateescape")
    except UnicodeEncodeError:
        raise ConfigError(f"{name}: got {path!r}, which no file can be called; write another path") from None
