"""Small data sets of tokens, as `data.name: text` gives them: apart from the tests, so that the workers can import
them by name."""

import numpy as np
import torch

from dist_train.data.sets import Data, Gathered
from dist_train.data.tokenizers import Bytes

IGNORED, BLOCK = -100, 12
NAMES = ("input_ids", "targets", "position_ids")


def packed(root: str, download: bool, n: int = 44, n_test: int = 13, block: int = BLOCK, starts: str = "all") -> Data:
    """Windows of short documents, ragged: a third ends in padding, and the last token of a document has no next one.

    Args:
        root: not used.
        download: not used.
        n: training samples.
        n_test: test samples.
        block: tokens of each.
        starts: all: position_ids say where each document begins; none: there are none, and nothing is padded.
    """
    made = []
    for seed, count in enumerate((n, n_test)):
        tree = _windows(np.random.default_rng(seed), count, block)
        made.append(_split(tree if starts == "all" else _whole(tree), count))
    return Data(*made, facts={"vocab_size": Bytes.vocab_size, "block": block, "tokenizer": Bytes()})


def _split(tree: dict[str, np.ndarray], count: int) -> Gathered:
    identity = str({name: value.tobytes() for name, value in tree.items()})
    return Gathered(count, lambda ids: {k: torch.from_numpy(v[ids]) for k, v in tree.items()}, identity)


def _windows(draw: np.random.Generator, count: int, block: int) -> dict[str, np.ndarray]:
    tree = {name: np.zeros((count, block), np.int64) for name in NAMES}
    tree["targets"][:] = IGNORED
    for i in range(count):
        at, end = 0, block if i % 3 else block - 1 - i % 5
        while at < end:
            length = min(int(draw.integers(2, 7)), end - at)
            text = (draw.integers(97, 101) + np.arange(length) * draw.integers(1, 3)) % Bytes.vocab_size
            tree["input_ids"][i, at : at + length] = text
            tree["targets"][i, at : at + length - 1] = text[1:]
            tree["position_ids"][i, at : at + length] = np.arange(length)
            at += length
    return tree


def _whole(tree: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same tokens as one document, and a token after each."""
    ids = tree["input_ids"]
    return {"input_ids": ids, "targets": np.concatenate([ids[:, 1:], ids[:, :1]], 1)}
