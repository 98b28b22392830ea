"""Text as tokens, for language models."""

from functools import partial
from pathlib import Path

import numpy as np

from dist_train.data import encoded_text, token_shards
from dist_train.data.sets import Data
from dist_train.data.tokenizers import Tokenizer
from dist_train.data.tokens import Tokens
from dist_train.data.windows import contiguous
from dist_train.errors import ConfigError

KEPT = "tokenizer"  # in a run's folder


def text(
    root: str,
    download: bool,
    files: str | None = None,
    test_files: str | None = None,
    test_fraction: float = 0.1,
    field: str = "text",
    tokenizer: str | None = None,
    end_token: str | None = None,
    block: int = 256,
    tokens: str | None = None,
    test_tokens: str | None = None,
    vocab_size: int | None = None,
) -> Data:
    """Text as tokens; a sample is a window of them, with the token that follows each.

    Text is encoded once, into `encoded` in the folder `root`, and again where it has changed.

    Args:
        root: folder that the other paths start from.
        download: not used.
        files: the text to train on: a file, a folder, or a pattern such as 'corpus/*.jsonl'. A .txt file is a document;
            of .jsonl, .jsonl.gz and .parquet each line or row is (null: the language reference that every Python has).
        test_files: the text to test on, likewise; without it the end of the other is held out.
        test_fraction: the share of the tokens that is held out, of whole documents where there are several; 0 is none.
            Not with `test_files` or `test_tokens`.
        field: of a line of .jsonl, or the column of .parquet, that has the text.
        tokenizer: bytes; characters, those of `files`; or the path of a tokenizer.json (null: bytes).
        end_token: of a tokenizer.json, the token that ends a document (null: its eos_token, or a usual one such as
            <|endoftext|>).
        block: targets of a sample.
        tokens: files of token numbers, in place of `files`: raw uint16, as nanoGPT writes them, or with
            modded-nanogpt's header.
        test_tokens: the same to test on.
        vocab_size: that the numbers of `tokens` are below (null: that of the tokenizer).

    Raises:
        ConfigError: a file that is not there, or not what it should be.
    """
    home, by = Path(root), None
    if tokens is not None:
        by = encoded_text.tokenizer_of(home, tokenizer, end_token) if tokenizer is not None else None
        size = vocab_size or (by.vocab_size if by is not None else 0)
        train = token_shards.read(home, tokens, "data.args.tokens", size)
        test = None if test_tokens is None else token_shards.read(home, test_tokens, "data.args.test_tokens", size)
    else:
        train, by = encoded_text.read(home, files, field, tokenizer, end_token)
        test = None if test_files is None else encoded_text.read_test(home, test_files, field, by)
        size = by.vocab_size
    if test is None:
        train, test = held_out(train, test_fraction)
    if len(train) <= block:
        raise ConfigError(
            f"data.args.block: got {block} for {len(train):,} tokens to train on, expected fewer; for example "
            f"--data.args.block {max(1, len(train) // 10)}"
        )
    if test is not None and len(test) < 2:
        raise ConfigError(f"data.args: got {len(test)} tokens to test on, expected 2 at least; take more, or none")
    known = {"vocab_size": size, "block": block} | ({} if by is None else {"tokenizer": by})
    return Data(
        contiguous(train, block, tail=False),
        contiguous(test, block, tail=True) if test is not None else None,
        facts=known,
        keep=None if by is None else partial(_keep, by),
    )


def held_out(tokens: Tokens, fraction: float) -> tuple[Tokens, Tokens | None]:
    """The tokens to train on, and those at the end that are held out: whole documents where there are several."""
    if fraction == 0:
        return tokens, None
    cut = int(len(tokens) * (1 - fraction))
    if len(tokens.starts) > 1:
        after = min(max(int(np.searchsorted(tokens.starts, cut)), 1), len(tokens.starts) - 1)
        near = tokens.starts[max(1, after - 1) : after + 1]  # of many millions only these are read
        cut = int(near[np.abs(near - cut).argmin()])
    return tokens.part(0, cut), tokens.part(cut, len(tokens))


def _keep(tokenizer: Tokenizer, folder: Path) -> None:
    try:
        tokenizer.save(folder / KEPT)
    except OSError as error:
        raise ConfigError(f"run.dir: got {folder}, which cannot be written to ({error.strerror})") from error
