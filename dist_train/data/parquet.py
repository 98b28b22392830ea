"""Text in Parquet files, by pyarrow."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dist_train.errors import ConfigError

ROWS = 1024  # at a time


@contextlib.contextmanager
def _opened(path: Path, name: str) -> Iterator[Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigError(
            f"data.args.files: got {name} without pyarrow, expected it installed; pip install 'dist-train[text]'"
        ) from error
    try:
        with parquet.ParquetFile(path) as file:
            yield file
    except pyarrow.ArrowException as error:
        raise ConfigError(f"data.args.files: got {name}, expected a whole Parquet file: {error}") from None


def spans(path: Path, limit: int) -> Iterator[tuple[int, tuple[int, int]]]:
    """Row groups, from one to before another, of about `limit` bytes, with their size. Raises ConfigError."""
    with _opened(path, str(path)) as file:
        first = size = 0
        for group in range(file.metadata.num_row_groups):
            more = file.metadata.row_group(group).total_byte_size
            if size and size + more > limit:
                yield size, (first, group)
                first, size = group, 0
            size += more
        yield size, (first, file.metadata.num_row_groups)


def rows(path: Path, name: str, first: int, last: int, field: str) -> Iterator[tuple[int, Any]]:
    """The values of a column in some row groups, with their row, counted from 1. Raises ConfigError.

    Args:
        path: of the file.
        name: for messages.
        first: row group.
        last: row group before which they end.
        field: the column.
    """
    with _opened(path, name) as file:
        columns = file.schema_arrow.names
        if field not in columns:
            raise ConfigError(
                f"{name}: got no column {field!r} (its columns: {', '.join(map(repr, columns))}), expected text there; "
                f"write --data.args.field NAME"
            )
        number = sum(file.metadata.row_group(group).num_rows for group in range(first))
        for batch in file.iter_batches(ROWS, row_groups=list(range(first, last)), columns=[field]):
            for value in batch.column(0).to_pylist():
                number += 1
                yield number, value
