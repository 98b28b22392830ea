"""The first look at a model that has no values yet (probe.py): its forward and backward on torch's fake tensors, which
have a shape, a type and a device, and compute nothing. What only values show cannot be seen; then it raises."""

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dist_train.backends import probe as real
from dist_train.backends.probe import Findings
from dist_train.models.draw_bits import tables_apart


class Unseen(Exception):
    """What only values would show."""


class Pretended:
    """A model whose tensors are fake ones for a while; see `pretended`.

    Args:
        model: with fake tensors in the place of its own.
        mode: torch's, of those.
    """

    def __init__(self, model: nn.Module, mode: Any):
        self.model, self.mode = model, mode

    def probe(self, model: nn.Module, loss_of: Callable[[], torch.Tensor], trains: bool = True) -> Findings:
        """See probe.probe. Raises Exception as well for what cannot be seen without values."""
        assert model is self.model
        parameters, device = dict(model.named_parameters()), next(iter(model.parameters()), torch.empty(0)).device
        buffers, draws, writes = dict(model.named_buffers()), _Draws(model), _Writes()
        with real.drawing_apart(device), real.extra_kept(model), _buffers_kept(model), tables_apart():
            drawn = real.host_generators()
            with self.mode, real.Reads() as reads, draws, writes:
                loss = loss_of()
            on_host = drawn != real.host_generators()
            with self.mode, writes:
                got = real.gradients(loss, parameters) if trains else dict.fromkeys(parameters, torch.strided)
            now = dict(model.named_buffers())
        return Findings(
            unused=tuple(name for name, p in parameters.items() if p.requires_grad and name not in got),
            sparse=tuple(name for name, layout in got.items() if layout != torch.strided),
            written=tuple(name for name, p in parameters.items() if trains and writes.saw(p)),
            buffers=tuple(name for name, b in buffers.items() if now.get(name) is not b or writes.saw(b)),
            varies=reads.seen or on_host,
            draws=(*draws.seen, *([real.ON_HOST] if on_host else [])),
        )

    def changed_to(self, model: nn.Module, forward: Callable[[], Any], names: Collection[str], draws: int) -> Any:
        """Raises Unseen, in the place of probe.changed_to."""
        raise Unseen(f"changes buffers ({', '.join(names)}), perhaps by its samples")

    def outside(self) -> AbstractContextManager[Any]:
        """Within a forward, around what looks at values of the batch, which is a real one."""
        from torch._subclasses.fake_tensor import unset_fake_temporarily

        return unset_fake_temporarily()

    def sums(self, found: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Real numbers in the place of fake sums."""
        return {name: torch.ones(value.shape, dtype=value.dtype) for name, value in found.items()}


@contextmanager
def pretended(model: nn.Module, device: torch.device) -> Iterator[Pretended]:
    """Has a model compute with fake tensors on a device. It has its own again afterwards, whatever forward has done.

    Args:
        model: some or all of whose tensors are on the meta device.
        device: see above.
    """
    # Here, as it takes two seconds to import, and only a large model needs it.
    from torch._subclasses.fake_tensor import FakeTensorMode

    log = logging.getLogger("torch._subclasses.fake_tensor")
    level, mode = log.level, FakeTensorMode(allow_non_fake_inputs=True)
    places = [
        (those, own, value)
        for module in model.modules()
        for those in (module._parameters, module._buffers, vars(module))
        for own, value in those.items()
        if isinstance(value, torch.Tensor)
    ]
    fakes: dict[int, torch.Tensor] = {}
    log.setLevel(logging.CRITICAL)  # it shows a traceback before it raises
    try:
        for those, own, value in places:
            if id(value) not in fakes:
                fakes[id(value)] = fake_of(mode, value, device)
            those[own] = fakes[id(value)]
        yield Pretended(model, mode)
    finally:
        for those, own, value in places:
            those[own] = value
        log.setLevel(level)


def fake_of(mode: Any, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A fake tensor of the same form on a device."""
    with mode:
        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
        return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake


def leftovers(model: nn.Module) -> list[str]:
    """What of a model's modules is a fake tensor, or holds some, as a forward has left it there."""
    from torch._subclasses.fake_tensor import FakeTensor

    found = []
    for name, module in model.named_modules():
        for own, value in vars(module).items():
            several = (
                value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
            )
            if any(isinstance(each, FakeTensor) for each in several):
                found.append(f"{name}.{own}" if name else own)
    return found


class _Writes(TorchDispatchMode):
    """Notes the tensors that operators write to."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: set[int] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """See probe.Draws."""
        return False

    def saw(self, tensor: torch.Tensor) -> bool:
        """Whether this one was written to."""
        return tensor.untyped_storage()._cdata in self.storages

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = _given(func, args, kwargs)
        # Norms over a batch do not say so.
        remembers = {"running_mean", "running_var"} if given.get("training") or given.get("train") else set()
        for argument in func._schema.arguments:
            info, value = argument.alias_info, given[argument.name]
            if (info is not None and info.is_write) or argument.name in remembers:
                for tensor in value if isinstance(value, (list, tuple)) else [value]:
                    if isinstance(tensor, torch.Tensor):
                        self.storages.add(tensor.untyped_storage()._cdata)
        return func(*args, **kwargs)


class _Draws(real.Draws):
    """The generators do not move: what may draw does, unless it drops nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = _given(func, args, kwargs or {})
        drops = given.get("dropout_p", 1.0) != 0.0 and given.get("train", True) is not False
        if torch.Tag.nondeterministic_seeded in func.tags and drops:
            self.seen[self.named(func)] = None
        return func(*args, **(kwargs or {}))


def _given(func: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of an operator by name, also those that are left out."""
    defaults = {argument.name: argument.default_value for argument in func._schema.arguments}
    return defaults | dict(zip(defaults, args, strict=False)) | kwargs


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Puts buffers back where forward has put others in their place."""
    kept = [(module, dict(module._buffers)) for module in model.modules()]
    try:
        yield
    finally:
        for module, buffers in kept:
            module._buffers.update(buffers)
