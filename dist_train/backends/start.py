"""The start of a sharded model without a whole copy of it on any rank: it is on the meta device until it is sharded.
Then each rank's boxes are filled, from a stream of whole tensors, of which only a few are there at a time, or from
files, of which only the boxes are read."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from dist_train.backends.shards import Shards, shards_of
from dist_train.models.deferred import Deferred, Tensor
from dist_train.models.recording import Place


@dataclass(frozen=True)
class Source:
    """Weights in files.

    Args:
        names: of the tensors, as in the model's state.
        fill: fills the boxes that it is given, by name.
    """

    names: Collection[str]
    fill: Callable[[Mapping[str, Shards]], None]


class Start:
    """Of a model on the meta device.

    Args:
        deferred: gives its tensors the values of its constructor.

    Attributes:
        source: what of the weights is taken from files, in the place of those.
    """

    def __init__(self, deferred: Deferred):
        self.deferred = deferred
        self.source = Source((), lambda boxes: None)

    def settle(self, device: torch.device) -> None:
        """Makes all but the parameters: buffers, and tensors that are attributes of modules."""
        beside = [each for each in self.deferred.tensors if each.kind != "parameter"]
        by_storage = _by_storage(beside)
        made: dict[int, torch.Tensor] = {}  # by the tensor on meta, which may be in several modules

        def give(number: int, view: Callable[[Place], torch.Tensor]) -> None:
            for each in by_storage[number]:
                _set(each, made, view(each.place).to(device))

        self.deferred.replay(by_storage, give)
        for each in beside:  # what has no values yet
            _set(each, made, torch.empty_like(_of(each), device=device))

    @torch.no_grad()
    def fill(self, model: nn.Module, device: torch.device) -> None:
        """Allocates and fills the parameters of a model that has been sharded, or of a part of it.

        Args:
            model: with the modules that were recorded.
            device: where its parameters are to be.
        """
        allocate(model, device)
        modules = set(model.modules())
        mine = [each for each in self.deferred.tensors if each.kind == "parameter" and each.module in modules]
        names: dict[nn.Parameter, list[str]] = {}  # of each, also of one that is tied
        for each in mine:
            names.setdefault(_of(each), []).extend(each.names)
        given = {p: [name for name in several if name in self.source.names] for p, several in names.items()}
        self.source.fill({several[-1]: shards_of(p) for p, several in given.items() if several})
        by_storage = _by_storage(each for each in mine if not given[_of(each)])

        def give(number: int, view: Callable[[Place], torch.Tensor]) -> None:
            for each in by_storage[number]:
                copy_boxes(shards_of(_of(each)), view(each.place))

        self.deferred.replay(by_storage, give)


def allocate(model: nn.Module, device: torch.device) -> None:
    """Gives the tensors of a model that are on the meta device memory without values; of what is sharded, this rank's
    part. Parameters stay the same objects, as others know them."""
    attributes = {p: dict(vars(p)) for p in model.parameters()}
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t)  # fully_shard looks on
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    for parameter, own in attributes.items():
        vars(parameter).update(own)


def copy_boxes(shards: Shards, whole: torch.Tensor) -> None:
    """Fills boxes from the whole tensor, in whatever format and on whatever device they are."""
    for at, part in shards.boxes:
        part.copy_(whole[tuple(slice(first, first + count) for first, count in zip(at, part.shape, strict=True))])


def mapped_source(tensors: Mapping[str, torch.Tensor]) -> Source:
    """Of whole tensors, such as those that are mapped from a file."""

    def fill(boxes: Mapping[str, Shards]) -> None:
        for name, shards in boxes.items():
            copy_boxes(shards, tensors[name])

    return Source(tensors.keys(), fill)


def _by_storage(tensors: Iterable[Tensor]) -> dict[int, list[Tensor]]:
    found: dict[int, list[Tensor]] = {}
    for each in tensors:
        found.setdefault(each.place.storage, []).append(each)
    return found


def _of(each: Tensor) -> torch.Tensor:
    """The tensor as the model has it now."""
    return _holder(each)[each.own]


def _holder(each: Tensor) -> dict[str, torch.Tensor]:
    kinds = {"parameter": each.module._parameters, "buffer": each.module._buffers, "attribute": vars(each.module)}
    return kinds[each.kind]  # type: ignore[return-value]


def _set(each: Tensor, made: dict[int, torch.Tensor], value: torch.Tensor) -> None:
    """Puts a real tensor in the place of one on meta, the same one wherever that is."""
    now = _of(each)
    if now.is_meta:
        _holder(each)[each.own] = made.setdefault(id(now), value)
