"""Samples of a language model: windows of tokens, as batches of inputs, targets and, where documents are packed, positions.

Of a document of L tokens L - 1 are targets, each of which counts once an epoch. How its targets come into windows is the
kind: `contiguous` passes over documents' ends, `padded` and `packed` keep each window, or each piece of one, inside a
document.
"""

import hashlib
from collections.abc import Callable

import numpy as np
import torch

from dist_train.data.packing import REST, Packing, expanded
from dist_train.data.sets import Gathered
from dist_train.data.tokenizers import Tokenizer
from dist_train.data.tokens import Tokens
from dist_train.errors import ConfigError

IGNORED = -100  # a target that counts for nothing; torch's cross_entropy and transformers ignore the same
PADDING = 0  # the input where no token is: any valid one
SHOWN, SHOWN_PIECES = 60, 3  # characters of a piece that a description has, and pieces


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
            f"data.args.block: got {block} for a split of {len(tokens):,} tokens, expected {least:,} tokens at least; "
            f"set a smaller data.args.block, or give more text"
        )
    counted = targets if tail else n * block
    span = np.arange(block + 1)

    def gather(numbers: np.ndarray) -> dict[str, torch.Tensor]:
        places = numbers.astype(np.int64)[:, None] * block + span  # [batch, block + 1]
        outside = places > counted if n * block > counted else None
        if outside is None or not outside.any():
            found = tokens.at(places)
            return _tree(found[:, :-1], found[:, 1:])
        found = tokens.at(np.minimum(places, counted))
        return _tree(np.where(outside[:, :-1], PADDING, found[:, :-1]), np.where(outside[:, 1:], IGNORED, found[:, 1:]))

    def describe(number: int) -> str:
        first = number * block
        document = int(np.searchsorted(tokens.starts, first, side="right")) - 1
        return _described(tokens, tokenizer, [(document, first, min(first + block, counted) + 1)])

    return _split("contiguous", tokens, block, n, counted, gather, describe)


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
    targets = tokens.lengths - 1  # [documents]
    np.maximum(targets, 0, out=targets)
    counted = int(targets.sum())
    ends = np.cumsum(-(-targets // block))  # of each document's windows
    del targets
    _has_targets(counted)
    span = np.arange(block)

    def extents(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        documents = np.searchsorted(ends, numbers, side="right")
        first, end = _extents(tokens, documents)
        before = np.where(documents > 0, ends[documents - 1], 0)
        first = first + (numbers - before) * block
        return documents, first, np.minimum(end - first - 1, block)

    def gather(numbers: np.ndarray) -> dict[str, torch.Tensor]:
        _, first, lengths = extents(numbers)
        outside = span >= lengths[:, None]  # [batch, block]
        places = np.where(outside, 0, first[:, None] + span)
        return _tree(np.where(outside, PADDING, tokens.at(places)), np.where(outside, IGNORED, tokens.at(places + 1)))

    def describe(number: int) -> str:
        (document,), (first,), (length,) = extents(np.array([number]))
        return _described(tokens, tokenizer, [(document, first, first + length + 1)])

    return _split("padded", tokens, block, int(ends[-1]), counted, gather, describe)


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
    _has_targets(plan.targets)
    span = np.arange(block)

    def pieces(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        documents, runs, counts = plan.pieces(numbers)
        first, end = _extents(tokens, documents)
        first = first + np.where(runs == REST, (end - first - 1) // block, runs) * block
        return documents, first, np.minimum(end - first - 1, block), counts

    def gather(numbers: np.ndarray) -> dict[str, torch.Tensor]:
        _, first, lengths, counts = pieces(numbers)
        shape = len(numbers), block
        before = np.cumsum(lengths) - lengths  # targets in the pieces before, of all windows
        of_row = np.cumsum(counts) - counts  # the first piece of each window
        filled = np.add.reduceat(lengths, of_row)
        skipped = np.cumsum(block - filled) - (block - filled)  # padding in the windows before
        position = expanded(np.zeros_like(lengths), lengths)
        slots = np.repeat(before + np.repeat(skipped, counts), lengths) + position  # in the flat batch
        places = np.repeat(first, lengths) + position
        inputs, targets = np.full(shape, PADDING), np.full(shape, IGNORED)
        positions = span - filled[:, None]  # right for the padding, and what is written over for the rest
        inputs.reshape(-1)[slots] = tokens.at(places)
        targets.reshape(-1)[slots] = tokens.at(places + 1)
        positions.reshape(-1)[slots] = position
        return _tree(inputs, targets) | {"position_ids": torch.from_numpy(positions)}

    def describe(number: int) -> str:
        documents, first, lengths, _ = pieces(np.array([number]))
        return _described(tokens, tokenizer, list(zip(documents, first, first + lengths + 1, strict=True)))

    return _split("packed", tokens, block, plan.windows, plan.targets, gather, describe)


def _extents(tokens: Tokens, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where some documents begin and end in the whole row, int64 [documents] each."""
    last = len(tokens.starts) - 1
    ends = np.where(documents < last, tokens.starts[np.minimum(documents + 1, last)], len(tokens))
    return tokens.starts[documents], ends


def _tree(inputs: np.ndarray, targets: np.ndarray) -> dict[str, torch.Tensor]:
    return {
        "input_ids": torch.from_numpy(np.ascontiguousarray(inputs)),
        "targets": torch.from_numpy(np.ascontiguousarray(targets)),
    }


def _split(
    kind: str,
    tokens: Tokens,
    block: int,
    n: int,
    counted: int,
    gather: Callable[[np.ndarray], dict[str, torch.Tensor]],
    describe: Callable[[int], str],
) -> Gathered:
    identity = hashlib.sha256(repr((kind, block, n, tokens.identity)).encode()).hexdigest()
    waste = 1 - counted / (n * block)
    about = f"{n:,} windows of {block:,}: {counted:,} targets an epoch, {waste:.2%} padding"
    return Gathered(n, gather, identity, describe, about)


def _has_targets(count: int) -> None:
    if not count:
        raise ConfigError(
            "data.args.files: got no document of two tokens or more, expected one at least; a document's first token is "
            "no target"
        )


def _described(tokens: Tokens, tokenizer: Tokenizer | None, pieces: list[tuple[int, int, int]]) -> str:
    """The pieces of a window, each (number of the document, first token, past its last), with the start of its text."""
    told = []
    for document, first, end in pieces[:SHOWN_PIECES]:
        begins = int(tokens.starts[document])
        line = f"document {document}, tokens {first - begins} to {end - begins}"
        if tokenizer is not None:
            text = tokenizer.decode(tokens.at(np.arange(first, min(end, first + SHOWN))).tolist())
            line += f": {text[:SHOWN]!r}" + ("..." if len(text) > SHOWN or end - first > SHOWN else "")
        told.append(line)
    more = len(pieces) - SHOWN_PIECES
    return "; ".join(told) + (f"; {more} more" if more > 0 else "")
