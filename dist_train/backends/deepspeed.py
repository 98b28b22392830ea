"""DeepSpeed's engine, ZeRO stages 0 to 3: optimizer state (1), gradients (2) and weights (3) are shared out."""

import json
import logging
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import nn

from dist_train.backends import fit, rules
from dist_train.backends.base import (
    Backend,
    Copies,
    OptimizerFactory,
    Reader,
    SavedTensors,
    clip,
    compile_,
    load_optimizer,
    model_state,
    named_as,
    optimizer_keys,
    optimizer_state,
    to_cpu,
    updated_of,
    whole_norm,
)
from dist_train.backends.gradients import Counted, Whole
from dist_train.backends.initial import Initial, differences, maker
from dist_train.backends.local import See, aside, coming
from dist_train.backends.matrices import NONE, Held, Part, SeesMatrices, lay_out, rows_of
from dist_train.backends.pieces import check_pieces
from dist_train.backends.precision import Precision
from dist_train.backends.probe import NOTHING, Findings
from dist_train.backends.shards import Shards, shards_of, shards_of_range
from dist_train.config.tree import Config
from dist_train.errors import ConfigError
from dist_train.models.blocks import blocks
from dist_train.ranks import dist
from dist_train.ranks.dist import World
from dist_train.ranks.journal import Journal


