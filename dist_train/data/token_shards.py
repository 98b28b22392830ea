"""Token numbers that others have written: nanoGPT's files, uint16 alone, and modded-nanogpt's, with a header."""

import hashlib
from glob import glob
from pathlib import Path

import numpy as np

from dist_train.data.tokens import Tokens
from dist_train.errors import ConfigError

# The header: 256 numbers int32, of which the first are these and the count of the tokens that follow, uint16.
MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024
# Of a file, however large, so much is read for its hash, and for a look at its token numbers.
BLOCKS, BLOCK_TOKENS = 3, 2048


def read(root: Path, pattern: str, key: str, vocab_size: int) -> Tokens:
    """The tokens of some files, mapped, in the order of their names, as one document. Raises ConfigError.

    Token numbers are held against `vocab_size` in a few blocks of each file now, and in all others when they are read.

    Args:
        root: that the pattern starts from.
        pattern: a file or a glob.
        key: config path that it stands at.
        vocab_size: that token numbers are below.
    """
    place = root / pattern
    paths = [place] if place.is_file() else sorted(path for path in map(Path, glob(str(place))) if path.is_file())
    if not paths:
        raise ConfigError(
            f"{key}: got {pattern}, which has no files at {place}, expected files of token numbers, such as "
            f"'shards/*.bin'; paths start from data.root"
        )
    digest = hashlib.sha256()
    shards = []
    for path in paths:
        shard = _mapped(path, key)
        digest.update(f"{path.name}\0{len(shard)}\0".encode())
        for block in _blocks(shard):
            digest.update(block.astype("<u2").data)
            _check(block, path.name, key, vocab_size)
        shards.append(shard)
    ends = np.cumsum([len(shard) for shard in shards])

    def check(found: np.ndarray, places: np.ndarray) -> None:
        if found.size and found.max() >= vocab_size:
            at = places.flat[found.argmax()]
            _check(found, paths[int(np.searchsorted(ends, at, side="right"))].name, key, vocab_size)

    return Tokens(shards, np.zeros(1, np.int64), digest.hexdigest(), check)


def _mapped(path: Path, key: str) -> np.ndarray:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = np.frombuffer(file.read(12), "<i4") if size >= 12 else np.zeros(3, "<i4")
        first = HEADER_BYTES if head[0] == MAGIC else 0
        if first and (head[1] != VERSION or size != HEADER_BYTES + 2 * head[2].astype(np.int64)):
            raise ConfigError(
                f"{key}: got {path} of {size:,} bytes with version {head[1]} and {head[2]:,} tokens in its header, "
                f"expected version {VERSION} and {HEADER_BYTES} bytes and 2 for each token; it may be cut off: get it "
                f"again"
            )
        if size == first or size % 2:
            raise ConfigError(f"{key}: got {path} of {size:,} bytes, expected token numbers of 2 bytes each (uint16)")
        return np.memmap(path, "<u2", "r", offset=first).view(np.ndarray)
    except OSError as error:
        raise ConfigError(f"{key}: got {path}, which cannot be read: {error.strerror}; expected a file") from error


def _blocks(shard: np.ndarray) -> list[np.ndarray]:
    last = max(0, len(shard) - BLOCK_TOKENS)
    return [shard[first : first + BLOCK_TOKENS] for first in sorted({last * i // (BLOCKS - 1) for i in range(BLOCKS)})]


def _check(tokens: np.ndarray, name: str, key: str, vocab_size: int) -> None:
    if tokens.max() >= vocab_size:
        raise ConfigError(
            f"{key}: got token number {tokens.max()} in {name}, expected numbers below {vocab_size:,}, the size of the "
            f"vocabulary; give the tokenizer that wrote the file, or its size as --data.args.vocab_size"
        )
