"""data.transforms: transforms of torchvision.transforms.v2, or the user's own, by name, for one sample at a time."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

from dist_train.config.lookup import load
from dist_train.config.own_code import blamed
from dist_train.config.values import unknown
from dist_train.data.items import is_mask
from dist_train.errors import ConfigError, TransformError


class Transforms:
    """They are applied in order.

    What they draw at random is drawn from the generators of torch, NumPy and random, which are seeded for each sample
    (Samples.draws).

    Args:
        entries: a name each, or a mapping with a name and arguments.
        path: of the config.

    Raises:
        ConfigError: a name that does not exist, or arguments that it does not take.
    """

    def __init__(self, entries: Sequence[Any], path: str):
        self.path = path
        self.each = [(name_of(entry), made(entry, path)) for entry in entries]

    def __call__(self, image: Any) -> Any:
        """The input of a sample. A tensor with three dimensions is a picture. Raises TransformError."""
        return _plain(self._applied(_marked(image)))

    def pair(self, image: Any, target: Any) -> tuple[Any, Any]:
        """The input and the target. A target that is a picture as well, integers with the height and width of the
        input, is a mask, which is moved as the input is. Raises TransformError."""
        if not is_mask(image, target):
            return self(image), target
        marked, mask = self._applied((_marked(image), tv_tensors.Mask(target)))
        return _plain(marked), _plain(mask)

    def _applied(self, sample: Any) -> Any:
        for name, transform in self.each:
            given = sample[0] if isinstance(sample, tuple) else sample
            try:
                sample = transform(*sample) if isinstance(sample, tuple) else transform(sample)
            except Exception as error:
                what = f"{given.dtype} {list(given.shape)}" if isinstance(given, torch.Tensor) else type(given).__name__
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                raise TransformError(
                    f"{self.path}: {name} does not take the {what} that it is given: {reason}"
                ) from error
        return sample


def name_of(entry: Any) -> str:
    """The name in an entry of the config."""
    return entry["name"] if isinstance(entry, Mapping) else entry


def made(entry: Any, path: str) -> Any:
    """The transform of an entry. Raises ConfigError."""
    name = name_of(entry)
    given = {key: value for key, value in entry.items() if key != "name"} if isinstance(entry, Mapping) else {}
    if ":" in name:
        kind = load({}, name, path)
    else:
        kind = getattr(v2, name, None)
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise ConfigError(unknown(path, name, KNOWN, "transform of torchvision.transforms.v2"))
    if not given and not isinstance(kind, type) and ":" in name:
        return kind  # a function of an image, or an object that is called with one
    arguments = {key: _argument(key, value, f"{path} {name}") for key, value in given.items()}
    try:
        inspect.signature(kind).bind(**arguments)
    except (TypeError, ValueError) as error:
        takes = ", ".join(inspect.signature(kind).parameters) or "no arguments"
        raise ConfigError(f"{path}: got {arguments} for {name}, which takes {takes}: {error}") from None
    if ":" in name:
        with blamed(path, name, "called"):
            return kind(**arguments)
    try:
        return kind(**arguments)
    except Exception as error:
        raise ConfigError(f"{path}: got {arguments} for {name}, which refuses them: {error}") from None


def _argument(key: str, value: Any, path: str) -> Any:
    """A value as v2 takes it: a dtype and a way to interpolate by name, and transforms within a transform."""
    if key == "dtype" and isinstance(value, str):
        found = getattr(torch, value, None)
        if not isinstance(found, torch.dtype):
            raise ConfigError(f"{path}.dtype: got {value!r}, expected one of torch's, such as float32 or uint8")
        return found
    if key == "interpolation" and isinstance(value, str):
        ways = {way.value: way for way in InterpolationMode}
        if value not in ways:
            raise ConfigError(unknown(f"{path}.interpolation", value, list(ways), "way"))
        return ways[value]
    if key == "transforms" and isinstance(value, list):
        return [made(entry, path) for entry in value]
    return value


def _marked(image: Any) -> Any:
    return tv_tensors.Image(image) if isinstance(image, torch.Tensor) and image.dim() == 3 else image


def _plain(value: Any) -> Any:
    """A tensor of torch's own class, with which all else is faster."""
    return value.as_subclass(torch.Tensor) if isinstance(value, torch.Tensor) else value


KNOWN = sorted(
    name for name, kind in vars(v2).items() if isinstance(kind, type) and issubclass(kind, nn.Module) and name[0] != "_"
)
