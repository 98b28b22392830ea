"""What a regression predicts of the test data, beside what is true: some samples of all, and the worst."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from dist_train.data.batch import Batch
from dist_train.data.feed import Feed
from dist_train.data.order import share, shuffled
from dist_train.ranks import dist
from dist_train.ranks.dist import World
from dist_train.tasks.base import inputs_and_targets, tensor_of
from dist_train.tasks.measured import Measured
from dist_train.tasks.metrics import wide
from dist_train.tasks.worst import Worst, write_arrays

NAME = "predictions.npz"
POINTS = 2000  # samples, drawn from all
WORST = 24
OUTPUTS = 6  # numbers of a sample; of more, these are the first


class Predictions:
    """Watches an evaluation, batch by batch, and writes what it saw. Nothing here waits for the device before that.

    Which samples are drawn is a function of their number alone, so it is the same at every world size.

    Args:
        task: says how outputs and targets belong together, and gives the loss of each sample.
        feed: of the split.
        world: this rank's place.
    """

    def __init__(self, task: Measured, feed: Feed, world: World):
        self.task, self.is_main = task, world.is_main
        n = len(feed.split)
        self.drawn = np.sort(shuffled(np.arange(min(n, POINTS)), n, 0, 0))
        self.next = share(n, world.data_rank, world.data_size).start
        self.width = 0
        self.rows: list[torch.Tensor] = []
        self.worst = Worst(WORST)

    def __call__(self, batch: Batch, outputs: Any) -> None:
        """See Examiner."""
        outputs, targets = self.task.fitted(tensor_of(outputs), inputs_and_targets(batch.tree)[1])
        count = len(targets)
        both = torch.stack([_columns(targets), _columns(outputs)], 1)  # [batch, 2, numbers]
        self.width, both = both.shape[2], both[:, :, :OUTPUTS]
        begin, end = np.searchsorted(self.drawn, [self.next, self.next + count])
        places = torch.from_numpy(self.drawn[begin:end] - self.next).to(both.device)
        self.rows.append(both[places])
        loss = self.task.loss_of(outputs, targets, "none")
        self.worst.add(loss, self.next, lambda worst: {"both": both[worst]})
        self.next += count

    def write(self, folder: Path) -> None:
        """Writes predictions.npz; see the README. Collective; rank 0 writes."""
        drawn = np.concatenate(dist.gather_data(torch.cat(self.rows).cpu().numpy()))
        worst = self.worst.over_ranks()
        if not self.is_main:
            return
        arrays = {"outputs": np.array(self.width), "index": self.drawn, "true": drawn[:, 0], "predicted": drawn[:, 1]}
        arrays |= {"worst_index": worst["index"], "worst_loss": worst["loss"]}
        arrays |= {"worst_true": worst["both"][:, 0], "worst_predicted": worst["both"][:, 1]}
        write_arrays(folder / NAME, arrays)


def _columns(values: torch.Tensor) -> torch.Tensor:
    """[batch, numbers], in the widest format."""
    return (values.flatten(1) if values.dim() > 1 else values.unsqueeze(1)).to(wide(values.device))
