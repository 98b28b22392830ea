"""Handwritten digits that ship with scikit-learn: 1,797 scans of 8x8 pixels, no download.

Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998 (its test part).
"""

import contextlib
import gzip
import importlib.util
from pathlib import Path

import numpy as np
import torch

from dist_train.data.sets import Data, InMemory
from dist_train.errors import ConfigError

# Where scikit-learn has them, below its own folder.
FILE = "datasets/data/digits.csv.gz"
SHAPE = (1797, 65)


def digits(root: str, download: bool) -> Data:
    """1,438 samples to train on; every fifth scan, 359 in all, to test. Needs neither `root` nor `download`."""
    table = _table()
    images = torch.from_numpy((table[:, :64].astype(np.uint16) * 255 // 16).astype(np.uint8)).view(-1, 1, 8, 8)
    labels = torch.from_numpy(table[:, 64].astype(np.int64))
    test = torch.arange(len(labels)) % 5 == 4
    return Data(
        InMemory(images[~test], labels[~test]),
        InMemory(images[test], labels[test]),
        input_shape=(1, 8, 8),
        classes=tuple("0123456789"),
        mean=(0.3050,),
        std=(0.3764,),
    )


def _table() -> np.ndarray:
    """64 pixels of 0 to 16, and the class: uint8 [1797, 65]. Raises ConfigError."""
    spec = importlib.util.find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise ConfigError("data.name: got digits without scikit-learn, expected it installed; pip install scikit-learn")
    # Its file, not its loader: importing scikit-learn takes longer than training on these.
    with contextlib.suppress(OSError, EOFError, ValueError), gzip.open(Path(spec.origin).parent / FILE, "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
        if table.shape == SHAPE:
            return table
    from sklearn.datasets import load_digits  # a version that keeps them elsewhere

    found = load_digits()
    return np.column_stack([found.data, found.target]).astype(np.uint8)
