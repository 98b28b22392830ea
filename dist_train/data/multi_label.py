"""Made-up documents with several topics each, by scikit-learn's make_multilabel_classification, no download."""

import torch

from dist_train.data.sets import Columns, Data
from dist_train.errors import ConfigError


def multi_label(
    root: str,
    download: bool,
    n: int = 2_000,
    n_test: int = 1_000,
    features: int = 20,
    classes: int = 5,
    seed: int = 0,
) -> Data:
    """Counts of words, and which of several topics a document is of.

    Args:
        root: not used.
        download: not used.
        n: training samples.
        n_test: test samples.
        features: words that are counted.
        classes: topics.
        seed: decides topics and samples.

    Raises:
        ConfigError: an argument is out of its range, or scikit-learn is not installed.
    """
    given = {"n": n, "n_test": n_test, "features": features, "classes": classes}
    for name, value in given.items():
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"data.args.{name}: got {value!r}, expected an integer of 1 or more")
    try:
        from sklearn.datasets import make_multilabel_classification
    except ImportError as error:
        raise ConfigError(
            "data.name: got multi_label without scikit-learn, expected it installed; pip install scikit-learn"
        ) from error
    sizes = {"n_samples": n + n_test, "n_features": features, "n_classes": classes}
    words, topics = make_multilabel_classification(**sizes, random_state=seed)
    inputs = torch.from_numpy(words).to(torch.float32) / max(1.0, float(words.std()))
    targets = torch.from_numpy(topics).to(torch.float32)
    train, test = (Columns((inputs[some], targets[some])) for some in (slice(0, n), slice(n, None)))
    return Data(train, test, input_shape=(features,), classes=tuple(f"topic {i}" for i in range(classes)))
