"""Handwritten digits that ship with scikit-learn: 1,797 scans of 8x8 pixels, no download.

Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998 (its test part).
"""

import gzip
import importlib.util
from pathlib import Path

import numpy as np
import torch

from dist_train.data.sets import Data, InMemory
from dist_train.errors import ConfigError


def digits(root: str, download: bool) -> Data:
    """1,438 samples to train on; every fifth scan, 359 in all, to test. Needs neither `root` nor `download`."""
    spec = importlib.util.find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise ConfigError("data.name: got digits without scikit-learn, expected it installed; pip install scikit-learn")
    # Its file, not its loader: importing scikit-learn takes longer than training on these.
    with gzip.open(Path(spec.origin).parent / "datasets/data/digits.csv.gz", "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)  # [1797, 64 pixels of 0..16 and the class]
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
