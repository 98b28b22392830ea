"""data.batch_transforms: what is done to the pairs of a training batch on the device, drawn for each sample.

torchvision.transforms.v2 has transforms of these names. Its own draw from the generator of a process, once for a whole
batch (MixUp, CutMix) or once for all samples of it (RandomErasing, RandomHorizontalFlip), and mix samples within the
batch that a process happens to have: a run would depend on the number of its ranks and micro-batches. These draw for
each sample from `keyed.Draws`, and mix it with the one before it in the global batch, as v2 does within a batch; the
order of an epoch is random, so that is as good as any other. A rank reads one sample more for that.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from dist_train.data.keyed import Draws
from dist_train.errors import ConfigError

ATTEMPTS = 10  # v2's, to find a rectangle that fits

Pair = tuple[torch.Tensor, torch.Tensor]


class BatchTransform(ABC):
    """One transform.

    `mixes`: each sample is mixed with the one before it. Then there is one sample more at the beginning of a batch, and
    the result is without it.
    """

    mixes = False

    @abstractmethod
    def __call__(self, inputs: torch.Tensor, targets: torch.Tensor, draws: Draws) -> Pair:
        """The batch after it.

        Args:
            inputs: floats [n, ...], normalised; it may not be changed.
            targets: as the data set has them, [n, ...].
            draws: random numbers, for these n samples; of one that mixes, for the n - 1 that the result has.
        """


class BatchTransforms:
    """All of them, in order.

    Args:
        each: what is done.
        seed: of the run.
    """

    def __init__(self, each: Sequence[BatchTransform], seed: int):
        self.each, self.seed = each, seed
        self.before = sum(transform.mixes for transform in each)
        """How many samples come before those of a batch."""

    def __call__(self, inputs: torch.Tensor, targets: torch.Tensor, samples: np.ndarray, epoch: int) -> Pair:
        """The batch after all.

        Args:
            inputs: floats [before + n, ...].
            targets: [before + n, ...].
            samples: their numbers.
            epoch: counts from 0.
        """
        for place, transform in enumerate(self.each):
            samples = samples[1:] if transform.mixes else samples
            inputs, targets = transform(inputs, targets, Draws(self.seed, epoch, place, samples))
        return inputs, targets


class MixUp(BatchTransform):
    """A sample and another one, and their targets, in the same proportion. Source: Zhang et al., arXiv:1710.09412.

    Args:
        alpha: of the Beta(alpha, alpha) distribution that a sample's share is drawn from.
        p: the share of samples that this is done to.
        classes: of the data set.
    """

    mixes = True

    def __init__(self, alpha: float = 1.0, p: float = 1.0, classes: int | None = None):
        self.alpha, self.p, self.classes = _positive("MixUp", "alpha", alpha), _share("MixUp", p), classes

    def __call__(self, inputs: torch.Tensor, targets: torch.Tensor, draws: Draws) -> Pair:
        """See BatchTransform."""
        share = np.where(draws.uniform()[:, 0] < self.p, draws.beta(self.alpha), 1.0)
        return _mixed(inputs, share), _mixed(_vectors("MixUp", targets, self.classes, inputs.dtype), share)


class CutMix(BatchTransform):
    """A picture with a rectangle of another one; targets by area. Source: Yun et al., arXiv:1905.04899.

    Args:
        alpha: of the Beta(alpha, alpha) distribution that the share of a sample's area is drawn from.
        p: the share of samples that this is done to.
        classes: of the data set.
    """

    mixes = True

    def __init__(self, alpha: float = 1.0, p: float = 1.0, classes: int | None = None):
        self.alpha, self.p, self.classes = _positive("CutMix", "alpha", alpha), _share("CutMix", p), classes

    def __call__(self, inputs: torch.Tensor, targets: torch.Tensor, draws: Draws) -> Pair:
        """See BatchTransform."""
        _pictures("CutMix", inputs)
        size = np.array(inputs.shape[-2:])
        share = np.where(draws.uniform()[:, 0] < self.p, draws.beta(self.alpha), 1.0)
        middle, half = np.floor(draws.uniform(2) * size), 0.5 * np.sqrt(1 - share)[:, None] * size
        low, high = np.clip(np.floor(middle - half), 0, size), np.clip(np.floor(middle + half), 0, size)
        high = np.where(half > 0, high, low)
        kept = 1 - (high - low).prod(1) / size.prod()
        mixed = torch.where(_rectangles(low, high, inputs), inputs[:-1], inputs[1:])
        return mixed, _mixed(_vectors("CutMix", targets, self.classes, inputs.dtype), kept)


class RandomErasing(BatchTransform):
    """A rectangle of a picture replaced by a value. Source: Zhong et al., arXiv:1708.04896.

    Args:
        p: the share of samples that this is done to.
        scale: the least and the largest share of the area that is erased.
        ratio: the least and the largest height of the rectangle, by its width.
        value: of the erased pixels, which were normalised before: a number, or one for each channel.
    """

    def __init__(
        self,
        p: float = 0.5,
        scale: tuple[float, float] = (0.02, 0.33),
        ratio: tuple[float, float] = (0.3, 3.3),
        value: float | list[float] = 0.0,
    ):
        self.p = _share("RandomErasing", p)
        self.scale, self.ratio = _range("RandomErasing", "scale", scale), _range("RandomErasing", "ratio", ratio)
        values = value if isinstance(value, (list, tuple)) else [value]
        if not values or not all(_is_number(number) for number in values):
            raise _refused("RandomErasing", "value", value, "a number, or one for each channel")
        self.value = torch.tensor(values, dtype=torch.float64).view(-1, 1, 1)

    def __call__(self, inputs: torch.Tensor, targets: torch.Tensor, draws: Draws) -> Pair:
        """See BatchTransform."""
        _pictures("RandomErasing", inputs)
        if len(self.value) not in (1, inputs.shape[1]):
            raise _refused(
                "RandomErasing", "value", self.value.flatten().tolist(), f"one of {inputs.shape[1]} channels"
            )
        chosen, area, log_ratio, place = (draws.uniform(n) for n in (1, ATTEMPTS, ATTEMPTS, 2))
        area = (self.scale[0] + (self.scale[1] - self.scale[0]) * area) * math.prod(inputs.shape[-2:])
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        ratio = np.exp(low + (high - low) * log_ratio)
        sides = np.rint(np.sqrt(np.stack([area * ratio, area / ratio], 2)))  # [n, attempts, height and width]
        size = np.array(inputs.shape[-2:])
        fits = (sides < size).all(2)
        side = sides[np.arange(len(sides)), fits.argmax(1)] * (fits.any(1) & (chosen[:, 0] < self.p))[:, None]
        begin = np.floor(place * (size - side + 1))
        value = self.value.to(inputs.device, inputs.dtype)
        return torch.where(_rectangles(begin, begin + side, inputs), value, inputs), targets


class RandomHorizontalFlip(BatchTransform):
    """A picture, and a target that is one, from right to left.

    Args:
        p: the share of samples that this is done to.
    """

    def __init__(self, p: float = 0.5):
        self.p = _share("RandomHorizontalFlip", p)

    def __call__(self, inputs: torch.Tensor, targets: torch.Tensor, draws: Draws) -> Pair:
        """See BatchTransform."""
        _pictures("RandomHorizontalFlip", inputs)
        chosen = _on(draws.uniform()[:, 0] < self.p, inputs)

        def flipped(pictures: torch.Tensor) -> torch.Tensor:
            return torch.where(_beside(chosen, pictures), pictures.flip(-1), pictures)

        return flipped(inputs), flipped(targets) if targets.dim() > 2 else targets


class RandomCrop(BatchTransform):
    """A part of a picture, and the same of a target that is one.

    Args:
        size: height and width of the part.
        padding: pixels that are added on each side before.
        fill: their value, in pictures that were normalised before.
    """

    def __init__(self, size: int | list[int], padding: int = 0, fill: float = 0.0):
        sides = [size, size] if type(size) is int else size
        if not isinstance(sides, (list, tuple)) or len(sides) != 2 or not all(type(s) is int and s > 0 for s in sides):
            raise _refused("RandomCrop", "size", size, "an integer above 0, or height and width")
        if type(padding) is not int or padding < 0:
            raise _refused("RandomCrop", "padding", padding, "an integer of 0 or more")
        if not _is_number(fill):
            raise _refused("RandomCrop", "fill", fill, "a number")
        self.size, self.padding, self.fill = sides, padding, fill

    def __call__(self, inputs: torch.Tensor, targets: torch.Tensor, draws: Draws) -> Pair:
        """See BatchTransform."""
        _pictures("RandomCrop", inputs)
        room = np.array(inputs.shape[-2:]) + 2 * self.padding - self.size
        if (room < 0).any():
            most = [side + 2 * self.padding for side in inputs.shape[-2:]]
            raise _refused("RandomCrop", "size", list(self.size), f"at most {most}, the pictures with their padding")
        begin = np.floor(draws.uniform(2) * (room + 1)).astype(np.int64)
        rows, columns = (_on(begin[:, i, None] + np.arange(self.size[i]), inputs) for i in (0, 1))

        def cropped(pictures: torch.Tensor, fill: float) -> torch.Tensor:
            padded = F.pad(pictures, [self.padding] * 4, value=fill) if self.padding else pictures
            return _gathered(padded, rows, columns)

        return cropped(inputs, self.fill), cropped(targets, 0) if targets.dim() > 2 else targets


def _mixed(values: torch.Tensor, share: np.ndarray) -> torch.Tensor:
    """Of each but the first its share, and of the one before it the rest."""
    own = _beside(_on(share, values).to(values.dtype), values)
    return values[1:] * own + values[:-1] * (1 - own)


def _vectors(name: str, targets: torch.Tensor, classes: int | None, dtype: torch.dtype) -> torch.Tensor:
    """Targets as vectors [n, classes]."""
    if targets.dim() == 2 and targets.is_floating_point():
        return targets.to(dtype)
    if targets.dim() != 1 or targets.is_floating_point() or classes is None:
        raise ConfigError(
            f"data.batch_transforms: got {name} for targets {targets.dtype} {list(targets.shape)}, expected class "
            f"numbers [samples] of a data set with classes, or vectors of floats; leave it out"
        )
    return (targets.unsqueeze(1) == torch.arange(classes, device=targets.device)).to(dtype)


def _pictures(name: str, inputs: torch.Tensor) -> None:
    if inputs.dim() != 4:
        raise ConfigError(
            f"data.batch_transforms: got {name} for inputs {list(inputs.shape)}, expected pictures [samples, channels, "
            f"height, width]; leave it out"
        )


def _rectangles(low: np.ndarray, high: np.ndarray, pictures: torch.Tensor) -> torch.Tensor:
    """Whether a pixel is inside of its picture's rectangle: [n, 1, height, width]."""
    begin, end = _on(low, pictures), _on(high, pictures)  # [n, 2]
    inside = [
        (at >= begin[:, i, None]) & (at < end[:, i, None])
        for i, at in enumerate(torch.arange(side, device=pictures.device) for side in pictures.shape[-2:])
    ]
    return (inside[0][:, :, None] & inside[1][:, None, :]).unsqueeze(1)


