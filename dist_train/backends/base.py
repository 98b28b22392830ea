"""The seam: what the loop asks of a backend, and nothing more."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from dist_train.backends.buffers import Buffers
from dist_train.backends.initial import Initial, differences
from dist_train.backends.local import See, aside, seen
from dist_train.backends.ordered import Ordered
from dist_train.backends.precision import LossScale
from dist_train.backends.probe import NOTHING, Findings
from dist_train.backends.shards import Shards, local_of, mesh_of, shards_as, shards_of
from dist_train.config.tree import CompileConfig, Config, group_of
from dist_train.models.statistics import exchange
from dist_train.ranks.dist import World
from dist_train.ranks.journal import Journal

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

RECOMPILE_LIMIT = 128
OptimizerFactory = Callable[[Iterable[tuple[str, nn.Parameter]]], torch.optim.Optimizer]  # of parameters by name
SavedTensors = Mapping[str, "TensorStorageMetadata"]
Reader = Callable[[Mapping[str, Shards]], None]
Function = TypeVar("Function", bound=Callable)


class Backend(ABC):
    """Moves gradients and shards state. Every method is collective: all ranks call it, in the same order.

    Args:
        config: of the run.
        world: this rank's place.
        findings: what a first forward and backward of the model showed.
    """

    bare: nn.Module  # the model as it was given
    optimizer: torch.optim.Optimizer
    parameters: list[nn.Parameter]
    buffers: Buffers
    ordered: Ordered | None = None  # adds up the gradients, where backend.reduce is ordered
    taken = True  # the last step changed the weights: it was not left out
    updates_all = True  # each rank updates all weights, and not its part of them

    def __init__(self, config: Config, world: World, findings: Findings = NOTHING):
        self.config, self.world, self.findings = config, world, findings
        self.scale = LossScale() if config.train.precision == "float16" else None
        self.skips = config.train.nonfinite == "skip"
        self.journal: Journal | None = None  # of the layers, where each is gathered as it is entered

    def buffers_of(self, model: nn.Module) -> Buffers:
        """Those of the model, before it is compiled or wrapped; to be settled after every step. Its norms over a batch
        take their statistics from now on as model.batch_statistics says."""
        config, ranks = self.config, self.world.data_size
        statistics = exchange(model, group_of(config.model), ranks, compiles=config.compile.mode != "off")
        return Buffers(model, self.findings, ranks, self.skips or self.scale is not None, statistics)

    @abstractmethod
    def prepare(self, model: nn.Module, optimizer_fn: OptimizerFactory) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Compiles, shards or wraps `model`, then builds the optimizer.

        Returns:
            The model to call, and the optimizer whose `param_groups` hold the learning rate.
        """

    @abstractmethod
    def accumulate(self, last: bool) -> AbstractContextManager:
        """The context of a micro-batch, forward and backward: gradients are exchanged only in the last of a step."""

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradient of `loss`, this rank's part of the step's loss. The gradient of a step is the sum over
        ranks and micro-batches, so a library that takes the mean over ranks is undone here."""
        self.differentiate(loss)
        if self.ordered:
            self.ordered.take()

    @abstractmethod
    def differentiate(self, loss: torch.Tensor) -> None:
        """The backward of `loss`, with whatever exchange the library does within it."""

    def local(self, see: See) -> AbstractContextManager[None]:
        """Around micro-batches: hands over each parameter by the model's own name when this rank alone has computed its
        gradient in one of them, before any exchange."""
        return seen(self.bare.named_parameters(), see)

    @contextmanager
    def apart(self, see: See) -> Iterator[None]:
        """Around forwards and `differentiate` of other samples, after the last backward of a step and before `step`:
        nothing is exchanged, the gradients are handed over as by `local`, and go; those of the step stay."""
        with ExitStack() as stack:
            for each in (aside(self.parameters), self.accumulate(last=False), self.local(see)):
                stack.enter_context(each)
            yield

    def copies(self) -> "Sequence[Copies]":
        """Of weights and buffers, what other ranks have copies of: between steps, the same. As many on every rank."""
        named = dict([*self.bare.named_parameters(), *self.bare.named_buffers()])
        return [Copies(tuple(range(self.world.size)), named)]

    @abstractmethod
    def step(self, max_norm: float | None, measure: bool) -> torch.Tensor | None:
        """Clips, updates, clears the gradients.

        Args:
            max_norm: the largest global gradient norm; None does not clip.
            measure: return the norm even where nothing is clipped.

        Returns:
            The global gradient norm before clipping, a scalar on the device; None where it was not needed.
        """

    @abstractmethod
    def weights(self) -> dict[str, torch.Tensor]:
        """All weights by the model's own names, on the CPU, on rank 0; the other ranks may get none."""

    @abstractmethod
    def state(self) -> dict[str, Shards]:
        """What this rank holds of weights and optimizer state, not copied: `model.NAME` and `optim.NAME.KEY`, by the
        model's own names and the optimizer's keys."""

    @abstractmethod
    def load(self, saved: SavedTensors, read: Reader) -> list[str]:
        """Makes the optimizer's state that was saved, and has it filled. The weights were loaded before `prepare`.

        Args:
            saved: every tensor of the checkpoint, by name.
            read: fills the shards that it is given, by name.

        Returns:
            Lines for people about state that only the checkpoint or only the optimizer has.
        """

    @abstractmethod
    def updated(self) -> list[torch.Tensor]:
        """What the optimizer updates on this rank, always in the same order. When its `step` is called, their `grad` is
        the gradient of the whole step, clipped. Parts of a weight that ranks share out are disjoint."""

    def trained(self) -> list[torch.Tensor]:
        """The memory of `updated`, as plain tensors."""
        return [local_of(tensor) for tensor in self.updated()]

    @abstractmethod
    def named(self, tensors: Sequence[torch.Tensor]) -> dict[str, Shards]:
        """What tensors that lie as those of `trained` hold of each parameter, by the model's own names."""

    @abstractmethod
    def refresh(self) -> None:
        """Has the model compute with what `trained` holds, after that was written to."""


