"""Text in files, as documents: where they are, how they are cut into units of work, and what is in a unit.

A .txt file, or one of another name, is a document; of .jsonl, .jsonl.gz and .parquet files each line or row is one.
"""

import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import Any, BinaryIO

from dist_train.data import parquet
from dist_train.errors import ConfigError

KINDS = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
UNIT_BYTES, MOST_UNITS = 16 << 20, 2048  # of text that is encoded at once, unless there would be more units
AS_JSON = "json:"  # before the name of a field whose value is no text, and is kept as JSON
PIECE_BYTES = 1 << 18  # of a long document that is encoded at once
# Where a tokenizer's words end, in nearly all of them: at the end of a line, before another one.
SEAM, SEARCHED_BYTES = re.compile(rb"\S\n(?=\S)"), 1 << 16


@dataclass(frozen=True)
class Source:
    """A file.

    Args:
        path: where it is.
        name: as it is in manifests and messages.
        size: in bytes.
        mtime_ns: when it was changed.
    """

    path: Path
    name: str
    size: int
    mtime_ns: int

    @property
    def kind(self) -> str:
        """One of KINDS."""
        return next((kind for kind in KINDS if self.name.endswith(kind)), ".txt")


@dataclass(frozen=True)
class Span:
    """A part of a file.

    Args:
        source: of the sources, by its number.
        first: byte that it begins at; of parquet, row group.
        last: byte that it ends before; likewise.
        closes: whether its last document ends with it.
    """

    source: int
    first: int
    last: int
    closes: bool = True


@dataclass(frozen=True)
class Piece:
    """A part of a document, which is small enough to be encoded at once.

    Args:
        text: of it.
        opens: whether the document begins with it.
        closes: whether the document ends with it.
        where: for messages.
    """

    text: str
    opens: bool
    closes: bool
    where: str


def find(root: Path, pattern: str, key: str) -> list[Source]:
    """The files of a pattern, in the order of their names. Raises ConfigError.

    Args:
        root: that it starts from.
        pattern: a file, a folder, or a glob.
        key: config path that it stands at.
    """
    place = root / pattern
    try:
        if place.is_dir():
            paths = [path for path in place.rglob("*") if path.name.endswith(KINDS) and path.is_file()]
            expected = f"files that end with {', '.join(KINDS)} in it"
        elif has_magic(pattern) and not place.exists():
            paths = [path for path in map(Path, glob(str(place), recursive=True)) if path.is_file()]
            expected = "a pattern of files, such as 'corpus/*.jsonl'"
        else:
            paths = [place] if place.is_file() else []
            expected = "a file, a folder, or a pattern such as 'corpus/*.txt'"
        if not paths:
            raise ConfigError(
                f"{key}: got {pattern}, which has no files at {place}, expected {expected}; paths start from data.root"
            )
        found = []
        for path in sorted(path for path in paths if not path.name.startswith(".")):
            stat = path.stat()
            name = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()
            found.append(Source(path, name, stat.st_size, stat.st_mtime_ns))
    except OSError as error:
        raise ConfigError(
            f"{key}: got {place}, which cannot be read: {error.strerror}; expected a file, a folder or a pattern"
        ) from error
    return found


def units(sources: Sequence[Source]) -> list[list[Span]]:
    """The spans of all files, some for each unit of work: a function of the files alone. Raises ConfigError."""
    limit = UNIT_BYTES
    while sum(source.size for source in sources) > limit * MOST_UNITS:
        limit *= 2
    found: list[list[Span]] = []
    filled = 0
    for number, source in enumerate(sources):
        for size, span in _readable(source, lambda s=source, n=number: list(_spans(s, n, limit))):
            if not found or filled + size > limit:
                found.append([])
                filled = 0
            found[-1].append(span)
            filled += size
    return found


def _spans(source: Source, number: int, limit: int) -> Iterator[tuple[int, Span]]:
    """Parts of a file with their sizes."""
    if source.kind == ".parquet":
        yield from ((size, Span(number, *groups)) for size, groups in parquet.spans(source.path, limit))
        return
    if source.kind == ".jsonl.gz" or source.size <= limit:
        yield source.size, Span(number, 0, source.size)
        return
    with source.path.open("rb") as file:
        first = 0
        while first < source.size:
            last = min(source.size, first + limit)
            if last < source.size:
                last = _line_end(file, last) if source.kind == ".jsonl" else _seam(file, last)
            yield last - first, Span(number, first, last, source.kind == ".jsonl" or last == source.size)
            first = last


def _line_end(file: BinaryIO, at: int) -> int:
    file.seek(at - 1)
    file.readline()
    return file.tell()


def _seam(file: BinaryIO, at: int) -> int:
    """A place near `at` or after it where a document may be cut."""
    file.seek(at)
    return at + _cut(file.read(SEARCHED_BYTES))


def _cut(buffer: bytes) -> int:
    found = SEAM.search(buffer)
    if found:
        return found.end()
    return next((i for i, byte in enumerate(buffer[:4]) if byte & 0xC0 != 0x80), 0)  # no character is cut


