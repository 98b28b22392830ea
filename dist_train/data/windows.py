"""Samples of a language model: windows of tokens, as inputs, targets and, where documents are packed, positions.

Of a document of L tokens L - 1 are targets, each of which counts once an epoch. How they come into windows is the kind:
`contiguous` windows go on over the ends of documents; `padded` ones are of one document each, `packed` ones of several.
"""

import hashlib
from collections.abc import Callable

import numpy as np
import torch

from dist_train.data.packing import REST, Packing
from dist_train.data.sets import Gathered
from dist_train.data.tokenizer_base import Tokenizer
from dist_train.data.tokens import Tokens, expanded
from dist_train.errors import ConfigError
from dist_train.models.chunked_loss import IGNORED

PADDING = 0  # the input where no token is: any valid one
SHOWN, SHOWN_PIECES = 60, 3  # characters of a piece that a description has, and pieces

# Of the pieces of some windows, one after another: the document of each, the place of its first token in the whole row,
# and its targets, int64 [pieces] each; and how many pieces each window has, int64 [windows].
Pieces = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def contiguous(tokens: Tokens, block: int, tail: bool = False, tokenizer: Tokenizer | None = None) -> Gathered:
    """Windows that follow each other over the whole row: window i has the targets i * block + 1 to (i + 1) * block.

    Neighbours share a token, which is the last target of one and the first input of the next; so each token but the
    first is a target once. Memory and seek are O(1) in the number of tokens.

    Args:
        tokens: of the split.
        block: targets of a window.
        tail: whether an incomplete window at the end is padded, as a test split needs; else it is left out.
        tokenizer: makes text of the windows that are described.

    Returns:
        A split of {"input_ids", "targets"}, int64 [batch, block] each.

    Raises:
        ConfigError: there is no window.
    """
    targets = len(tokens) - 1
    n = -(-targets // block) if tail else targets // block
    if n < 1:
        least = 2 if tail else block + 1
        raise ConfigError(
            f"data.args.block: got {block:,} for a split of {len(tokens):,} tokens, expected {least:,} tokens at "
            f"least; set a smaller data.args.block, or give more text"
        )

    def pieces(numbers: np.ndarray) -> Pieces:
        first = numbers * block
        return numbers, first, np.minimum(targets - first, block), np.ones_like(numbers)

    def describe(number: int) -> str:
        _, first, lengths, _ = pieces(np.array([number]))
        document = np.searchsorted(tokens.starts, first, side="right") - 1
        return _described(tokens, tokenizer, document, first, lengths)

    return _split("contiguous", tokens, block, n, min(targets, n * block), pieces, describe)


def padded(tokens: Tokens, block: int, tokenizer: Tokenizer | None = None) -> Gathered:
    """Windows of one document each, or of a run of `block` targets of it; the rest of a window is padding.

    Memory is 8 bytes a document; a window is found in O(log documents).

    Args:
        tokens: of the split.
        block: targets of a window, at most.
        tokenizer: makes text of the windows that are described.

    Returns:
        A split of {"input_ids", "targets"}, int64 [batch, block] each. There are no positions: padding lies behind what
        counts, where causal attention does not look.

    Raises:
        ConfigError: there is no window.
    """
    targets = np.maximum(tokens.lengths - 1, 0)
    counted = _some(int(targets.sum()))
    windows = -(-targets // block)
    first_window = np.cumsum(windows) - windows  # of each document
    n = int(windows.sum())
    del targets, windows

    def pieces(numbers: np.ndarray) -> Pieces:
        documents = np.searchsorted(first_window, numbers, side="right") - 1
        first, ends = _extents(tokens, documents)
        first = first + (numbers - first_window[documents]) * block
        return documents, first, np.minimum(ends - first - 1, block), np.ones_like(numbers)

    return _split("padded", tokens, block, n, counted, pieces, _describe(tokens, tokenizer, pieces))


def packed(tokens: Tokens, block: int, tokenizer: Tokenizer | None = None) -> Gathered:
    """Windows of several documents each, by one plan for all ranks: see `Packing`.

    Args:
        tokens: of the split.
        block: targets of a window, at most.
        tokenizer: makes text of the windows that are described.

    Returns:
        A split of {"input_ids", "targets", "position_ids"}, int64 [batch, block] each. Positions start anew at 0 with
        each piece of a document, and with the padding at the end of a window. They alone say where attention ends.

    Raises:
        ConfigError: there is no window.
    """
    plan = Packing.of(tokens.lengths, block)
    counted = _some(plan.targets)

    def pieces(numbers: np.ndarray) -> Pieces:
        documents, runs, counts = plan.pieces(numbers)
        first, ends = _extents(tokens, documents)
        first = first + np.where(runs == REST, (ends - first - 1) // block, runs) * block
        return documents, first, np.minimum(ends - first - 1, block), counts

    describe = _describe(tokens, tokenizer, pieces)
    return _split("packed", tokens, block, plan.windows, counted, pieces, describe, positions=True)


def _split(
    kind: str,
    tokens: Tokens,
    block: int,
    n: int,
    counted: int,
    pieces: Callable[[np.ndarray], Pieces],
    describe: Callable[[int], str],
    positions: bool = False,
) -> Gathered:
    """The split of `n` windows, of whose targets so many count."""
    span = np.arange(block)

    def gather(numbers: np.ndarray) -> dict[str, torch.Tensor]:
        _, first, lengths, counts = pieces(numbers)
        found = tokens.runs(first, lengths + 1)
        if len(found) == len(numbers) * (block + 1) and len(first) == len(numbers):  # each window is one run
            rows = found.reshape(-1, block + 1)
            tree = {"input_ids": rows[:, :-1], "targets": rows[:, 1:]}
            if positions:
                tree["position_ids"] = np.tile(span, (len(rows), 1))
        else:
            last = np.cumsum(lengths + 1) - 1
            filled = np.add.reduceat(lengths, np.cumsum(counts) - counts)[:, None]
            inside = span < filled  # [batch, block]: pieces lie one after another, padding behind them
            tree = {"input_ids": np.full(inside.shape, PADDING), "targets": np.full(inside.shape, IGNORED)}
            tree["input_ids"][inside] = np.delete(found, last)
            tree["targets"][inside] = np.delete(found, last - lengths)
            if positions:
                tree["position_ids"] = span - filled  # right for padding
                tree["position_ids"][inside] = expanded(np.zeros_like(lengths), lengths)
        return {name: torch.from_numpy(np.ascontiguousarray(leaf)) for name, leaf in tree.items()}

    identity = hashlib.sha256(repr((kind, block, n, tokens.identity)).encode()).hexdigest()
    waste = 1 - counted / (n * block)
    about = f"{n:,} windows of {block:,} tokens, {counted:,} targets, {waste:.2%} padding"
    return Gathered(n, gather, identity, describe, about)


def _extents(tokens: Tokens, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where some documents begin and end in the whole row, int64 [documents] each."""
    last = len(tokens.starts) - 1
    ends = np.where(documents < last, tokens.starts[np.minimum(documents + 1, last)], len(tokens))
    return tokens.starts[documents], ends


def _some(targets: int) -> int:
    """The same number. Raises ConfigError where it is none."""
    if not targets:
        raise ConfigError(
            "data.args.files: got no document of two tokens or more, expected one at least; the first token of a "
            "document is no target"
        )
    return targets


def _describe(
    tokens: Tokens, tokenizer: Tokenizer | None, pieces: Callable[[np.ndarray], Pieces]
) -> Callable[[int], str]:
    def describe(number: int) -> str:
        documents, first, lengths, _ = pieces(np.array([number]))
        return _described(tokens, tokenizer, documents, first, lengths)

    return describe


def _described(
    tokens: Tokens, tokenizer: Tokenizer | None, documents: np.ndarray, first: np.ndarray, lengths: np.ndarray
) -> str:
    """The pieces of a window, with the start of the text of each."""
    told = []
    for document, start, length in zip(documents[:SHOWN_PIECES], first, lengths, strict=False):
        place = start - tokens.starts[document]
        line = f"document {document}, tokens {place} to {place + length}"
        if tokenizer is not None:
            text = tokenizer.decode(tokens.at(np.arange(start, start + min(length + 1, SHOWN))).tolist())
            line += f": {text[:SHOWN]!r}" + ("..." if len(text) > SHOWN or length >= SHOWN else "")
        told.append(line)
    more = len(documents) - SHOWN_PIECES
    return "; ".join(told) + (f"; {more} more" if more > 0 else "")
