"""Items of map-style data sets, as samples: pictures of Pillow as tensors, dicts as pairs, and transforms."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from dist_train.data.batch import flatten, mapped
from dist_train.data.image_files import pixels_of
from dist_train.data.sets import Columns
from dist_train.errors import ConfigError, TransformError


class Items(Dataset[Any]):
    """Another data set's items, as samples.

    A picture of Pillow becomes a tensor uint8 [channels, height, width], as the target of a pair int64 [height, width]
    with the numbers that it holds: it is a mask, and its palette's colours say nothing.

    Args:
        dataset: map-style.
        pair: keys of the input and the target, of items that are dicts; None leaves these as they are.
        transforms: transforms.Transforms, of the input, and of a mask with it; None for none.
    """

    def __init__(self, dataset: Any, pair: tuple[str, str] | None = None, transforms: Any = None):
        self.dataset, self.keys, self.transforms = dataset, pair, transforms

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        item = self.dataset[index]
        if self.keys is not None:
            item = self._paired(index, item)
        paired = isinstance(item, (tuple, list)) and len(item) == 2
        if paired and isinstance(item[1], Image.Image):
            item = (item[0], torch.from_numpy(np.array(item[1])).long())
        item = mapped(item, lambda leaf: pixels_of(leaf) if isinstance(leaf, Image.Image) else leaf)
        if self.transforms is None:
            return item
        try:
            if paired:
                image, target = self.transforms.pair(*item)
                return image, target.long() if is_mask(image, target) else target
            return self._of_first(item) if isinstance(item, Mapping) else self.transforms(item)
        except TransformError as error:
            raise ConfigError(f"{error}; sample {index}") from error

    def _paired(self, index: int, item: Any) -> tuple[Any, Any]:
        absent = [key for key in self.keys if not isinstance(item, Mapping) or key not in item]
        if absent:
            got = f"a dict with {', '.join(map(str, item))}" if isinstance(item, Mapping) else type(item).__name__
            raise ConfigError(f"data.pair: got {list(self.keys)}, but sample {index} is {got}; expected keys of it")
        return item[self.keys[0]], item[self.keys[1]]

    def _of_first(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """Pictures of a dict."""
        return {
            key: self.transforms(value) if isinstance(value, torch.Tensor) and value.dim() == 3 else value
            for key, value in item.items()
        }


def is_mask(image: Any, target: Any) -> bool:
    """Whether a target is a number for each pixel of a picture."""
    both = isinstance(image, torch.Tensor) and isinstance(target, torch.Tensor)
    if not both or image.dim() != 3 or target.dim() < 2 or target.is_floating_point():
        return False
    return image.shape[-2:] == target.shape[-2:]


class Rows(Dataset[Any]):
    """Item i is sample i of columns."""

    def __init__(self, columns: Columns):
        self.leaves, self.tree = columns.leaves, columns.tree

    def __len__(self) -> int:
        return len(self.leaves[0])

    def __getitem__(self, index: int) -> Any:
        return flatten(self.tree)[1]([self._value(leaf[index]) for leaf in self.leaves])

    def _value(self, value: torch.Tensor) -> Any:
        return int(value) if value.dim() == 0 and value.dtype == torch.int64 else value