def documents(sources: Sequence[Source], spans: Sequence[Span], field: str) -> Iterator[Piece]:
    """What is in some spans. Raises ConfigError.

    Args:
        sources: all files.
        spans: of them.
        field: of a line or a row, which has the text.
    """
    for span in spans:
        source = sources[span.source]
        if field.startswith(AS_JSON) and source.kind not in (".jsonl", ".jsonl.gz"):
            raise ConfigError(
                f"data.args.files: got {source.name}, expected chats in .jsonl files, with messages in each line"
            )
        read = {".txt": _plain, ".parquet": _rows}.get(source.kind, _lines)
        try:
            yield from read(source, span, field)
        except ConfigError:
            raise
        except (OSError, EOFError, zlib.error) as error:
            raise ConfigError(
                f"data.args.files: got {source.name}, which cannot be read: {error}; expected a whole file"
            ) from error


def _readable(source: Source, read: Any) -> Any:
    try:
        return read()
    except OSError as error:
        raise ConfigError(f"data.args.files: got {source.path}, which cannot be read: {error}") from error


def _plain(source: Source, span: Span, _: str) -> Iterator[Piece]:
    with source.path.open("rb") as file:
        file.seek(span.first)
        yield from _pieces(file, span, source.name)


def _pieces(file: BinaryIO, span: Span, name: str) -> Iterator[Piece]:
    """The bytes of a span, piece by piece. Only the first one of a file opens a document."""
    at, buffer = span.first, b""
    while True:
        buffer += file.read(min(PIECE_BYTES + SEARCHED_BYTES - len(buffer), span.last - at - len(buffer)))
        if not buffer:
            return
        done = at + len(buffer) == span.last
        size = len(buffer) if done else PIECE_BYTES + _cut(buffer[PIECE_BYTES:])
        piece, buffer = buffer[:size], buffer[size:]
        try:
            text = piece.decode()
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"{name}: got byte {at + error.start:,}, which is no UTF-8, expected text in UTF-8; for example "
                f"iconv -f latin1 -t utf-8 {name}"
            ) from None
        yield Piece(text, at == 0, span.closes and at + size == span.last, name)
        at += size


def _lines(source: Source, span: Span, field: str) -> Iterator[Piece]:
    gz = source.kind == ".jsonl.gz"
    with gzip.open(source.path) if gz else source.path.open("rb") as file:
        file.seek(span.first)
        at, number = span.first, 0
        for line in file:
            if at >= span.last and not gz:
                return
            at, number = at + len(line), number + 1
            if line.strip():
                wrong, text = _of_line(line, field.removeprefix(AS_JSON), field.startswith(AS_JSON))
                if wrong:
                    before = 0 if gz else _count_lines(source.path, span.first)
                    raise ConfigError(f"{source.name} line {before + number:,}: {wrong}")
                after = f" after byte {span.first:,}" if span.first else ""
                where = f"{source.name}{after} line {number:,}"
                yield from [Piece(text, True, True, where)] if field.startswith(AS_JSON) else _document(text, where)


def _of_line(line: bytes, field: str, as_json: bool) -> tuple[str, str]:
    """What is wrong with a line; its text."""
    try:
        row = json.loads(line)
    except ValueError as error:
        return f"got no JSON ({error}), expected an object such as {{{json.dumps(field)}: ...}}", ""
    if not isinstance(row, dict):
        return f"got {type(row).__name__}, expected an object such as {{{json.dumps(field)}: ...}}", ""
    if field not in row:
        names = ", ".join(map(repr, row)) or "none"
        return f"got no field {field!r} (its fields: {names}), expected text there; write --data.args.field NAME", ""
    if as_json:
        return "", json.dumps(row[field])
    return not_text(row[field], field), row[field]


def not_text(value: Any, field: str) -> str:
    """What is wrong with a value, which should be text; "" if nothing is."""
    if not isinstance(value, str):
        return f"got {type(value).__name__} in the field {field!r}, expected text"
    try:
        value.encode()
    except UnicodeEncodeError:
        return f"got half a character (a lone surrogate) in the field {field!r}, expected text that UTF-8 can hold"
    return ""


def _count_lines(path: Path, until: int) -> int:
    count, at = 0, 0
    with path.open("rb") as file:
        while at < until:
            chunk = file.read(min(1 << 20, until - at))
            count, at = count + chunk.count(b"\n"), at + len(chunk)
    return count


def _rows(source: Source, span: Span, field: str) -> Iterator[Piece]:
    for number, value in parquet.rows(source.path, source.name, span.first, span.last, field):
        wrong = not_text(value, field)
        if wrong:
            raise ConfigError(f"{source.name} row {number:,}: {wrong}")
        yield from _document(value, f"{source.name} row {number:,}")


def _document(text: str, where: str) -> Iterator[Piece]:
    """A document that is in memory, in pieces."""
    if len(text) <= PIECE_BYTES:
        yield Piece(text, True, True, where)
        return
    content = text.encode()
    yield from _pieces(io.BytesIO(content), Span(0, 0, len(content)), where)