@dataclass(frozen=True)
class Copies:
    """What several ranks hold alike.

    Args:
        ranks: that do, the same for each of them.
        tensors: by the model's own names.
    """

    ranks: tuple[int, ...]
    tensors: Mapping[str, torch.Tensor]


def whole_norm(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """The norm of the gradients, on a rank that holds all of them."""
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def clip(
    parameters: list[nn.Parameter],
    norm_of: Callable[[list[nn.Parameter]], torch.Tensor],
    max_norm: float | None,
    measure: bool,
) -> torch.Tensor | None:
    """The global norm of the gradients, and clipping by it; see Backend.step."""
    if max_norm is None and not measure:
        return None
    norm = norm_of(parameters)
    if max_norm is not None:
        for several in _alike(parameters):
            nn.utils.clip_grads_with_norm_(several, max_norm, norm)
    return norm


def update(
    backend: Backend,
    norm_of: Callable[[list[nn.Parameter]], torch.Tensor],
    max_norm: float | None,
    measure: bool,
    averaged_over: int = 1,
) -> torch.Tensor | None:
    """The step of a backend whose gradients are in its parameters: takes the loss's scale out, clips, updates, clears,
    and settles the buffers. See Backend.step.

    Args:
        backend: has `optimizer`, `buffers` and `parameters` since `prepare`; to look these up goes through all modules.
        norm_of: the global norm of their gradients.
        max_norm: see Backend.step.
        measure: see Backend.step.
        averaged_over: ranks whose mean a scaled gradient is. To undo the mean in the loss, as is done without a scale,
            would let float16 overflow that many times sooner than in one process.
    """
    parameters, scale = backend.parameters, backend.scale
    if scale:
        for several in _alike(parameters):
            torch._foreach_div_([p.grad for p in several], scale.factor / averaged_over)
    asks = backend.skips or scale is not None
    norm = clip(parameters, norm_of, max_norm, measure or asks)
    finite = not asks or bool(norm.isfinite())  # waits for the device: whether there is a step depends on it
    if scale:
        scale.saw(finite)
    backend.taken = finite
    if finite:
        backend.optimizer.step()
    backend.buffers.settle(finite)
    for parameter in parameters:  # optimizer.zero_grad() takes ten times as long to do the same
        parameter.grad = None
    return norm


def _alike(parameters: Iterable[nn.Parameter]) -> Iterable[list[nn.Parameter]]:
    """Those with a gradient, apart by how they are shared out, as torch takes no list of several kinds."""
    found: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            found.setdefault(mesh_of(parameter.grad), []).append(parameter)
    return found.values()


def model_state(model: nn.Module) -> dict[str, Shards]:
    """The part of Backend.state that is the model's: parameters and buffers."""
    return {f"model.{name}": shards_of(value) for name, value in model.state_dict().items()}


def updated_of(model: nn.Module) -> list[torch.Tensor]:
    """Backend.updated, where the optimizer holds the model's own parameters."""
    return [p for _, p in _trained(model)]


def named_as(model: nn.Module, tensors: Sequence[torch.Tensor]) -> dict[str, Shards]:
    """Backend.named, where the optimizer holds the model's own parameters."""
    return {name: shards_as(p, tensor) for (name, p), tensor in zip(_trained(model), tensors, strict=True)}


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Shards]:
    """The part of Backend.state that is the optimizer's, where it holds the model's own parameters."""
    found = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if value is not None:  # SGD without momentum
                assert isinstance(value, torch.Tensor), f"optim.{name}.{key}: got {type(value)}, expected a tensor"
                found[f"optim.{name}.{key}"] = shards_of(value)
    return found


