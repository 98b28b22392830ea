"""From sample numbers to batches on the device. Two ways under one order: data in memory, and data in files."""

import copy
import pickle
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from dist_train.data.batch import Batch, flatten, leaves_of, mapped, names_of
from dist_train.data.batch_transforms import BatchTransforms
from dist_train.data.generators import sendable
from dist_train.data.order import Plan
from dist_train.data.reader import Reader
from dist_train.data.sets import Columns, Data, Gathered, Samples, Split
from dist_train.data.workers import begin, context, ended, not_handed_over, not_started
from dist_train.errors import ConfigError

# Data in memory moves to the device if it leaves most of the device's free memory for the model.
DEVICE_SHARE = 0.25
# Samples that are gathered at once from memory, if the batches are smaller.
GATHERED = 512
GATHERED_BYTES = 8 << 20  # and no more than this, of samples that are gathered by a function
WHITE = 255.0
STAND_IN = 2  # samples: a norm over a batch takes no single one


class Feed:
    """Batches of one split for one rank.

    Calling it with the sample numbers of each batch, in order, gives the batches in that order.

    Args:
        split: the samples.
        data: the data set that the split belongs to.
        device: where batches are wanted.
        dtype: type of all floats.
        normalize: subtract data.mean from the inputs of pairs, and divide them by data.std.
        one_hot: class numbers as vectors.
        workers: DataLoader processes, for a split from files. They end with the iterator that a call gives.
        seed: decides random transforms, together with epoch and sample.
        loss: of a task of classes, which decides what targets that are vectors may be.
        transforms: what is done to the pairs of the batches of `steps`.

    Raises:
        ConfigError: the first sample of a split from files is bad; or there are transforms, and samples are no pairs.
    """

    def __init__(
        self,
        split: Split,
        data: Data,
        device: torch.device,
        dtype: torch.dtype,
        normalize: bool,
        one_hot: bool,
        workers: int = 0,
        seed: int = 0,
        loss: str | None = None,
        transforms: BatchTransforms | None = None,
    ):
        self.split, self.device, self.dtype, self.one_hot = split, device, dtype, one_hot
        self.classes, self.workers = len(data.classes), workers
        self.numbers = torch.arange(self.classes, device=device)
        self.transforms = transforms
        self.before = 0 if transforms is None else transforms.before
        self.home, self.at_once = torch.device("cpu"), GATHERED
        if isinstance(split, Columns):
            self.home = device if _fits(split, device) else self.home
            self.columns = [leaf.to(self.home) for leaf in split.leaves]
            tree = split.tree
            self.rebuild = flatten(tree)[1]
        elif isinstance(split, Gathered):
            tree = split.gather(np.zeros(1, np.int64))
            sample_bytes = sum(leaf.nbytes for leaf in leaves_of(tree))
            self.at_once = max(1, min(GATHERED, GATHERED_BYTES // max(1, sample_bytes)))
            self.rebuild = flatten(tree)[1]
        else:
            self.reader, tree = Reader.of(split, data, seed, loss)
        # Of a pair, what the model takes: the one leaf that may be pixels. And its target.
        self.paired = isinstance(tree, (tuple, list)) and len(tree) == 2 and isinstance(tree[0], torch.Tensor)
        self.pixels = self.paired and tree[0].dtype == torch.uint8
        self.affine = self._affine(data, normalize, WHITE if self.pixels else 1.0) if self.paired else None
        if transforms is not None and not (self.paired and isinstance(tree[1], torch.Tensor)):
            raise ConfigError(
                f"data.batch_transforms: got samples of {names_of(tree)}, expected pairs of two tensors, input and "
                f"target; leave it out, or use data.pair for samples that are dicts"
            )

    def __call__(self, batches: Iterable[np.ndarray], epoch: int = 0) -> Iterator[Batch]:
        """The batches with these samples, each given as an int64 array; a stand-in for one without any.

        Raises:
            ConfigError: when the iterator comes to a bad sample.
        """
        return self._batches(batches, epoch, None)

    def steps(self, plan: Plan, epoch: int = 0, first: int = 0) -> Iterator[Batch]:
        """The micro-batches of a rank from a step to the end of an epoch, as they are trained on.

        Args:
            plan: of the rank.
            epoch: counts from 0.
            first: step of the epoch.

        Raises:
            ConfigError: when the iterator comes to a bad sample.
        """
        return self._batches(plan.indices(epoch, first, self.before), epoch, self.transforms)

    def share(self, plan: Plan, epoch: int, step: int) -> Iterator[Batch]:
        """The micro-batches of one step of a rank, as they are trained on, read in this process.

        Args:
            plan: of that rank.
            epoch: counts from 0.
            step: of the epoch.

        Raises:
            ConfigError: when the iterator comes to a bad sample.
        """
        here = copy.copy(self)
        here.workers = 0  # to start some would take longer than to read
        batches = islice(plan.indices(epoch, step, self.before), plan.micro_batches(step))
        return here._batches(batches, epoch, self.transforms)

    def _batches(
        self, batches: Iterable[np.ndarray], epoch: int, transforms: BatchTransforms | None
    ) -> Iterator[Batch]:  # fmt: skip
        if isinstance(self.split, Samples):
            return self._from_files(batches, epoch, transforms)
        return self._from_memory(batches, epoch, transforms)

    @property
    def resident(self) -> bool:
        """Whether all of the split is on the device."""
        return isinstance(self.split, Columns) and self.home == self.device

    def gather(self, index: torch.Tensor) -> Batch:
        """The batch with these samples of a split in memory, where the index, int64 [batch], is on the device that the
        split is on."""
        return Batch(self.rebuild(self._gathered(index)), index, len(index))

    def of(self, samples: np.ndarray) -> Batch:
        """The batch with these samples, int64 [batch], read in this process; with the transforms of training, in which
        it is taken for a global batch.

        Raises:
            ConfigError: one of them is bad.
        """
        read = samples[np.arange(-self.before, len(samples)) % len(samples)] if self.before else samples
        if isinstance(self.split, Samples):
            leaves, rebuild = flatten(self.reader.read(read))
            leaves = self._finish(leaves)
        else:
            leaves, rebuild = self._gathered(torch.from_numpy(read).to(self.home)), self.rebuild
        if self.transforms is not None:
            leaves = list(self.transforms(*leaves, read, 0))
        return Batch(rebuild(leaves), torch.from_numpy(samples), len(samples))

    def read(self, samples: np.ndarray) -> Any:
        """The tree of these samples, as the data set has it, on the CPU.

        Raises:
            ConfigError: one of them is bad.
        """
        if isinstance(self.split, Columns):
            index = torch.from_numpy(samples)
            return mapped(self.split.tree, lambda leaf: leaf[index])
        return self.split.gather(samples) if isinstance(self.split, Gathered) else self.reader.read(samples)

    def inputs(self, samples: np.ndarray) -> torch.Tensor:
        """What a model takes of these samples, as the data set has it, on the CPU: the first of each pair.

        Raises:
            ConfigError: one of them is bad.
        """
        assert self.paired
        return leaves_of(self.read(samples))[0]

    def _from_memory(
        self, batches: Iterable[np.ndarray], epoch: int, transforms: BatchTransforms | None
    ) -> Iterator[Batch]:
        before, stand_in = self._more(transforms)
        for several in _at_once(batches, self.at_once):
            sizes = [len(batch) for batch in several]
            if 0 in sizes:
                several = [batch if len(batch) else stand_in for batch in several]
            index = torch.from_numpy(np.concatenate(several)).to(self.home, non_blocking=True)
            cuts = [len(batch) for batch in several]
            columns = [_apart(leaf, cuts) for leaf in self._gathered(index)]
            for batch, size, ids, leaves in zip(
                several, sizes, index.split(cuts), zip(*columns, strict=True), strict=True
            ):
                if transforms is not None:
                    leaves, ids = transforms(*leaves, batch, epoch), ids[before:]
                    size -= before if size else 0
                yield Batch(self.rebuild(leaves), ids, size)

    def _from_files(
        self, batches: Iterable[np.ndarray], epoch: int, transforms: BatchTransforms | None
    ) -> Iterator[Batch]:
        before, stand_in = self._more(transforms)
        asked: deque[np.ndarray] = deque()

        def ask() -> Iterator[np.ndarray]:
            for batch in batches:
                asked.append(batch)
                yield batch if len(batch) else stand_in

        with ended() if self.workers else nullcontext():
            items = self._items(ask(), epoch)
            try:
                for item in items:
                    if isinstance(item, str):
                        raise ConfigError(item)
                    samples = asked.popleft()
                    size, read = len(samples), samples if len(samples) else stand_in
                    leaves, rebuild = flatten(item.tree)
                    leaves = self._finish(leaves)
                    if transforms is not None:
                        leaves = transforms(*leaves, read, epoch)
                    yield Batch(rebuild(leaves), torch.from_numpy(read[before:]), size - before if size else 0)
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

    def _gathered(self, index: torch.Tensor) -> list[torch.Tensor]:
        if isinstance(self.split, Gathered):
            leaves = flatten(self.split.gather(index.numpy()))[0]
            # A copy from pinned memory does not wait for the device.
            return self._finish([leaf.pin_memory() for leaf in leaves] if self.device.type == "cuda" else leaves)
        # index_select copies whole rows; indexing with [] goes through them number by number.
        return self._finish([column.index_select(0, index) for column in self.columns])

    def _more(self, transforms: BatchTransforms | None) -> tuple[int, np.ndarray]:
        """Samples before those of a batch, and what is read for an empty one."""
        before = 0 if transforms is None else transforms.before
        return before, np.arange(before + min(STAND_IN, len(self.split))) % len(self.split)

    def _finish(self, leaves: list[Any]) -> list[Any]:
        """What was read, on the device and in the formats of the run."""
        if not self.paired:
            return [self._placed(leaf) for leaf in leaves]
        first, *rest = leaves
        images = first.to(self.device, non_blocking=True)
        floats = images.dtype == torch.uint8 or images.is_floating_point()
        inputs = images.to(self.dtype) if floats else images  # others are numbers that a model looks up, such as tokens
        if self.affine is not None and floats:
            shift, factor = self.affine
            # What a data set holds itself is not changed.
            inputs = (inputs.sub(shift) if inputs is first else inputs.sub_(shift)).mul_(factor)
        elif images.dtype == torch.uint8:
            inputs = inputs.div_(WHITE)  # as ToTensor does, to the last bit
        targets = [self._placed(leaf) for leaf in rest]
        if self.one_hot and len(targets) == 1 and _is_numbers(targets[0]):
            # F.one_hot first reads the labels' range.
            targets = [(targets[0].unsqueeze(1) == self.numbers).to(self.dtype)]
        return [inputs, *targets]

    def _placed(self, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return leaf.to(self.device, self.dtype if leaf.is_floating_point() else leaf.dtype, non_blocking=True)

    def _affine(self, data: Data, normalize: bool, white: float) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(pixel - shift) * factor is the input: pixel / white, then minus mean and divided by std. None where there
        is nothing to subtract."""
        if not normalize or (set(data.mean) == {0.0} and set(data.std) == {1.0}):
            return None
        shape = [-1] + [1] * (len(data.input_shape or (1,)) - 1)  # a number per channel
        shift, scale = (torch.tensor(v, dtype=torch.float64).mul(white).view(shape) for v in (data.mean, data.std))
        return shift.to(self.device, self.dtype), scale.reciprocal().to(self.device, self.dtype)


def _at_once(batches: Iterable[np.ndarray], limit: int) -> Iterator[list[np.ndarray]]:
    """Batches in groups of about so many samples that are gathered together: a gather has a price of its own, which
    small batches would pay at every step."""
    several: list[np.ndarray] = []
    samples = 0
    for batch in batches:
        several.append(batch)
        samples += len(batch)
        if samples >= limit or len(several) >= limit:
            yield several
            several, samples = [], 0
    if several:
        yield several


def _apart(leaf: torch.Tensor, cuts: list[int]) -> Sequence[torch.Tensor]:
    """Parts of a tensor. A model may change its input in place, which autograd refuses of a part as it is."""
    parts = leaf.split(cuts)
    return [part.detach() for part in parts] if leaf.is_floating_point() or leaf.is_complex() else parts


def _is_numbers(targets: Any) -> bool:
    """Whether a target is class numbers [batch]."""
    return isinstance(targets, torch.Tensor) and targets.dim() == 1 and not targets.is_floating_point()


def _fits(split: Columns, device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return sum(leaf.nbytes for leaf in split.leaves) < DEVICE_SHARE * free
