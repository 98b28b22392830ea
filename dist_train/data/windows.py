"""Samples of tokens: windows of a fixed length over a corpus."""

import math
from typing import Any

import numpy as np
import torch

from dist_train.data.sets import Gathered
from dist_train.data.tokens import Tokens

IGNORED = -100  # a target that does not count, as torch's cross_entropy has it


def contiguous(tokens: Tokens, block: int, tail: bool) -> Gathered:
    """Windows that follow each other: each token of the corpus but the first is the target of one place in one window.

    Args:
        tokens: of the corpus, two at least.
        block: targets of a window.
        tail: whether the last window may have fewer; it is padded then. Without it, those tokens are left out.
    """
    targets = len(tokens) - 1
    count = math.ceil(targets / block) if tail else targets // block
    places = np.arange(block + 1)

    def gather(numbers: np.ndarray) -> dict[str, Any]:
        at = numbers[:, None] * block + places  # [batch, block + 1]
        found = tokens.at(np.minimum(at, targets))
        inputs, following = found[:, :-1].copy(), found[:, 1:].copy()
        following[at[:, 1:] > targets] = IGNORED
        return {"input_ids": torch.from_numpy(inputs), "targets": torch.from_numpy(following)}

    def describe(number: int) -> str:
        return f"tokens {number * block:,} to {min((number + 1) * block, targets):,}"

    return Gathered(count, gather, f"{tokens.identity} contiguous {block} {tail}", describe)