def load_optimizer(
    backend: Backend, model: nn.Module, optimizer: torch.optim.Optimizer, saved: SavedTensors, read: Reader
) -> list[str]:
    """Backend.load, where the optimizer holds the model's own parameters."""
    parameters, initial = dict(model.named_parameters()), Initial(optimizer, backend.config.optim.args)
    unused = backend.findings.unused
    wanted = {name: initial.of(p) if p.requires_grad else {} for name, p in parameters.items()}
    keys = optimizer_keys(saved, parameters)
    trained = [name for name, p in parameters.items() if p.requires_grad and p.numel() and name not in unused]
    _, lines = differences(keys, wanted, trained)
    keys = [(name, key) for name, key in keys if key in wanted[name]]
    state: dict[nn.Parameter, dict[str, torch.Tensor]] = {}
    for name, key in keys:
        entry, parameter = saved[f"optim.{name}.{key}"], parameters[name]
        like = parameter.detach()  # a shard, if the parameter is one
        same = tuple(entry.size) == tuple(like.shape) and like.dim() > 0
        value = torch.zeros_like(like) if same else torch.zeros(entry.size)
        state.setdefault(parameter, {})[key] = value.to(entry.properties.dtype)
    read({f"optim.{n}.{k}": shards_of(state[parameters[n]][k]) for n, k in keys})
    for parameter, values in state.items():
        initial.fill(parameter, values)
    for name, parameter in parameters.items() if state else ():
        if not parameter.numel():  # no file holds what has no elements
            alike = {key: torch.zeros_like(parameter.detach()) for key, value in wanted[name].items() if value.dim()}
            state.setdefault(parameter, {}).update(alike)
    groups = optimizer.state_dict()["param_groups"]
    order = [p for group in optimizer.param_groups for p in group["params"]]
    state = dict(optimizer.state) | state  # Adagrad makes its state when it is built
    numbered = {i: state[p] for i, p in enumerate(order) if p in state}
    optimizer.load_state_dict({"state": numbered, "param_groups": groups})  # it knows what belongs on which device
    return lines


def optimizer_keys(saved: SavedTensors, parameters: Mapping[str, nn.Parameter]) -> list[tuple[str, str]]:
    """Parameter and key of every tensor of optimizer state in a checkpoint."""
    found = []
    for path in saved:
        section, _, rest = path.partition(".")
        name, _, key = rest.rpartition(".")
        if section == "optim":
            assert name in parameters, f"{path}: got no such parameter"  # the model was compared before
            found.append((name, key))
    return found


def compile_(module: nn.Module, config: CompileConfig) -> None:
    """torch.compile of the module's forward, in place: the names of its parameters stay as they are, and the hooks
    that a library puts around forward stay outside of the graph."""
    if config.mode == "off":
        return
    inner = module.forward

    def forward(*args, **kwargs):  # of ours: a forward of torch.nn, such as nn.Linear's, is passed over in silence
        return inner(*args, **kwargs)

    module.forward = compiled(forward, config)


def compiled(function: Function, config: CompileConfig) -> Function:
    """torch.compile of a function, where the config asks for it."""
    if config.mode == "off":
        return function
    # Where torch was built for CUDA, the compiler says on a machine without a GPU that there is none.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    # Every layer that is compiled by itself is an entry of one cache.
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    # Graphs within the graph of a step are not possible.
    without = "-no-cudagraphs" if config.scope == "step" and config.mode == "max-autotune" else ""
    return torch.compile(function, mode=config.mode + without, fullgraph=config.fullgraph, dynamic=config.dynamic)


def to_cpu(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A copy that later steps do not change."""
    return {name: value.detach().cpu().clone() for name, value in state.items()}
