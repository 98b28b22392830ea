"""Text as tokens, for language models."""

from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dist_train.data import encoded_text, token_shards
from dist_train.data.chat import Chat, answers_only
from dist_train.data.corpus import AS_JSON
from dist_train.data.mixture import mixture
from dist_train.data.sets import Data, Gathered
from dist_train.data.tokenizer_base import Tokenizer
from dist_train.data.tokens import Tokens
from dist_train.data.windows import contiguous, packed, padded
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
    packing: Literal["contiguous", "packed", "padded"] = "contiguous",
    sources: list[dict[str, Any]] | None = None,
    tokens: str | None = None,
    test_tokens: str | None = None,
    vocab_size: int | None = None,
    format: Literal["text", "chat"] = "text",
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
        packing: how documents come into samples. contiguous: one after another, also over their ends; packed: several
            in a sample, apart from each other, by one plan with little padding; padded: one in a sample.
        sources: in place of `files`, several of them, each with its share of the samples: [{files: a/*.txt, weight:
            0.7}, {files: b/*.jsonl, weight: 0.3, field: body}]. Of each a part is held out, and tested on by itself.
        tokens: files of token numbers, in place of `files`: raw uint16, as nanoGPT writes them, or with
            modded-nanogpt's header.
        test_tokens: the same to test on.
        vocab_size: that the numbers of `tokens` are below (null: that of the tokenizer).
        format: what documents are. chat: each line of .jsonl has a list of {role, content} as `field` (there:
            messages), which the chat template of the tokenizer makes text of; the loss is on the answers alone.

    Raises:
        ConfigError: a file that is not there, or not what it should be.
    """
    home, by = Path(root), None
    if sources is not None:
        return _mixture(home, sources, test_fraction, field, tokenizer, end_token, block, packing)
    if tokens is not None:
        by = encoded_text.tokenizer_of(home, tokenizer, end_token) if tokenizer is not None else None
        size, below = _sizes(by, vocab_size)
        train = token_shards.read(home, tokens, "data.args.tokens", below)
        test = None if test_tokens is None else token_shards.read(home, test_tokens, "data.args.test_tokens", below)
    else:
        chat = format == "chat"
        if chat:
            field = AS_JSON + ("messages" if field == "text" else field)
        train, by = encoded_text.read(home, files, field, tokenizer, end_token, chat=chat)
        test = None if test_files is None else encoded_text.read_test(home, test_files, field, by)
        size = by.vocab_size
    if test is None:
        train, test = held_out(train, test_fraction)
    trained = _windows(train, block, packing, by, tail=False)
    tested = None if test is None else _windows(test, block, packing, by, tail=True)
    return _data(trained, tested, size, block, by)


def _mixture(
    home: Path,
    sources: list[dict[str, Any]],
    test_fraction: float,
    field: str,
    tokenizer: str | None,
    end_token: str | None,
    block: int,
    packing: str,
) -> Data:
    """Several sources by weight, each of which is tested on by itself. Raises ConfigError."""
    by = encoded_text.tokenizer_of(home, tokenizer, end_token)
    trained, tested = [], {}
    for i, source in enumerate(sources):
        key = f"data.args.sources[{i}].files"
        row, _ = encoded_text.read(home, source["files"], source.get("field", field), tokenizer, end_token, key)
        train, test = held_out(row, test_fraction)
        trained.append(_windows(train, block, packing, by, tail=False))
        if test is not None:
            tested[f"source_{i}"] = _windows(test, block, packing, by, tail=True)
    mixed = mixture(trained, [source["weight"] for source in sources])
    return _data(mixed, tested or None, by.vocab_size, block, by)


def _data(
    train: Gathered, test: Gathered | dict[str, Gathered] | None, size: int, block: int, by: Tokenizer | None
) -> Data:
    by = by.inner if isinstance(by, Chat) else by
    known = {"vocab_size": size, "block": block} | ({} if by is None else {"tokenizer": by})
    return Data(train, test, facts=known, keep=None if by is None else partial(_keep, by))


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


def _windows(tokens: Tokens, block: int, packing: str, by: Tokenizer | None, tail: bool) -> Gathered:
    if packing == "contiguous":
        found = contiguous(tokens, block, tail, by)
    else:
        found = {"packed": packed, "padded": padded}[packing](tokens, block, by)
    return answers_only(found) if isinstance(by, Chat) else found


def _sizes(by: Tokenizer | None, vocab_size: int | None) -> tuple[int, int]:
    """Of the vocabulary, as models have it, and of the numbers that may stand in files. Raises ConfigError."""
    if by is None:
        assert vocab_size is not None  # by the rules
        return vocab_size, vocab_size
    if vocab_size is not None and vocab_size < by.vocab_size:
        raise ConfigError(
            f"data.args.vocab_size: got {vocab_size:,} with a tokenizer of {by.vocab_size:,} tokens, expected as many "
            f"or more; leave it out"
        )
    return vocab_size or by.vocab_size, by.vocab_size


def _keep(tokenizer: Tokenizer, folder: Path) -> None:
    try:
        tokenizer.save(folder / KEPT)
    except OSError as error:
        raise ConfigError(f"run.dir: got {folder}, which cannot be written to ({error.strerror})") from error
