"""What a first forward and backward of a model shows about it, before it is sharded or wrapped, and leaves no trace of.

Libraries take for granted what many models do not keep to: that every weight gets a gradient, that forward only reads
the weights, that every step takes the same way through the layers. What a model really does is seen here once.
"""

import copy
import random
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dist_train.backends.shards import real_of, whole_of
from dist_train.data.randomness import kept_apart, seed_for

# How a forward reads a tensor's values on the host, where it may decide by them what to compute next.
READS = {"__bool__", "__float__", "__index__", "__int__", "equal", "item", "nonzero", "numpy", "tolist"}
PIECE = 1 << 20  # numbers
ON_HOST = "a generator of random or NumPy"
TORCH = Path(torch.__file__).parent


Signs = dict[str, tuple[float, float]]  # of gradients, by the parameters' names, and of the loss, whose name is empty


@dataclass(frozen=True)
class Findings:
    """What was seen. Names are the model's own.

    Args:
        unused: parameters that ask for a gradient and got none.
        sparse: parameters whose gradient is sparse.
        written: parameters that forward changed.
        buffers: buffers that forward changed.
        by_samples: those of them that it changes by its samples or draws, and not alike on every rank: without those of
            `norms`.
        norms: norms over a batch, in training, whose statistics are as model.batch_statistics says.
        varies: forward drew random numbers, or read values, on the host: another step may take another way through the
            layers, and use other parameters.
        needs_two: forward takes no single sample, as a norm over a batch does not.
        sample_bytes: of a sample's input and outputs; 0 where that is not known.
        metrics: names of what an evaluation measures.
        draws: what forward draws from a generator, and where; so not what is keyed (models/draws.py).
        mixes_samples: the loss of a sample depends on the others of its batch.
        notes: what people may want to know of it, a line each.
        first: has the model take the first samples again, as this one of so many tensor ranks, (0, 1) before its layers
            are split; and tells what its gradients and its loss are then. Collective where layers are split.
    """

    unused: tuple[str, ...] = ()
    sparse: tuple[str, ...] = ()
    written: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()
    by_samples: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    varies: bool = False
    needs_two: bool = False
    sample_bytes: int = 0
    mixes_samples: bool = False
    metrics: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    draws: tuple[str, ...] = ()
    first: Callable[[tuple[int, int]], Signs] | None = None


NOTHING = Findings()


def probe(model: nn.Module, loss_of: Callable[[], torch.Tensor], trains: bool = True) -> Findings:
    """Takes a forward and backward of `model` as it is, and puts back what they changed: gradients, buffers, extra
    state, and all random generators. Where they changed values of parameters, `written` says so.

    Args:
        model: on its device, not compiled, sharded or wrapped yet.
        loss_of: a forward of it, and the loss, a scalar.
        trains: false leaves out the backward, and what only it shows.

    Raises:
        Exception: whatever `loss_of` raises.
    """
    parameters = dict(model.named_parameters())
    before = {name: _digest(p) for name, p in parameters.items()}
    with drawing_apart(next(iter(parameters.values()), torch.empty(0)).device), _state_kept(model) as changed:
        drawn = host_generators()
        with Reads() as reads, Draws(model) as draws:
            loss = loss_of()
        on_host = drawn != host_generators()
        varies = reads.seen or on_host
        got = gradients(loss, parameters) if trains else dict.fromkeys(parameters, torch.strided)
        buffers = tuple(changed())
    return Findings(
        unused=tuple(name for name, p in parameters.items() if p.requires_grad and name not in got),
        sparse=tuple(name for name, layout in got.items() if layout != torch.strided),
        written=tuple(name for name, p in parameters.items() if trains and _digest(p) != before[name]),
        buffers=buffers,
        varies=varies,
        draws=(*draws.seen, *([ON_HOST] if on_host else [])),
    )


def signs_of(model: nn.Module, loss_of: Callable[[], torch.Tensor]) -> Signs:
    """What tells the gradients of one forward and backward from those of another. What they change is put back, as by
    `probe`. Collective where gradients are shared out among ranks."""
    parameters = dict(model.named_parameters())
    found: Signs = {}
    with drawing_apart(next(iter(parameters.values())).device), _state_kept(model):
        loss = loss_of()
        found[""] = sign_of(loss.detach())
        gradients(loss, parameters, lambda name, gradient: found.update({name: sign_of(gradient)}))
    return found


def sign_of(values: torch.Tensor) -> tuple[float, float]:
    """The norm, and a sum in which each place has a weight of its own. Collective for a DTensor."""
    whole = whole_of(values)
    flat = real_of(whole.to_dense() if whole.is_sparse else whole).reshape(-1)
    weights = torch.arange(min(PIECE, len(flat)), device=flat.device).mul(0.7).sin().to(flat.dtype)
    parts = [(part @ weights[: len(part)]) * (1 + i % 3) for i, part in enumerate(flat.split(PIECE))]
    return float(torch.linalg.vector_norm(flat)), float(sum(parts))


def changed_to(
    model: nn.Module, forward: Callable[[], Any], names: Collection[str], draws: int
) -> dict[str, torch.Tensor]:
    """What a forward in training makes of buffers. They are put back, as by `probe`.

    Args:
        model: see `probe`.
        forward: of it.
        names: of the buffers.
        draws: a seed of what the forward draws.
    """
    device = next(iter(model.parameters()), torch.empty(0)).device
    with drawing_apart(device, draws), _state_kept(model), torch.no_grad():
        forward()
        return {name: value.clone() for name, value in model.named_buffers() if name in names}


