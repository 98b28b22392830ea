"""Progression of diabetes in 442 patients, from scikit-learn, no download: a regression.

Source: B. Efron, T. Hastie, I. Johnstone, R. Tibshirani, "Least Angle Regression", Annals of Statistics, 2004.
"""

import torch

from dist_train.data.sets import Columns, Data
from dist_train.errors import ConfigError


def diabetes(root: str, download: bool) -> Data:
    """Ten measurements of a patient, and the progression a year later, each with mean 0 and deviation 1 over the 354
    patients to train on; every fifth, 88 in all, is to test. Needs neither `root` nor
    `download`. Errors are in deviations of the target: 1 is about 77 of the original units."""
    try:
        from sklearn.datasets import load_diabetes
    except ImportError as error:
        raise ConfigError(
            "data.name: got diabetes without scikit-learn, expected it installed; pip install scikit-learn"
        ) from error
    found = load_diabetes(scaled=False)
    inputs, targets = (torch.from_numpy(one).to(torch.float64) for one in (found.data, found.target))
    test = torch.arange(len(targets)) % 5 == 4
    inputs, targets = _scaled(inputs, ~test), _scaled(targets, ~test)
    return Data(Columns((inputs[~test], targets[~test])), Columns((inputs[test], targets[test])), input_shape=(10,))


def _scaled(values: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    """Values with mean 0 and deviation 1 over some of them, float32."""
    return ((values - values[of].mean(0)) / values[of].std(0)).to(torch.float32)
