"""What a task asks of the config. Pure, and before torch is imported."""

from collections.abc import Iterator

from dist_train.config.tree import Config
from dist_train.config.values import no_share
from dist_train.ranks.launcher import Launcher


def problems(config: Config, _: Launcher) -> Iterator[str]:
    """A line for every mistake."""
    yield from no_share({"train.label_smoothing": config.train.label_smoothing})
    loss, one_hot = config.train.loss, config.data.one_hot
    if loss == "mse" and not one_hot:
        yield "train.loss: got mse with data.one_hot false, expected one-hot targets; add --data.one_hot true"
    if loss == "nll" and one_hot:
        yield "train.loss: got nll with data.one_hot true, expected class numbers; add --data.one_hot false"
    smoothing = config.train.label_smoothing
    if smoothing and loss != "cross_entropy":
        yield f"train.label_smoothing: got {smoothing} with train.loss {loss}, which does not have it; leave it out"