class Reads(TorchFunctionMode):
    """Notices values that are read on the host."""

    seen = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen = self.seen or getattr(func, "__name__", "") in READS
        return func(*args, **(kwargs or {}))


class Draws(TorchDispatchMode):
    """Notices operators that draw from torch's generators, with the layer and the line that they are called in."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.names = {module: name for name, module in model.named_modules()}
        self.seen: dict[str, None] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: torch would import its compiler for that, which takes as long as importing torch does."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **(kwargs or {}))
        before = _torch_generators()
        found = func(*args, **(kwargs or {}))
        if not all(torch.equal(a, b) for a, b in zip(before, _torch_generators(), strict=True)):
            self.seen[self.named(func)] = None
        return found

    def named(self, func: Any) -> str:
        """The operator, and where it was called."""
        return f"{func.overloadpacket.__name__}{self._where()}"

    def _where(self) -> str:
        layer = ""
        for frame, line in traceback.walk_stack(None):  # from the inside out
            own, file = frame.f_locals.get("self"), Path(frame.f_code.co_filename)
            if isinstance(own, nn.Module) and own in self.names:
                layer = layer or self.names[own]
                if TORCH not in file.parents:
                    return f"{f' in {layer}' if layer else ''} ({file.name}:{line})"
        return ""


def _torch_generators() -> list[torch.Tensor]:
    """Where torch's generators stand."""
    devices = [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *devices]


def gradients(
    loss: torch.Tensor, parameters: dict[str, nn.Parameter],
    see: Callable[[str, torch.Tensor], None] = lambda name, gradient: None,
) -> dict[str, torch.layout]:  # fmt: skip
    """The parameters that a backward gives a gradient, with its layout. Each gradient goes as soon as it has come and
    been seen, so that they take no memory together."""
    got: dict[str, torch.layout] = {}

    def hook(name: str) -> Callable[[torch.Tensor], None]:
        def come(parameter: torch.Tensor) -> None:
            if parameter.grad is not None:
                got[name] = parameter.grad.layout
                see(name, parameter.grad)
                parameter.grad = None

        return come

    asked = {name: p for name, p in parameters.items() if p.requires_grad}
    handles = [p.register_post_accumulate_grad_hook(hook(name)) for name, p in asked.items()]
    try:
        if loss.requires_grad:  # else all is frozen
            loss.backward()
    finally:
        for handle in handles:
            handle.remove()
    return {name: got[name] for name in asked if name in got}  # in the model's order


def _digest(parameter: nn.Parameter) -> tuple[str, int]:
    """What changes when the values do; a write through .data counts up no version."""
    wide = torch.complex128 if parameter.is_complex() else torch.float64
    if parameter.device.type == "mps":  # has nothing wider
        wide = parameter.dtype
    # In pieces, as each is cast as a whole.
    total = sum(part.sum(dtype=wide) for part in parameter.detach().reshape(-1).split(PIECE))
    return str(complex(total)), parameter._version  # as text, in which nan equals nan


@contextmanager
def drawing_apart(device: torch.device, seed: int = 0) -> Iterator[None]:
    """The same draws at every look, on every rank; then puts all generators back that a model may draw from."""
    devices = [device] if device.type == "cuda" else []
    with kept_apart(), torch.random.fork_rng(devices):
        seed_for(seed, 0, 0)
        if devices:
            torch.cuda.manual_seed(seed)
        yield


def host_generators() -> tuple[Any, ...]:
    """Where the generators of `random` and NumPy stand."""
    kind, keys, *rest = np.random.get_state()
    return random.getstate(), kind, keys.tobytes(), *rest


@contextmanager
def _state_kept(model: nn.Module) -> Iterator[Callable[[], list[str]]]:
    """Puts back buffers and extra state. Gives a function that tells which buffers have changed so far."""
    places = [
        (name, module, own, value, value._version, value.detach().clone())
        for prefix, module in model.named_modules()
        for own, value in module._buffers.items()
        if value is not None
        for name in [f"{prefix}.{own}" if prefix else own]
    ]

    def changed() -> list[str]:
        return [name for name, module, own, value, *was in places if _differs(module._buffers.get(own), value, *was)]

    with extra_kept(model):
        try:
            yield changed
        finally:
            with torch.no_grad():
                for _, module, own, value, _, kept in places:
                    value.copy_(kept)
                    module._buffers[own] = value


@contextmanager
def extra_kept(model: nn.Module) -> Iterator[None]:
    """Puts back extra state."""
    extra = [
        (module, copy.deepcopy(module.get_extra_state()))
        for module in model.modules()
        if type(module).get_extra_state is not nn.Module.get_extra_state
    ]
    try:
        yield
    finally:
        for module, state in extra:
            module.set_extra_state(state)


def _differs(now: torch.Tensor | None, value: torch.Tensor, version: int, kept: torch.Tensor) -> bool:
    """Whether a buffer is another tensor now, was written, or holds other values."""
    return now is not value or value._version != version or not torch.equal(now, kept)
