"""Files in an object store, such as s3://bucket/path, through fsspec: what of pathlib's ways a checkpoint needs.

An object is whole or absent: it is there once all of it was sent. There are no folders and no renames: a folder is what
names begin with. Listings are never taken from a cache, as other ranks and other runs write there.
"""

import contextlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

from dist_train.errors import ConfigError

# What a URL begins with. fsspec's own chains, such as simplecache::s3://, hold copies, which are not wanted here.
_URL = re.compile(r"([a-z][a-z0-9+.-]*)://.+", re.DOTALL)
LOCAL = ("file", "local")  # written as a path, and taken for one
IN_MEMORY = "memory"
_PATTERN = set("*?[]")


class Unreachable(ConfigError):
    """A remote place that does not answer as it should: nothing is known of what is there.

    Args:
        place: that was asked.
        problem: what was said.
    """

    def __init__(self, place: "Url", problem: str):
        super().__init__(
            f"checkpoint: got {place}, which cannot be reached ({problem}), expected a bucket that is there, "
            f"credentials for it and a network, as fsspec finds them; if it is a passing fault, start again"
        )
        self.place, self.problem = place, problem

    def __reduce__(self) -> tuple:  # it travels between ranks
        return Unreachable, (self.place, self.problem)


def is_url(text: str) -> bool:
    """Whether a path is of an object store, or of another remote place."""
    return scheme(text) not in (None, *LOCAL)


def scheme(text: str) -> str | None:
    """What a URL begins with, such as s3; None of a path."""
    found = _URL.fullmatch(text)
    return found[1] if found else None


def problem(text: str) -> str | None:
    """Why nothing can be kept at a URL, as far as the URL shows; None where it can. Imports the library for it."""
    import fsspec

    name = scheme(text)
    if _PATTERN & set(text):
        return f"with one of {' '.join(sorted(_PATTERN))} in it, which fsspec takes for a pattern, expected a plain URL"
    if name == IN_MEMORY:
        return "which ends with the process, expected a place that stays, such as s3://bucket/path"
    try:
        fsspec.get_filesystem_class(name)
    except ValueError:
        return f"whose {name}:// fsspec does not know, expected s3://bucket/path, gs://bucket/path or a folder"
    except ImportError as error:
        return (
            f"whose library is not installed ({error}), expected it; for s3:// write pip install 'dist-train[remote]'"
        )
    return None


@dataclass(frozen=True)
class Url:
    """An object, or what the names of several begin with.

    Args:
        text: without a slash at its end.
    """

    text: str

    def __str__(self) -> str:
        return self.text

    def __truediv__(self, name: str) -> "Url":
        return Url(f"{self.text}/{name}")

    @property
    def name(self) -> str:
        """What stands after the last slash."""
        return self.text.rpartition("/")[2]

    @property
    def parent(self) -> "Url":
        """What stands before it."""
        return Url(self.text.rpartition("/")[0])

    def open(self, mode: str) -> io.RawIOBase:
        """A stream, rb or wb; what is written is there when it is closed. Raises FileNotFoundError, Unreachable."""
        with _answering(self):
            fs, path = _at(self)
            return _Stream(self, fs.open(path, mode))

    def read_text(self, encoding: str = "utf-8") -> str:
        """All of it. Raises FileNotFoundError, Unreachable."""
        with _answering(self):
            fs, path = _at(self)
            content = fs.cat_file(path)
        return content.decode(encoding)

    def part(self, offset: int, length: int) -> io.BytesIO:
        """Some of its bytes, in one request. Raises FileNotFoundError, Unreachable."""
        with _answering(self):
            fs, path = _at(self)
            return io.BytesIO(fs.cat_file(path, start=offset, end=offset + length))

    def write_text(self, text: str) -> None:
        """In one request, so whole or not at all. Raises Unreachable."""
        with _answering(self):
            fs, path = _at(self)
            fs.pipe_file(path, text.encode())

    def create_text(self, text: str) -> bool:
        """The same where nothing is there yet; whether that was so. Raises Unreachable."""
        with _answering(self):
            fs, path = _at(self)
            try:
                fs.pipe_file(path, text.encode(), mode="create")
            except FileExistsError:
                return False
        return True

    def names(self) -> list[str]:
        """What is below, one level, sorted; empty where nothing is. Raises Unreachable."""
        with _answering(self), contextlib.suppress(FileNotFoundError):
            fs, path = _at(self)
            found = (item.rstrip("/").rpartition("/")[2] for item in fs.ls(path, detail=False))
            return sorted(name for name in found if name and name != self.name)
        return []

    def remove(self) -> None:
        """Takes an object away; one that is not there is gone already. Raises Unreachable."""
        with _answering(self), contextlib.suppress(FileNotFoundError):
            fs, path = _at(self)
            fs.rm_file(path)

    def remove_below(self, names: list[str]) -> None:
        """Takes some away that are below, in few requests; the store may keep one without saying so. Raises
        Unreachable."""
        with _answering(self), contextlib.suppress(FileNotFoundError):
            fs, path = _at(self)
            if names:
                fs.rm([f"{path}/{name}" for name in names])


class _Stream(io.RawIOBase):
    """fsspec's stream, whose errors are those of this module."""

    def __init__(self, url: Url, inner: IO[bytes]):
        self.url, self.inner = url, inner

    def readable(self) -> bool:
        return self.inner.readable()

    def writable(self) -> bool:
        return self.inner.writable()

    def seekable(self) -> bool:
        return self.inner.seekable()

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.inner.seek(offset, whence)

    def tell(self) -> int:
        return self.inner.tell()

    def readinto(self, buffer: Any) -> int:
        with _answering(self.url):
            data = self.inner.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def write(self, data: Any) -> int:
        with _answering(self.url):
            return self.inner.write(data)

    def close(self) -> None:
        if not self.closed:
            super().close()
            with _answering(self.url):
                self.inner.close()


def _at(url: Url) -> tuple[Any, str]:
    """fsspec's file system, of which a process has one for each place, and the path there."""
    from fsspec.core import url_to_fs

    return url_to_fs(url.text, use_listings_cache=False)


@contextlib.contextmanager
def _answering(url: Url) -> Iterator[None]:
    """What any library says when it fails, in one form."""
    try:
        yield
    except (FileNotFoundError, Unreachable):
        raise
    except ImportError as error:
        raise ConfigError(f"{url}: its library is not installed; {error}; pip install 'dist-train[remote]'") from None
    except Exception as error:  # boto's, aiohttp's, Google's, and OSError
        said = " ".join(str(error).split()) or type(error).__name__
        raise Unreachable(url, said) from error
