"""The task of a loop of one's own, which has its loss itself."""

import torch
from torch import nn

from dist_train.data.batch import Batch
from dist_train.errors import ConfigError
from dist_train.tasks.base import Task


class OwnLoop(Task):
    """Units are samples. It has no loss and no evaluation: `dist_train.session` alone goes without them."""

    units_per_sample = 1
    evaluates = False

    def sums(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """Raises ConfigError."""
        raise ConfigError(
            "task.name: got none, which has no loss, expected a task where one is asked for its loss; give one, such "
            "as task='classification'"
        )
