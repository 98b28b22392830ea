"""From sample numbers to batches on the device. Two ways under one order: data in memory, and data in files."""

import random
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset, default_collate

from dist_train.data.sets import Data, FromFiles, InMemory
from dist_train.errors import ConfigError

Batch = tuple[torch.Tensor, torch.Tensor]  # inputs [batch, *input_shape], targets [batch] or [batch, classes]

# Data in memory moves to the device if it leaves most of the device's free memory for the model.
DEVICE_SHARE = 0.25


class Feed:
    """Batches of one split for one rank.

    Calling it with the sample numbers of each batch, in order, gives the batches in that order.

    Args:
        split: the samples.
        data: the data set that the split belongs to.
        device: where batches are wanted.
        dtype: type of the inputs.
        normalize: subtract data.mean and divide by data.std.
        one_hot: targets as vectors.
        workers: DataLoader processes, for a split from files.
        seed: decides random transforms, together with epoch and sample.
    """

    def __init__(
        self,
        split: InMemory | FromFiles,
        data: Data,
        device: torch.device,
        dtype: torch.dtype,
        normalize: bool,
        one_hot: bool,
        workers: int = 0,
        seed: int = 0,
    ):
        self.split, self.device, self.dtype, self.one_hot = split, device, dtype, one_hot
        self.input_shape, self.classes = data.input_shape, len(data.classes)
        self.workers, self.seed = workers, seed
        self.shift, self.scale = self._affine(data, normalize)
        if isinstance(split, InMemory):
            home = device if _fits(split, device) else torch.device("cpu")
            self.images, self.labels = split.images.to(home), split.labels.to(home)

    def __call__(self, batches: Iterable[np.ndarray], epoch: int = 0) -> Iterator[Batch]:
        """The batches with these samples, each an int64 array, empty ones included."""
        if isinstance(self.split, InMemory):
            return self._from_memory(batches)
        return self._from_files(batches, epoch)

    def _from_memory(self, batches: Iterable[np.ndarray]) -> Iterator[Batch]:
        for batch in batches:
            index = torch.from_numpy(batch).to(self.images.device, non_blocking=True)
            yield self._finish(self.images[index], self.labels[index])

    def _from_files(self, batches: Iterable[np.ndarray], epoch: int) -> Iterator[Batch]:
        assert isinstance(self.split, FromFiles)
        loader = DataLoader(
            _Batches(self.split.dataset, self.seed, epoch, self.input_shape),
            sampler=batches,  # type: ignore[arg-type]  (an item of the data set is a whole batch)
            batch_size=None,
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            # Workers that fork from a process with a device context, or with gloo's threads, can hang.
            multiprocessing_context="spawn" if self.workers and self.device.type != "cpu" else None,
        )
        for item in loader:
            if isinstance(item, str):
                raise ConfigError(item)
            yield self._finish(*item)

    def _finish(self, images: torch.Tensor, labels: torch.Tensor) -> Batch:
        images = images.to(self.device, non_blocking=True)
        labels = labels.to(self.device, non_blocking=True)
        inputs = images.to(self.dtype)
        if self.shift is not None:
            inputs = inputs.sub_(self.shift)
        if images.dtype == torch.uint8 or self.shift is not None:
            inputs = inputs.div_(self.scale)
        if self.one_hot and labels.dim() == 1:
            labels = F.one_hot(labels, self.classes).to(self.dtype)
        return inputs, labels

    def _affine(self, data: Data, normalize: bool) -> tuple[torch.Tensor | None, torch.Tensor | float]:
        """(pixel - shift) / scale is the input: pixel / 255, then minus mean and divided by std."""
        full = 255.0 if _gives_uint8(self.split) else 1.0
        if not normalize or (set(data.mean) == {0.0} and set(data.std) == {1.0}):
            return None, full
        shape = [-1] + [1] * (len(data.input_shape) - 1)  # a number per channel
        shift, scale = (torch.tensor(v, dtype=torch.float64).mul(full).view(shape) for v in (data.mean, data.std))
        return shift.to(self.device, self.dtype), scale.to(self.device, self.dtype)


class _Batches(Dataset[Any]):
    """An item is a whole batch: collated in the worker, empty if the rank's share is, a message if a sample is bad."""

    def __init__(self, dataset: Dataset[Any], seed: int, epoch: int, input_shape: tuple[int, ...]):
        self.dataset, self.seed, self.epoch, self.input_shape = dataset, seed, epoch, input_shape

    def __getitem__(self, batch: np.ndarray) -> tuple[torch.Tensor, torch.Tensor] | str:
        if len(batch) == 0:
            return torch.empty(0, *self.input_shape), torch.empty(0, dtype=torch.int64)
        kept = random.getstate(), np.random.get_state(), torch.get_rng_state()
        try:
            images, labels = default_collate([self._sample(int(i)) for i in batch])
        except ConfigError as error:
            return str(error)
        finally:  # without workers this is the training process, whose generators are the model's
            random.setstate(kept[0])
            np.random.set_state(kept[1])
            torch.set_rng_state(kept[2])
        return images, labels

    def _sample(self, index: int) -> tuple[torch.Tensor, Any]:
        """A sample whose random transforms depend on (seed, epoch, index): not on rank, world size or worker."""
        key = np.random.SeedSequence([self.seed, self.epoch, index]).generate_state(1, np.uint64)[0]
        random.seed(int(key))
        np.random.seed(int(key) % 2**32)
        torch.default_generator.manual_seed(int(key))  # not torch.manual_seed: that resets the device's as well
        return self.dataset[index]


def _gives_uint8(split: InMemory | FromFiles) -> bool:
    return isinstance(split, InMemory) or split.dataset[0][0].dtype == torch.uint8


def _fits(split: InMemory, device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return split.images.nbytes + split.labels.nbytes < DEVICE_SHARE * free
