"""torch's fully_shard (FSDP2): each rank holds a part of every weight; a layer is gathered while it computes. On a mesh
of ranks there may be several copies of the model, and ranks that split each layer; see mesh.py."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from dist_train.backends import mesh
from dist_train.backends.base import (
    Backend,
    Copies,
    OptimizerFactory,
    Reader,
    SavedTensors,
    compile_,
    load_optimizer,
    model_state,
    named_as,
    optimizer_state,
    update,
    updated_of,
)
from dist_train.backends.gathered import whole_on_main
from dist_train.backends.local import See, aside
from dist_train.backends.local_gathered import seen_gathered
from dist_train.backends.matrices import lay_out
from dist_train.backends.mesh import DIMENSIONS
from dist_train.backends.ordered import ordered
from dist_train.backends.peers import check_peers
from dist_train.backends.pieces import check_pieces
from dist_train.backends.precision import Precision
from dist_train.backends.probe import NOTHING, Findings
from dist_train.backends.shards import Shards, mesh_of, real_of
from dist_train.config.tree import Config
from dist_train.models.blocks import blocks
from dist_train.ranks import dist
from dist_train.ranks.dist import World
from dist_train.ranks.journal import Journal


class FSDP2(Backend):
    """fully_shard on each layer and on the model, over the dimensions `replicate` and `shard` of backend.mesh: over all
    ranks, where none is given. What splits a layer over `tensor` has done that before.

    With backend.offload the shards of weights and gradients live on the CPU with the optimizer's state, and a layer's
    weights go to the device while it computes. Where the device is the CPU itself, nothing moves.

    What fully_shard does not take stays whole on every rank, with gradients that are summed before the step: scalars,
    complex weights, and those without elements.

    A weight has copies over `replicate`, and over `tensor` where its layer is not split: its gradient is the same in
    each of them, and counts once in the norm.
    """

    updates_all = False

    def __init__(self, config: Config, world: World, findings: Findings = NOTHING):
        super().__init__(config, world, findings)
        self.mesh = mesh.of(config, world.size)
        assert self.mesh.tensor == world.tensor, f"got {world}, expected a place in {self.mesh}"
        # Here, as it reads the numbers of ranks: prepare may be called with tensors without values.
        self.devices = self._devices()
        self.over = self.devices["replicate", "shard"] if self.mesh.replicate > 1 else self.devices["shard"]
        self.between = self.devices["tensor"] if self.mesh.tensor > 1 else None

    def prepare(self, model: nn.Module, optimizer_fn: OptimizerFactory) -> tuple[nn.Module, torch.optim.Optimizer]:
        """See Backend."""
        devices, over = self.devices, self.over
        if self.between is not None:
            from dist_train.backends.tensor import split  # many modules, which a run without it does not need

            split(model, self.between, self.config, self.findings)
        self.take(model)
        offload = OffloadPolicy()
        if self.config.backend.offload:
            offload = CPUOffloadPolicy(pin_memory=self.world.device.type != "cpu")  # pinned for copies to the device
        _make_contiguous(model)
        self.whole = [p for p in model.parameters() if p.dim() == 0 or p.is_complex() or not p.numel()]
        whole, unused = set(self.whole), set(self.findings.unused)
        self.summed = [
            p for name, p in model.named_parameters() if p in whole and p.requires_grad and name not in unused
        ]
        layers = [
            layer for layer in blocks(model, self.config.model.blocks) if not whole.issuperset(layer.parameters())
        ]
        for part in layers or [model]:
            compile_(part, self.config.compile)  # before it is sharded, so that gathering stays outside of its graph
        for layer in layers:
            fully_shard(layer, mesh=over, offload_policy=offload, ignored_params=whole)
        self.model = fully_shard(model, mesh=over, offload_policy=offload, ignored_params=whole)
        if self.start is not None:
            self.start.fill(model, torch.device("cpu") if self.config.backend.offload else self.world.device)
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                # Else the factor is a multiplication before the sum, which gloo does not have.
                module.set_force_sum_reduction_for_comms(True)
        self._order(devices)
        self.journal = Journal(model, layers, "fsdp2")
        self.syncs, self.checked = True, self.mesh.tensor == 1
        self.parameters = list(self.model.parameters())
        self.counted = {p for p in self.parameters if p not in whole and self._counts(p)}
        self.optimizer = optimizer_fn(self.model.named_parameters())
        if ":" in self.config.optim.name:
            self._check_own(devices)
        self._group_by_kind()
        lay_out(self.optimizer, self.world)
        return self.model, self.optimizer

    def _devices(self) -> DeviceMesh:
        """The ranks in the dimensions of the mesh that have several; `shard` is always one."""
        sizes = {name: n for name, n in zip(DIMENSIONS, self.mesh.sizes, strict=True) if n > 1 or name == "shard"}
        return dist.mesh(self.world.device.type, tuple(sizes.values()), tuple(sizes))

    def _copied(self, parameter: nn.Parameter) -> tuple[str, ...]:
        """The dimensions over which a sharded weight has copies."""
        dims = zip(parameter.device_mesh.mesh_dim_names, parameter.placements, strict=True)
        split = {name for name, placement in dims if not isinstance(placement, Replicate)}
        return tuple(name for name in DIMENSIONS if name not in split)

    def _counts(self, parameter: nn.Parameter) -> bool:
        """Whether this rank's part of a weight is the first of its copies."""
        return self.mesh.alike(self.world.rank, self._copied(parameter))[0] == self.world.rank

    def _order(self, devices: DeviceMesh) -> None:
        """Has the gradients added up in order, if the config asks for it. In one process fully_shard sums nothing."""
        alone, whole = self.world.size == 1, set(self.summed)
        taken = ((name, p) for name, p in self.model.named_parameters() if alone or p in whole)
        self.ordered = ordered(self.config, self.findings, taken)
        self.scatters = []
        if self.ordered and not alone:
            from dist_train.backends.ordered_scatter import OrderedScatter

            replicas = devices["replicate"].get_group() if self.mesh.replicate > 1 else None
            for module in self.model.modules():
                if isinstance(module, FSDPModule):
                    self.scatters.append(OrderedScatter(replicas))
                    module.set_custom_reduce_scatter(self.scatters[-1])

    def accumulate(self, last: bool) -> AbstractContextManager:
        """See Backend."""
        for scatter in self.scatters:
            scatter.last = last
        self._sync(last or self.ordered is not None)  # each micro-batch is a leaf
        return nullcontext()

    def _sync(self, syncs: bool) -> None:
        """Whether gradients are exchanged in the next backward."""
        if syncs != self.syncs:  # it goes through all modules
            self.model.set_requires_gradient_sync(syncs)
            self.syncs = syncs

    def differentiate(self, loss: torch.Tensor) -> None:
        """See Backend."""
        loss.backward(loss.new_full((), self.scale.factor) if self.scale else None)

    def local(self, see: See) -> AbstractContextManager[None]:
        """See Backend."""
        return seen_gathered(self.model, see)

    @contextmanager
    def apart(self, see: See) -> Iterator[None]:
        """See Backend. Collective, as layers are gathered: every rank has as many micro-batches."""
        self._sync(False)  # also where each micro-batch is a leaf
        with aside(self.whole), seen_gathered(self.model, see) as gathered:
            yield
            for parameter in gathered.values():
                parameter.grad = None  # else the next exchange would take it along

    def copies(self) -> list[Copies]:
        """See Backend. What is sharded has copies on the ranks that differ from this one in other dimensions alone."""
        whole, found = set(self.whole), dict[tuple[str, ...], dict[str, torch.Tensor]]()
        found[DIMENSIONS] = dict(self.model.named_buffers())
        for name, parameter in self.model.named_parameters():
            over = DIMENSIONS if parameter in whole else self._copied(parameter)
            found.setdefault(over, {})[name] = parameter.detach()
        every = [Copies(self.mesh.alike(self.world.rank, over), tensors) for over, tensors in found.items()]
        return [copies for copies in every if len(copies.ranks) > 1]

    def step(self, max_norm: float | None, measure: bool) -> torch.Tensor | None:
        """See Backend."""
        if self.ordered:
            self.ordered.settle()
        else:
            self._sum_whole()
        if not self.checked:
            self._check_peers()
        return update(self, self._norm, max_norm, measure)

    def weights(self) -> dict[str, torch.Tensor]:
        """See Backend."""
        return whole_on_main(self.model.state_dict(), self.world)

    def state(self) -> dict[str, Shards]:
        """See Backend."""
        return model_state(self.model) | optimizer_state(self.model, self.optimizer)

    def load(self, saved: SavedTensors, read: Reader) -> list[str]:
        """See Backend."""
        return load_optimizer(self, self.model, self.optimizer, saved, read)

    def updated(self) -> list[torch.Tensor]:
        """See Backend."""
        return updated_of(self.model)

    def named(self, tensors: Sequence[torch.Tensor]) -> dict[str, Shards]:
        """See Backend."""
        return named_as(self.model, tensors)

    def refresh(self) -> None:
        """See Backend."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # what the root has gathered stays after a forward, and would not be gathered again

    def _check_peers(self) -> None:
        """Holds the gradients of weights that no layer splits against those of the ranks that split layers with this
        one: before the first step. Raises ConfigError. Collective."""
        self.checked, whole = True, set(self.whole)
        named = [(name, p) for name, p in self.model.named_parameters() if p in whole or "tensor" in self._copied(p)]
        check_peers({name: p.grad for name, p in named if p.grad is not None}, self.world)

    def _check_own(self, devices: DeviceMesh) -> None:
        """Raises ConfigError where the user's own optimizer does not take sharded weights as it takes whole ones."""

        def joined(pieces: Sequence[torch.Tensor]) -> list[torch.Tensor]:
            return [piece.full_tensor() for piece in pieces]

        def cut(matrix: torch.Tensor) -> list[torch.Tensor]:
            return [distribute_tensor(matrix.to(self.world.device), devices, [kinds[name] for name in names])]

        names, kinds = devices.mesh_dim_names or (), {"replicate": Replicate(), "shard": Shard(0), "tensor": Shard(1)}

        optim = self.config.optim
        check_pieces(optim.name, self.optimizer, optim.args, "fsdp2", cut, joined)

    def _group_by_kind(self) -> None:
        """Parts the optimizer's groups by how weights are shared out: torch takes no list of several kinds."""
        for group in list(self.optimizer.param_groups):
            kinds: dict[DeviceMesh | None, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                kinds.setdefault(mesh_of(parameter), []).append(parameter)
            group["params"], *others = kinds.values()
            for parameters in others:
                self.optimizer.add_param_group({**group, "params": parameters})

    def _sum_whole(self) -> None:
        """Sums the gradients of whole weights over the data ranks, in one message. Collective."""
        if not self.summed:
            return
        for parameter in self.summed:
            if parameter.grad is None:  # this rank took another way through the layers
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in self.summed]
        numbers = [real_of(g).reshape(-1) for g in gradients]
        sums = dist.sum_(torch.cat(numbers)).split([len(n) for n in numbers])
        for gradient, values in zip(gradients, sums, strict=True):
            real = values.view(*gradient.shape, 2) if gradient.is_complex() else values.view(gradient.shape)
            gradient.copy_(torch.view_as_complex(real) if gradient.is_complex() else real)

    def _norm(self, parameters: Sequence[nn.Parameter]) -> torch.Tensor:
        """The norm of gradients of which each rank holds a part, on the device. Collective."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self.ordered:  # each whole, as in one process
            norms = [torch.linalg.vector_norm(g.full_tensor() if isinstance(g, DTensor) else g) for g in gradients]
            return torch.linalg.vector_norm(torch.stack(norms))
        shards = [p.grad.to_local() for p in parameters if p.grad is not None and p in self.counted]
        whole = [g for g in gradients if not isinstance(g, DTensor)]
        # The ranks' shards are disjoint, so their squares add up; in float64 a square cannot overflow.
        squares = nn.utils.get_total_norm(shards).double().square()
        # Offloaded shards are on the CPU, where an accelerator's group does not sum.
        squares = dist.sum_over_all(squares.to(self.world.device))
        if whole:
            squares += nn.utils.get_total_norm(whole).double().square()
        return squares.sqrt().to(Precision(self.config.train.precision, self.world.device).dtype)


def _make_contiguous(model: nn.Module) -> None:
    """Lays weights out by rows, as fully_shard takes them. What they are multiplied with keeps its own order."""
    for parameter in model.parameters():
        if not parameter.is_contiguous():
            parameter.data = parameter.data.contiguous()
