"""Files that are whole or absent."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dist_train.errors import ConfigError


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Where to write what then takes its place as `path`. Nothing is left of what fails."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield beside
        beside.replace(path)
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """A file that is whole or absent."""
    with whole(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write(path: Path, content: bytes, option: str) -> None:
    """A file that the user has asked for. Raises ConfigError, which names the option that gave the path."""
    with _refused(path, option):
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as beside:
            beside.write_bytes(content)


def can_write(path: Path, option: str) -> None:
    """Tries now what `write` does later, and leaves nothing but the folder: what takes minutes to measure should not be
    lost to a mistyped path. Raises ConfigError."""
    if path.is_dir():
        raise ConfigError(
            f"{option}: got {path}, which is a folder, expected a file, for example {option} {path / 'result'}"
        )
    with _refused(path, option):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass


@contextlib.contextmanager
def _refused(path: Path, option: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{option}: got {path}, which cannot be written ({error.strerror}), expected a file in a folder of your "
            f"own, on a disk with space; for example {option} /tmp/{path.name}"
        ) from error
