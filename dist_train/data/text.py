"""Text as tokens, for language models."""

from pathlib import Path

import numpy as np

from dist_train.data import prose
from dist_train.data.sets import Data
from dist_train.data.tokenizers import Bytes, Characters, Tokenizer
from dist_train.data.tokens import Tokens
from dist_train.data.windows import contiguous
from dist_train.errors import ConfigError


def text(
    root: str,
    download: bool,
    files: str | None = None,
    test_files: str | None = None,
    test_fraction: float = 0.1,
    tokenizer: str = "bytes",
    block: int = 256,
) -> Data:
    """Text as tokens; a sample is a window of them, and what follows each.

    Args:
        root: folder that the other paths start from.
        download: not used.
        files: the text to train on (null: the documentation that comes with Python).
        test_files: the text to test on; without it the end of that of `files` is held out.
        test_fraction: the share of the tokens that is held out; not with `test_files`.
        tokenizer: bytes or characters.
        block: tokens of a sample.

    Raises:
        ConfigError: a file that is not there, or is no text.
    """
    documents = prose.topics() if files is None else [_read(Path(root) / files, "files")]
    others = None if test_files is None else [_read(Path(root) / test_files, "test_files")]
    by = _tokenizer(tokenizer, documents)
    tokens = _encoded(documents, by)
    if others is not None:
        train, test = tokens, _encoded(others, by)
    else:
        train, test = held_out(tokens, test_fraction)
    return Data(
        contiguous(train, block, tail=False),
        contiguous(test, block, tail=True) if test is not None else None,
        facts={"vocab_size": by.vocab_size, "block": block, "tokenizer": by},
    )


def held_out(tokens: Tokens, fraction: float) -> tuple[Tokens, Tokens | None]:
    """The tokens to train on, and those at the end that are held out: whole documents where there are several."""
    if fraction == 0:
        return tokens, None
    cut = int(len(tokens) * (1 - fraction))
    if len(tokens.starts) > 1:
        cut = int(tokens.starts[1:][np.abs(tokens.starts[1:] - cut).argmin()])
    return tokens.part(0, cut), tokens.part(cut, len(tokens))


def _tokenizer(name: str, documents: list[str]) -> Tokenizer:
    return Bytes() if name == "bytes" else Characters("".join(sorted(set().union(*documents))))


def _encoded(documents: list[str], tokenizer: Tokenizer) -> Tokens:
    end = [] if tokenizer.end is None else [tokenizer.end]
    rows = [np.concatenate([tokenizer.encode(one), end]).astype(np.uint16) for one in documents]
    starts = np.cumsum([0, *map(len, rows[:-1])], dtype=np.int64)
    return Tokens([np.concatenate(rows)], starts, f"{prose.digest(documents)} {tokenizer.identity()}")


def _read(path: Path, key: str) -> str:
    try:
        return path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"data.args.{key}: got {path}, expected a text file in UTF-8 that can be read: {error}"
        ) from None