class DeepSpeed(Backend):
    """A DeepSpeed engine around our own optimizer. At stages 2 and 3 gradients are reduced in every micro-batch, as
    they are stored in parts; the sum is the same.

    With backend.offload the optimizer's state and step are on the CPU, by torch's own optimizer: DeepSpeed's would be
    compiled first, and is another program than the one of the other backends. Where the device is the CPU itself,
    nothing moves, and results differ by rounding alone.
    """

    def __init__(self, config: Config, world: World, findings: Findings = NOTHING):
        super().__init__(config, world, findings)
        self.library = _import(world)
        self.stage = config.backend.zero_stage or 0
        self.updates_all = self.stage == 0

    def prepare(self, model: nn.Module, optimizer_fn: OptimizerFactory) -> tuple[nn.Module, torch.optim.Optimizer]:
        """See Backend."""
        fit.check_model("deepspeed", self.findings, model, self.stage)
        self.bare, self.buffers = model, self.buffers_of(model)
        # Stage 3 gathers the weights of a layer in hooks around its forward, which a graph of the whole would break at.
        for part in (list(blocks(model, self.config.model.blocks)) if self.stage == 3 else []) or [model]:
            compile_(part, self.config.compile)
        _autocast_within(model, Precision(self.config.train.precision, self.world.device))
        asked = {name: p for name, p in model.named_parameters() if p.requires_grad and p.numel()}
        unused = self._unused() if self.stage else frozenset()
        trained = {name: p for name, p in asked.items() if name not in unused}
        self.optimizer = optimizer_fn(trained.items())
        made = bool(self.optimizer.state)
        if self.stage and ":" in self.config.optim.name:
            self._check_own()
        left_out = {name: p for name, p in asked.items() if name in unused}
        if self.stage:
            self.gradients = Whole(trained, left_out, self.stage)  # before a parameter loses its shape
        weights = sum(p.numel() for p in model.parameters())
        _broadcast(model)
        with _not_broadcast(self.library):
            self.engine, *_ = self.library.initialize(
                model=model,
                optimizer=self.optimizer,
                config=engine_config(self.config, weights, self.world),
                dist_init_required=False,
            )
        if self.stage == 3:
            holders = [m for m in model.modules() if next(m.parameters(recurse=False), None) is not None]
            self.journal = Journal(model, holders, "deepspeed at zero_stage 3")
        if self.stage:
            if made:
                self._begin_with_flats()
            if not self.config.backend.offload:
                self._keep_one_copy()
        else:
            self.counted = Counted(self.engine, list(asked.values()))
        self.optimized, self.parameters = trained, list(model.parameters())
        lay_out(self.optimizer, self.world, self._held() if self.stage else None)
        return self.engine, self.optimizer

    def accumulate(self, last: bool) -> AbstractContextManager:
        """See Backend."""
        self.engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        """See Backend."""
        if not self.stage:
            self.differentiate(loss)
            return
        last = self.engine.is_gradient_accumulation_boundary()
        self.gradients.watch(loss, last)
        self.differentiate(loss)
        self.gradients.check(last)

    def differentiate(self, loss: torch.Tensor) -> None:
        """See Backend."""
        # DeepSpeed divides the sum over ranks by their number. Its own way to a sum does not exist at stage 3.
        self.engine.backward(loss * self.world.size, scale_wrt_gas=False)

    def local(self, see: See) -> AbstractContextManager[None]:
        """See Backend."""
        return coming(self.optimized.items(), see) if self.stage else super().local(see)

    @contextmanager
    def apart(self, see: See) -> Iterator[None]:
        """See Backend. Collective at stage 3, as layers are gathered: every rank has as many micro-batches."""
        if not self.stage:
            with super().apart(see):
                yield
            self.engine.set_gradient_accumulation_boundary(True)
            return
        zero, takes = self.engine.optimizer, "reduce_ready_partitions_and_remove_grads"
        takes = takes if self.stage == 3 else "process_gradients"
        setattr(zero, takes, _drop)
        self.engine.inside_no_sync_ctxt = True
        try:
            with aside(self.parameters), self.local(see):
                yield
        finally:
            delattr(zero, takes)
            self.engine.inside_no_sync_ctxt = False
            self.gradients.seen.clear()

    def copies(self) -> Sequence[Copies]:
        """See Backend."""
        if self.stage < 3:
            return super().copies()
        return [Copies(tuple(range(self.world.size)), dict(self.bare.named_buffers()))]

    def step(self, max_norm: float | None, measure: bool) -> torch.Tensor | None:
        """See Backend."""
        if self.stage == 0:
            self.counted.settle()
            norm = clip(list(self.bare.parameters()), whole_norm, max_norm, measure or self.skips)
            self.taken = not self.skips or bool(norm.isfinite())
            if self.taken:
                self.engine.step()
            else:
                self.engine.zero_grad()
            self.buffers.settle(self.taken)
            return norm
        assert max_norm == self.config.train.grad_clip  # what the engine was told
        self.engine.step()
        self.taken = self.engine.was_step_applied()  # it leaves out a step that is not finite, asked to or not
        self.buffers.settle(self.taken or not self.skips)
        norm = self.engine.get_global_grad_norm() if self.taken else float("inf")
        return torch.as_tensor(norm, device=self.world.device)

    def weights(self) -> dict[str, torch.Tensor]:
        """See Backend."""
        if self.stage < 3:
            return to_cpu(self.bare.state_dict())
        self.engine.empty_partition_cache()  # an evaluation has layers fetched for a backward that does not come
        state = {}
        for name, value in self.bare.state_dict(keep_vars=True).items():
            with self.library.zero.GatheredParameters([value], enabled=isinstance(value, nn.Parameter)):
                if self.world.is_main:
                    state[name] = value.detach().cpu().clone()
        return state

    def state(self) -> dict[str, Shards]:
        """See Backend."""
        if self.stage == 0:
            return model_state(self.bare) | optimizer_state(self.bare, self.optimizer)
        fragments = self._fragments()
        found = model_state(self.bare) if self.stage < 3 else self._sharded_weights()
        for name, fragment in fragments.items():
            for key, value in self.optimizer.state[fragment.flat].items():
                whole = value.shape != fragment.flat.shape  # a count of steps
                found[f"optim.{name}.{key}"] = shards_of(value) if whole else fragment.of(value)
        return found

    def load(self, saved: SavedTensors, read: Reader) -> list[str]:
        """See Backend."""
        if self.stage == 0:
            return load_optimizer(self, self.bare, self.optimizer, saved, read)
        self.gradients.resumed()
        fragments, shards, initial = self._fragments(), {}, Initial(self.optimizer, self.config.optim.args)
        group_of, like = self._groups(), torch.empty(1, device=self.world.device)  # as every flat buffer
        wanted = {name: initial.of(like, group_of[name]) for name in self.optimized}
        parameters = dict(self.bare.named_parameters())
        keys = optimizer_keys(saved, parameters)
        kept = dict.fromkeys(parameters, next(iter(wanted.values()))) | wanted
        anew, lines = differences(keys, kept, self.optimized)
        if anew and any(not value.dim() for name in anew for value in wanted[name].values()):
            raise ConfigError(
                f"checkpoint.resume: got a checkpoint without optimizer state of {anew[0]}, whose count of steps would "
                f"begin anew, but ZeRO has one count for all; write --backend.name ddp or fsdp2, or "
                f"--backend.zero_stage 0"
            )
        counts: dict[tuple[torch.Tensor, str], list[torch.Tensor]] = {}  # what ZeRO keeps once for all its parameters
        for name, key in keys:
            fragment, path = fragments.get(name), f"optim.{name}.{key}"
            if fragment is None or key not in wanted[name]:
                continue  # on another rank, or no longer used
            state = self.optimizer.state[fragment.flat]
            if wanted[name][key].dim():
                if key not in state or state[key].shape != fragment.flat.shape:
                    state[key] = torch.zeros_like(fragment.flat)  # once for all parameters in the buffer
                shards[path] = fragment.of(state[key])
            else:
                value = torch.zeros(saved[path].size, dtype=saved[path].properties.dtype)
                counts.setdefault((fragment.flat, key), []).append(value)
                shards[path] = shards_of(value)
        read(shards)
        held = Counter(fragment.flat for fragment in fragments.values())
        number_of = {fragment.flat: group_of[name] for name, fragment in fragments.items()}
        for (flat, key), values in counts.items():
            group = self.optimizer.param_groups[number_of[flat]]
            on_device = group.get("fused") or group.get("capturable")
            # One that has none saved has counted nothing yet.
            if len(values) < held[flat] or any(not torch.equal(value, values[0]) for value in values):
                raise ConfigError(
                    f"checkpoint.resume: got a checkpoint whose parameters differ in their {key!r}, which ZeRO keeps "
                    f"once for all; write --backend.name ddp or fsdp2, or --backend.zero_stage 0"
                )
            self.optimizer.state[flat][key] = values[0].to(flat.device) if on_device else values[0]
        for flat, number in number_of.items():
            initial.fill(flat, self.optimizer.state[flat], number)
        return lines

    def updated(self) -> list[torch.Tensor]:
        """See Backend."""
        return self._flats() if self.stage else updated_of(self.bare)

    def named(self, tensors: Sequence[torch.Tensor]) -> dict[str, Shards]:
        """See Backend."""
        if not self.stage:
            return named_as(self.bare, tensors)
        at = dict(zip(self._flats(), tensors, strict=True))
        return {name: fragment.of(at[fragment.flat]) for name, fragment in self._fragments().items()}

    def refresh(self) -> None:
        """See Backend."""
        zero = self.engine.optimizer if self.stage else None
        if self.stage == 3:  # the end of its step
            zero._partition_all_parameters()
            for i in range(len(zero.fp16_groups)):
                zero._reassign_or_swap_out_partitioned_parameters(i)
            if zero.persistent_parameters:
                zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
        elif self.stage:
            zero.update_lp_params()

    def _flats(self) -> list[torch.Tensor]:
        """The weights of this rank's part, as the optimizer updates them at stages 1 to 3."""
        zero = self.engine.optimizer
        return zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups

    def _groups(self) -> dict[str, int]:
        """The number of each trained parameter's group."""
        several = zip(self._group_of_flats(), self._members(), strict=True)
        number = {p: of for of, parameters in several for p in parameters}
        return {name: number[p] for name, p in self.optimized.items()}

    def _members(self) -> list[list[nn.Parameter]]:
        """The parameters of which each flat buffer holds this rank's part, in the order of the buffers."""
        zero = self.engine.optimizer
        return zero.fp16_groups if self.stage == 3 else zero.bit16_groups

    def _held(self) -> dict[torch.Tensor, list[Held]]:
        """The matrices of each flat buffer, for an optimizer that sees matrices; of some this rank has no part."""
        if not isinstance(self.optimizer, SeesMatrices):
            return {}
        name_of, fragments = {p: name for name, p in self.optimized.items()}, self._fragments()
        found: dict[torch.Tensor, list[Held]] = {}
        for flat, of, members in zip(self._flats(), self._group_of_flats(), self._members(), strict=True):
            if self.optimizer.sees(self.optimizer.param_groups[of]):
                found[flat] = []
                for parameter in members:
                    part = fragments.get(name_of[parameter])
                    shape = rows_of(parameter.ds_shape if self.stage == 3 else parameter.shape)
                    found[flat].append(
                        Held(shape, Part(part.start, part.count), part.offset) if part else Held(shape, NONE)
                    )
        return found

    def _group_of_flats(self) -> list[int]:
        """The number of the group of each flat buffer."""
        zero, flats = self.engine.optimizer, range(len(self._flats()))
        return [zero.sub_group_to_group_id[i] for i in flats] if self.stage == 3 else list(flats)

    def _check_own(self) -> None:
        """Raises ConfigError where the user's own optimizer does not take weights that are cut anywhere."""
        optim, where = self.config.optim, f"ZeRO {self.stage}"

        def cut(matrix: torch.Tensor) -> list[torch.Tensor]:
            flat = matrix.reshape(-1)
            return [flat[: len(flat) // 2 - 1].clone(), flat[len(flat) // 2 - 1 :].clone()]

        check_pieces(optim.name, self.optimizer, optim.args, where, cut, list)

    def _begin_with_flats(self) -> None:
        """Makes an optimizer again, for the flat buffers, whose state is made together with it, as Adagrad's is."""
        groups = [{**group, "params": list[torch.Tensor]()} for group in self.optimizer.param_groups]
        for flat, of in zip(self._flats(), self._group_of_flats(), strict=True):
            groups[of]["params"].append(flat)
        self.optimizer = self.engine.optimizer.optimizer = maker(self.optimizer, self.config.optim.args)(groups)
        if self.stage == 3:
            for group in self.optimizer.param_groups:
                group["params"] = []  # it is handed each buffer for the time of its step

    def _keep_one_copy(self) -> None:
        """Lets the optimizer update the model's own weights, and at stage 2 read the gradients where they were summed:
        DeepSpeed copies its part of them, for the case that the model's are not in float32."""
        zero = self.engine.optimizer
        if self.stage == 3:
            for flat, part in zip(zero.fp32_partitioned_groups_flat, zero.fp16_partitioned_groups_flat, strict=True):
                flat.data = part
            return
        for flat, parts in zip(
            zero.single_partition_of_fp32_groups, zero.parallel_partitioned_bit16_groups, strict=True
        ):
            flat.data = parts[self.world.rank]
        zero._link_all_hp_params()  # which have kept views of the copies
        if self.stage == 2:
            zero._use_compact_grad_partition_buffer = lambda group: True  # as for gradients of another type
            zero.copy_grads_in_partition = lambda parameter, group: zero.clear_grad_attribute(parameter)

    def _unused(self) -> frozenset[str]:
        """The parameters that got no gradient on any rank when the model was looked at. Collective."""
        seen = dist.gather(self.findings.unused)
        everywhere = frozenset(seen[0]).intersection(*seen)
        somewhere = sorted(frozenset().union(*seen) - everywhere)
        if somewhere:
            raise ConfigError(
                f"model: got no gradient of {fit.some(tuple(somewhere))} on some ranks, but on others, expected each "
                f"rank to use the same weights under ZeRO {self.stage}; write torchrun ... --backend.name ddp, or "
                f"--backend.zero_stage 0"
            )
        return everywhere

    def _fragments(self) -> dict[str, "Fragment"]:
        """What this rank holds of the optimizer's state of each trained parameter, at stages 1 to 3, by name."""
        zero, found = self.engine.optimizer, {}
        for name, parameter in self.optimized.items():
            if self.stage == 3:
                group, offset, count = zero.grad_position[zero.get_param_id(parameter)]
                flat, start = zero.fp32_partitioned_groups_flat[group], self.world.rank * count
                shape = tuple(parameter.ds_shape)
                count = min(count, parameter.ds_numel - start)  # the last rank's part is padded
            elif parameter._hp_mapping is None:
                continue
            else:
                mapping, shape = parameter._hp_mapping, tuple(parameter.shape)
                flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
                start, offset = mapping.lp_fragment_address.start, mapping.hp_fragment_address.start
                count = mapping.hp_fragment_address.numel
            if count > 0:
                found[name] = Fragment(shape, start, flat, offset, count)
        return found

    def _sharded_weights(self) -> dict[str, Shards]:
        """The weights of stage 3, of which parameters themselves hold nothing between steps."""
        found = {}
        for name, value in self.bare.state_dict(keep_vars=True).items():
            if not isinstance(value, nn.Parameter):
                found[f"model.{name}"] = shards_of(value)
                continue
            part = value.ds_tensor  # the last rank's is padded
            start = self.world.rank * part.ds_numel
            count = max(0, min(part.ds_numel, value.ds_numel - start))
            found[f"model.{name}"] = shards_of_range(tuple(value.ds_shape), start, part[:count])
        return found


@dataclass(frozen=True)
class Fragment:
    """A rank's part of a parameter in one of ZeRO's flat buffers.

    Args:
        shape: of the parameter.
        start: its first element here, in the parameter's memory order.
        flat: the buffer's weights; the optimizer's state is kept by this tensor.
        offset: where the part begins in the buffer.
        count: its elements.
    """

    shape: tuple[int, ...]
    start: int
    flat: torch.Tensor
    offset: int
    count: int

    def of(self, buffer: torch.Tensor) -> Shards:
        """The part in a buffer that lies as `flat` does."""
        return shards_of_range(self.shape, self.start, buffer.detach().narrow(0, self.offset, self.count))


def engine_config(config: Config, weights: int, world: World) -> dict[str, Any]:
    """DeepSpeed's JSON for a run: ours, and what the file of backend.config adds to it.

    Args:
        config: of the run. `rules` has checked that its file decides nothing that the config decides.
        weights: number of elements in the model.
        world: this rank's place.
    """
    stage = config.backend.zero_stage or 0
    part = rules.bucket_of(weights, world.size)
    zero = {"stage": stage, "reduce_bucket_size": part, "allgather_bucket_size": part}
    if stage == 3:
        zero = {
            "stage": 3,
            "reduce_bucket_size": part,
            "stage3_prefetch_bucket_size": part,
            "stage3_max_live_parameters": 2 * part,  # else every layer prefetches further ones
            "stage3_max_reuse_distance": part,
            "stage3_model_persistence_threshold": part,
            "sub_group_size": max(part, weights // (8 * world.size)),
        }
    if config.backend.offload:
        # Pinned memory is for copies to an accelerator; where the device is the CPU, this changes nothing.
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": world.device.type != "cpu"}
    ours = {
        # The loop owns batches: it divides the loss, and says which micro-batch is the last of a step.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # Its default is 1.0, not off. At stage 0 its norm is not to be had, so we clip ourselves.
        "gradient_clipping": (config.train.grad_clip or 0.0) if stage else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # with offload, it asks for its own
        "steps_per_print": None,
    }
    file = config.backend.config
    return ours if file is None else _merged(ours, json.loads(Path(file).read_text(encoding="utf-8")))


def _merged(ours: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """`ours` with the keys of `extra`, object by object. What both have is a default of ours."""
    nested = {k: _merged(v, extra[k]) for k, v in ours.items() if isinstance(v, dict) and k in extra}
    return ours | extra | nested


def _drop(parameter: nn.Parameter, *_: Any) -> None:
    """In place of the hook of ZeRO's that takes a gradient away, to reduce it."""
    parameter.grad = None


def _broadcast(model: nn.Module) -> None:
    """Gives every rank the weights of rank 0. Collective."""
    for parameter in model.parameters():
        flat = parameter.detach().reshape(-1)  # a copy where its memory is in another order
        torch_dist.broadcast(torch.view_as_real(flat) if flat.is_complex() else flat.view(torch.uint8), 0)
        if flat.data_ptr() != parameter.data_ptr():
            parameter.data.copy_(flat.view(parameter.shape))


@contextmanager
def _not_broadcast(library: Any) -> Iterator[None]:
    """Keeps DeepSpeed from broadcasting the weights itself: it asks for a view as bytes, which a scalar, a complex
    weight and one in channels_last do not have."""
    engine, init = library.DeepSpeedEngine, library.zero.Init
    own = engine._broadcast_model, init._zero_init_param

    def share_out(self: Any, parameter: nn.Parameter) -> None:
        self._convert_to_deepspeed_param(parameter)
        parameter.partition()

    engine._broadcast_model, init._zero_init_param = (lambda self: None), share_out
    try:
        yield
    finally:
        engine._broadcast_model, init._zero_init_param = own


def _autocast_within(model: nn.Module, precision: Precision) -> None:
    """Enters autocast in the model's own forward: on an accelerator the engine turns off what is around its own."""
    inner = model.forward

    def forward(*args, **kwargs):
        with precision.autocast():
            return inner(*args, **kwargs)

    model.forward = forward


def _import(world: World) -> Any:
    """The library, with what it says about itself silenced at the source, and no compiler started."""
    if world.device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # else it looks for one, and prints what it found
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))  # it reads no other launcher's variable
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    import deepspeed
    from deepspeed.runtime.zero import stage_1_and_2

    deepspeed.utils.logger.setLevel(logging.WARNING)
    # Every optimizer of torch's is untested, and autocast is entered within the model.
    beside_the_point = ("untested optimizer", "torch.autocast is enabled outside")
    deepspeed.utils.logger.addFilter(lambda record: not any(said in record.getMessage() for said in beside_the_point))
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")  # its own calls
    if world.device.type == "cpu":
        stage_1_and_2.all_gather_dp_groups = _gather_in_pieces
    # A faster all-reduce between processes of one machine, compiled at the first run: 44 s for milliseconds.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _gather_in_pieces(
    partitioned_param_groups: list[list[torch.Tensor]], dp_process_group: list, allgather_bucket_size: int, **_: Any
) -> None:
    """Gathers the updated weights at stages 1 and 2, in place of DeepSpeed's function of the same arguments: gloo first
    gathers into memory of its own, so a bucket at a time.

    Args:
        partitioned_param_groups: the ranks' parts of the weights, by group.
        dp_process_group: the ranks, by group.
        allgather_bucket_size: elements of all ranks.
    """
    for parts, group in zip(partitioned_param_groups, dp_process_group, strict=True):
        mine, size = torch_dist.get_rank(group), max(1, allgather_bucket_size // len(parts))
        for pieces in zip(*(part.detach().split(size) for part in parts), strict=True):
            torch_dist.all_gather(list(pieces), pieces[mine], group)