def _gathered(pictures: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Of each picture [n, ..., height, width] its own rows [n, h] and columns [n, w]: [n, ..., h, w]."""
    middle = pictures.shape[1:-2]
    ones = [1] * len(middle)
    rows = rows.view(len(rows), *ones, -1, 1).expand(-1, *middle, -1, pictures.shape[-1])
    columns = columns.view(len(columns), *ones, 1, -1).expand(-1, *middle, rows.shape[-2], -1)
    return pictures.gather(-2, rows).gather(-1, columns)


def _on(values: np.ndarray, where: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(values).to(where.device, non_blocking=True)


def _beside(values: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    """A value for each sample, in a shape that goes with theirs."""
    return values.view(-1, *[1] * (of.dim() - 1))


def _share(name: str, p: float) -> float:
    if not _is_number(p) or not 0 <= p <= 1:
        raise _refused(name, "p", p, "a number from 0 to 1")
    return p


def _positive(name: str, key: str, value: float) -> float:
    if not _is_number(value) or value <= 0:
        raise _refused(name, key, value, "a number above 0")
    return value


def _range(name: str, key: str, values: Sequence[float]) -> Sequence[float]:
    fits = isinstance(values, (list, tuple)) and len(values) == 2 and all(_is_number(value) for value in values)
    if not fits or not 0 < values[0] <= values[1]:
        raise _refused(name, key, values, "two numbers above 0, the smaller first")
    return values


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _refused(name: str, key: str, got: object, expected: str) -> ConfigError:
    return ConfigError(f"data.batch_transforms: got {key} {got!r} of {name}, expected {expected}")
