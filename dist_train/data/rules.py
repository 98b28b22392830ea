"""What a data set asks of the config. Pure, and before torch is imported."""

from collections.abc import Iterator

from dist_train.config import arguments
from dist_train.config.tree import Config
from dist_train.config.values import too_small
from dist_train.data import DATASETS
from dist_train.ranks.launcher import Launcher

GIVEN = ("root", "download")  # by the package itself, to who asks, so not for data.args


def problems(config: Config, _: Launcher) -> Iterator[str]:
    """A line for every mistake."""
    data = config.data
    yield from too_small({"data.workers": (data.workers, 0)})
    given = {"data.args." + k for k in data.args}
    yield from arguments.problems(DATASETS, data.name, "data", data.args, given, GIVEN, facts=GIVEN)
    if data.workers > 0 and data.name in DATASETS and data.name != "csv_images":
        yield f"data.workers: got {data.workers}, expected 0: {data.name} is held in memory and needs no workers"
