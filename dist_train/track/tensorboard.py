"""TensorBoard: scalars, the hyper-parameters with their result, and what the training images look like."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dist_train.loop.meter import Metrics
from dist_train.track.base import Course, Summary, numbers

# Sections of the config that are hyper-parameters: the others say where the run is and what it leaves.
SECTIONS = ("data", "model", "optim", "train", "backend", "compile")


class TensorBoard:
    """Event files in `RUN/tensorboard`.

    Args:
        tree: the run's config.
        folder: of the run.
        course: a viewer drops what was recorded after the step that the run goes on from, as it will come again.
        images: gives some samples of the training data, uint8 [n, 1 or 3, height, width]; None if they are no images.
    """

    name = "track.tensorboard"

    def __init__(
        self, tree: dict[str, dict[str, Any]], folder: Path, course: Course, images: Callable[[], torch.Tensor | None]
    ):
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        place = folder / "tensorboard"
        new = course.at == 0 or not place.is_dir()
        # Of the step itself all was recorded before its checkpoint was.
        self.writer = SummaryWriter(str(place), purge_step=course.at + 1 if course.at else 0)
        # add_hparams would make a run of its own for them.
        experiment, start, self.end = hparams(
            _hyper_parameters(tree), dict.fromkeys((*course.results, "train/loss"), 0.0)
        )
        if new:
            self.writer.file_writer.add_summary(experiment)
            self.writer.file_writer.add_summary(start)
            samples = images()
            if samples is not None:
                self.writer.add_images("samples", samples, 0)
        self.writer.flush()

    def log(self, metrics: Metrics, line: str | None) -> None:
        """See Tracker."""
        for name, value in numbers(metrics).items():
            self.writer.add_scalar(name, value, metrics["step"])
        self.writer.flush()  # its thread may be behind, and what comes before a checkpoint does not come again

    def finish(self, summary: Summary) -> None:
        """See Tracker."""
        if summary["status"] == "finished":
            self.writer.file_writer.add_summary(self.end)

    def close(self, code: int) -> None:
        """See Tracker."""
        self.writer.close()


def _hyper_parameters(tree: dict[str, dict[str, Any]]) -> dict[str, bool | int | float | str]:
    flat = {f"{section}.{key}": value for section in SECTIONS for key, value in tree[section].items()}
    plain = (bool, int, float, str)
    return {k: v if isinstance(v, plain) else json.dumps(v) for k, v in flat.items() if v is not None}
