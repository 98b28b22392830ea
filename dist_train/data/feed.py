"""From sample numbers to batches on the device. Two ways under one order: data in memory, and data in files."""

import pickle
import warnings
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from dist_train.data.generators import sendable
from dist_train.data.reader import Reader
from dist_train.data.sets import Data, FromFiles, InMemory
from dist_train.data.workers import begin, context, ended, not_handed_over, not_started
from dist_train.errors import ConfigError

Batch = tuple[torch.Tensor, torch.Tensor]  # inputs [batch, *input_shape], targets [batch] or [batch, classes]

# Data in memory moves to the device if it leaves most of the device's free memory for the model.
DEVICE_SHARE = 0.25
# Samples that are gathered at once from memory, if the batches are smaller.
GATHERED = 512
WHITE = 255.0


class Feed:
    """Batches of one split for one rank.

    Calling it with the sample numbers of each batch, in order, gives the batches in that order.

    Args:
        split: the samples.
        data: the data set that the split belongs to.
        device: where batches are wanted.
        dtype: type of the inputs, and of targets that are vectors.
        normalize: subtract data.mean and divide by data.std.
        one_hot: targets as vectors.
        workers: DataLoader processes, for a split from files. They end with the iterator that a call gives.
        seed: decides random transforms, together with epoch and sample.
        loss: train.loss, which decides what targets that are vectors may be.

    Raises:
        ConfigError: the first sample of a split from files is bad.
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
        loss: str = "mse",
    ):
        self.split, self.device, self.dtype, self.one_hot = split, device, dtype, one_hot
        self.classes, self.workers = len(data.classes), workers
        self.numbers = torch.arange(self.classes, device=device)
        if isinstance(split, InMemory):
            home = device if _fits(split, device) else torch.device("cpu")
            self.images, self.labels = split.images.to(home), split.labels.to(home)
            pixels = torch.uint8
        else:
            self.reader = Reader.of(split, seed, tuple(data.input_shape), self.classes, loss)
            pixels = self.reader.empty[0].dtype
        self.affine = self._affine(data, normalize, WHITE if pixels == torch.uint8 else 1.0)

    def __call__(self, batches: Iterable[np.ndarray], epoch: int = 0) -> Iterator[Batch]:
        """The batches with these samples, each given as an int64 array, empty ones included.

        Raises:
            ConfigError: when the iterator comes to a bad sample.
        """
        if isinstance(self.split, InMemory):
            return self._from_memory(batches)
        return self._from_files(batches, epoch)

    @property
    def resident(self) -> bool:
        """Whether all of the split is on the device."""
        return isinstance(self.split, InMemory) and self.images.device == self.device

    def gather(self, index: torch.Tensor) -> Batch:
        """The batch with these samples of a split in memory, where the index, int64 [batch], is on the device that the
        split is on."""
        # index_select copies whole rows; indexing with [] goes through them number by number.
        return self._finish(self.images.index_select(0, index), self.labels.index_select(0, index))

    def of(self, samples: np.ndarray) -> Batch:
        """The batch with these samples, int64 [batch], read in this process.

        Raises:
            ConfigError: one of them is bad.
        """
        if isinstance(self.split, InMemory):
            return self.gather(torch.from_numpy(samples).to(self.images.device))
        return self._finish(*self.reader.read(samples))

    def pixels(self, samples: np.ndarray) -> torch.Tensor:
        """These samples as the data set has them, on the CPU: uint8 or float [samples, *input_shape].

        Raises:
            ConfigError: one of them is bad.
        """
        if isinstance(self.split, InMemory):
            return self.split.images[torch.from_numpy(samples)]
        return self.reader.read(samples)[0]

    def _from_memory(self, batches: Iterable[np.ndarray]) -> Iterator[Batch]:
        for several in _at_once(batches):
            index = torch.from_numpy(np.concatenate(several)).to(self.images.device, non_blocking=True)
            sizes = [len(batch) for batch in several]
            inputs, labels = (gathered.split(sizes) for gathered in self.gather(index))
            for batch, targets in zip(inputs, labels, strict=True):
                yield batch.detach(), targets  # a model may change its input, which is no part of the others then

    def _from_files(self, batches: Iterable[np.ndarray], epoch: int) -> Iterator[Batch]:
        with ended() if self.workers else nullcontext():
            items = self._items(batches, epoch)
            try:
                for item in items:
                    if isinstance(item, str):
                        raise ConfigError(item)
                    yield self._finish(*item)
            except RuntimeError as error:
                refusal = not_handed_over(error, self.workers)
                if refusal is None:
                    raise
                raise refusal from error
            finally:
                del items  # which ends the workers; the traceback of an error would hold it, and so them

    def _items(self, batches: Iterable[np.ndarray], epoch: int) -> Iterator[Any]:
        sendable()
        loader = DataLoader(
            replace(self.reader, epoch=epoch),
            sampler=batches,  # type: ignore[arg-type]  (an item of the data set is a whole batch)
            batch_size=None,
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # it draws a number for each epoch: not from the training's generator
            multiprocessing_context=context(self.reader.dataset, self.workers) if self.workers else None,
            worker_init_fn=begin,
        )
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Got pickle error")  # the line below says it
                return iter(loader)
        except OSError as error:
            raise not_started(error, self.workers) from error
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ConfigError(
                f"data.workers: got {self.workers}, but the data set cannot be sent to worker processes: {error}; "
                f"define what it uses at the top of a module, or --data.workers 0"
            ) from error

    def _finish(self, images: torch.Tensor, labels: torch.Tensor) -> Batch:
        images = images.to(self.device, non_blocking=True)
        labels = labels.to(self.device, non_blocking=True)
        inputs = images.to(self.dtype)
        if self.affine is not None:
            shift, factor = self.affine
            inputs = inputs.sub_(shift).mul_(factor)
        elif images.dtype == torch.uint8:
            inputs = inputs.div_(WHITE)  # as ToTensor does, to the last bit
        if self.one_hot and labels.dim() == 1:
            labels = labels.unsqueeze(1) == self.numbers  # F.one_hot first reads the labels' range
        return inputs, labels.to(self.dtype) if labels.dim() == 2 else labels

    def _affine(self, data: Data, normalize: bool, white: float) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(pixel - shift) * factor is the input: pixel / white, then minus mean and divided by std. None where there
        is nothing to subtract."""
        if not normalize or (set(data.mean) == {0.0} and set(data.std) == {1.0}):
            return None
        shape = [-1] + [1] * (len(data.input_shape) - 1)  # a number per channel
        shift, scale = (torch.tensor(v, dtype=torch.float64).mul(white).view(shape) for v in (data.mean, data.std))
        return shift.to(self.device, self.dtype), scale.reciprocal().to(self.device, self.dtype)


def _at_once(batches: Iterable[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """Batches in groups that are gathered together: a gather has a price of its own, which small batches would pay at
    every step."""
    several: list[np.ndarray] = []
    samples = 0
    for batch in batches:
        several.append(batch)
        samples += len(batch)
        if samples >= GATHERED or len(several) >= GATHERED:
            yield several
            several, samples = [], 0
    if several:
        yield several


def _fits(split: InMemory, device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return split.images.nbytes + split.labels.nbytes < DEVICE_SHARE * free
