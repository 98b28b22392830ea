"""Norms over a batch whose statistics are of a stated set of samples, never of whatever a rank happened to get.

torch's BatchNorm takes the mean and variance of what it is called with: of a rank's micro-batch. Here they are of the
whole step, over all ranks (`global`), or of fixed groups of samples in the step's order (`group`). What a norm
remembers of them, its running statistics, is the same on all ranks.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from dist_train.models.exchanges import exchanged
from dist_train.models.running import counts
from dist_train.ranks import dist

# Of these forwards it is known what they compute; a subclass with one of its own may do anything.
KNOWN = (_BatchNorm.forward, nn.SyncBatchNorm.forward)


def norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """The norms over a batch by name: BatchNorm1d, 2d, 3d and SyncBatchNorm, and subclasses with the same forward."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and type(module).forward in KNOWN and "forward" not in vars(module)
    }


def exchange(model: nn.Module, group: int | None, ranks: int, compiles: bool) -> "Statistics":
    """Has the norms of a model take their statistics of the whole step, or of groups. Weights, names and what a
    checkpoint holds stay as they are.

    Args:
        model: on its device, not wrapped, sharded or compiled yet.
        group: samples of a group; None for the whole step.
        ranks: that train together.
        compiles: the model will be compiled.
    """
    found = norms(model)
    for module in found.values():
        if group is not None:
            module.__class__ = _of_groups(type(module))
            module.group = group
            if module.running_mean is not None:
                wide = torch.float32 if module.running_mean.device.type == "mps" else torch.float64
                sums = torch.zeros(2 * module.num_features + 1, dtype=wide, device=module.running_mean.device)
                module.register_buffer("group_sums", sums, persistent=False)
        elif ranks > 1:
            module.__class__ = _of_all(type(module), compiles)
        elif type(module) in (nn.BatchNorm2d, nn.BatchNorm3d):
            module.__class__ = _of_one(type(module))
        elif isinstance(module, nn.SyncBatchNorm):  # which refuses the CPU where a group of one rank has started
            module.__class__ = _derived(type(module), _BatchNorm.forward)
    return Statistics(found, [m for m in found.values() if group is not None and m.running_mean is not None])


class Statistics:
    """The running statistics of a model's norms.

    Args:
        found: the norms by name.
        by_group: those that remember statistics of groups.
    """

    def __init__(self, found: dict[str, _BatchNorm], by_group: list[_BatchNorm]):
        self.by_group = by_group
        self.buffers = {f"{name}.{own}" if name else own for name, norm in found.items() for own in norm._buffers}

    @torch.no_grad()
    def settle(self, taken: bool) -> None:
        """Ends a step: what the norms saw in it goes into their running statistics, the same on all ranks; or is
        forgotten, where the step was left out. Collective.

        The running statistics move once a step, by the mean over its groups, weighted by their numbers of values.
        """
        if not self.by_group:
            return
        sums = [norm.group_sums for norm in self.by_group]
        if taken:
            flat = dist.sum_(torch.cat(sums))
            for norm, part in zip(self.by_group, flat.split([len(each) for each in sums]), strict=True):
                _remember_groups(norm, part)
        torch._foreach_zero_(sums)


def _remember_groups(norm: _BatchNorm, sums: torch.Tensor) -> None:
    """Moves the running statistics by those of a step.

    Args:
        norm: with running statistics.
        sums: [2 * features + 1]: of means and of variances, each times its number of values; and these numbers.
    """
    count, kind = sums[-1], norm.running_mean.dtype
    seen = count > 0  # the step may have left the norm out
    norm.num_batches_tracked.add_(seen)
    mean, var = (sums[:-1] / count.clamp(min=1)).to(kind).split(norm.num_features)
    factor = seen.to(kind) * _momentum(norm)
    norm.running_mean.lerp_(mean, factor)
    norm.running_var.lerp_(var, factor)


def _momentum(norm: _BatchNorm) -> torch.Tensor | float:
    """By how much the running statistics move; without a momentum they are the mean of all so far."""
    if norm.momentum is not None:
        return norm.momentum
    return norm.num_batches_tracked.clamp(min=1).to(norm.running_mean.dtype).reciprocal()


def _derived(kind: type[_BatchNorm], forward: Callable[..., torch.Tensor]) -> type[_BatchNorm]:
    """The class with another forward, under its own name."""
    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


def _evaluated(norm: _BatchNorm, x: torch.Tensor) -> torch.Tensor:
    """What torch's own gives in evaluation; SyncBatchNorm's asks for an accelerator."""
    norm._check_input_dim(x)
    of_batch = norm.running_mean is None and norm.running_var is None
    remembered = norm.running_mean, norm.running_var
    found = F.batch_norm(_unambiguous(x), *remembered, norm.weight, norm.bias, of_batch, 0.0, norm.eps)
    return found.view(x.shape)


def _remembers(norm: _BatchNorm) -> bool:
    return norm.track_running_stats and norm.running_mean is not None


def _wide(x: torch.Tensor) -> torch.dtype:
    """The type of statistics: no short one."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _unambiguous(x: torch.Tensor) -> torch.Tensor:
    """A single sample [1, features, height, width] as [1, features, values]; several as they are.

    The memory layout of a single one has two names. torch's backward on CPUs (seen in 2.14) takes that of values and of
    gradients for the same one where it is not, and gives wrong gradients without a word.
    """
    return x.flatten(2) if len(x) == 1 and x.dim() > 3 else x


@cache
def _of_one(kind: type[_BatchNorm]) -> type[_BatchNorm]:
    """torch's own, which gets a single sample so."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        kind._check_input_dim(self, x)
        return kind.forward(self, _unambiguous(x)).view(x.shape)

    found = _derived(kind, forward)
    found._check_input_dim = lambda self, x: None  # it is checked before
    return found


# -- of groups ---------------------------------------------------------------------------------------------------------


@cache
def _of_groups(kind: type[_BatchNorm]) -> type[_BatchNorm]:
    return _derived(kind, _by_group)


def _by_group(self: Any, x: torch.Tensor) -> torch.Tensor:
    """forward. x is [samples, features, ...], from the first sample of a group on."""
    if not self.training:
        return _evaluated(self, x)
    self._check_input_dim(x)
    remembers = _remembers(self)
    parts = x.split(self.group)
    kept: list[tuple[torch.Tensor | None, torch.Tensor | None]] = [(None, None)] * len(parts)
    if remembers:
        found = self.running_mean.new_zeros(len(parts), 2, x.shape[1])
        kept = [(mean, var) for mean, var in found]
    # What torch remembers with a momentum of 1 is the last batch's mean, and its variance as an unbiased estimate.
    of_all = self.weight, self.bias, True, 1.0, self.eps
    outputs = [
        F.batch_norm(_unambiguous(part), *each, *of_all).view_as(part) for part, each in zip(parts, kept, strict=True)
    ]
    if remembers and counts():
        self.group_sums.add_(_weighted(found.to(self.group_sums.dtype), x, self.group))
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def _weighted(found: torch.Tensor, x: torch.Tensor, group: int) -> torch.Tensor:
    """What `_remember_groups` takes, of means and variances [groups, 2, features]."""
    whole, rest = len(x) // group, len(x) % group  # the compiler knows no divmod
    each = x[0, 0].numel()  # values of a sample, for a feature
    sums = found[:whole].sum(0).flatten() * (group * each)
    if rest:
        sums = sums + found[whole].flatten() * (rest * each)
    return torch.cat([sums, sums.new_full((1,), len(x) * each)])


# -- of the whole step -------------------------------------------------------------------------------------------------


@cache
def _of_all(kind: type[_BatchNorm], compiles: bool) -> type[_BatchNorm]:
    # Between graphs, so that all ranks have their exchanges in the same order, whatever the compiler does to a graph.
    return _derived(kind, torch.compiler.disable(_over_ranks) if compiles else _over_ranks)


def _over_ranks(self: Any, x: torch.Tensor) -> torch.Tensor:
    """forward. x is [samples, features, ...]; its samples count, or are a stand-in. Collective in training."""
    if not self.training:
        return _evaluated(self, x)
    self._check_input_dim(x)
    counted = counts()
    mean, var, count = _merged(_moments(x.detach(), counted))
    if _remembers(self):
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            _remember(self, mean, var, count)
    return _Normalized.apply(x, self.weight, self.bias, mean.to(_wide(x)), var.to(_wide(x)), count, counted, self.eps)


def _remember(norm: _BatchNorm, mean: torch.Tensor, var: torch.Tensor, count: torch.Tensor) -> None:
    """Moves the running statistics by those of a step, as torch does: the variance as an unbiased estimate."""
    kind, factor = norm.running_mean.dtype, _momentum(norm)
    norm.running_mean.lerp_(mean.to(kind), factor)
    norm.running_var.lerp_((var * (count / (count - 1))).to(kind), factor)


def _moments(x: torch.Tensor, counted: bool) -> torch.Tensor:
    """Of this rank's values [samples, features, ...]: their number, then mean and variance of each feature, float64
    [1 + 2 * features]; of none where they do not count."""
    features = x.shape[1]
    moments = torch.zeros(1 + 2 * features, dtype=torch.float64, device=x.device)
    if counted and x.numel():
        moments[0] = x.numel() // features
        mean, var = torch.batch_norm_update_stats(x.to(_wide(x)), None, None, 0.0)
        moments[1:] = torch.cat([mean, var])
    return moments


def _merged(mine: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean, variance and number of the values of all ranks, from the moments of each. Collective.

    Source: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
    """
    every = exchanged(dist.stack, mine)  # [ranks, 1 + 2 * features]
    numbers, moments = every[:, :1], every[:, 1:]
    means, variances = moments.chunk(2, 1)
    count = numbers.sum()
    mean = (numbers * means).sum(0) / count
    var = (numbers * (variances + (means - mean).square())).sum(0) / count
    return mean, var, count


class _Normalized(torch.autograd.Function):
    """Values normalized by statistics of all ranks, through which gradients flow back to the values of all ranks."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, mean: torch.Tensor,
        var: torch.Tensor, count: torch.Tensor, counted: bool, eps: float,
    ) -> torch.Tensor:  # fmt: skip
        ctx.save_for_backward(x, weight, mean, var, count)
        ctx.counted, ctx.eps, ctx.dtype = counted, eps, x.dtype
        wide = [None if p is None else p.to(mean.dtype) for p in (weight, bias)]
        return F.batch_norm(x, mean, var, *wide, training=False, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, mean, var, count = ctx.saved_tensors
        invstd = (var + ctx.eps).rsqrt()
        wide, values = gradient.to(mean.dtype), x.to(mean.dtype)
        if x.numel():
            # Sums over this rank's values: of the gradients, and of the gradients times the normalized values.
            both = _unambiguous(wide), _unambiguous(values)
            _, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
                *both, torch.ones_like(mean), None, None, mean, invstd, True, ctx.eps, [False, True, True]
            )
        else:
            of_weight, of_bias = torch.zeros_like(mean), torch.zeros_like(mean)
        of_x = _of_values(ctx, wide, values, weight, mean, invstd, count, of_weight, of_bias)
        of_parameters = [None if weight is None else each.to(weight.dtype) for each in (of_weight, of_bias)]
        return of_x, *of_parameters, None, None, None, None, None


def _of_values(
    ctx: Any, gradient: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, mean: torch.Tensor,
    invstd: torch.Tensor, count: torch.Tensor, of_weight: torch.Tensor, of_bias: torch.Tensor,
) -> torch.Tensor | None:  # fmt: skip
    """The gradient of the values, in their own type. Collective, where they have one."""
    if not ctx.needs_input_grad[0]:
        return None
    sums = torch.cat([of_weight, of_bias]).double()
    if not ctx.counted:
        sums.zero_()
    along, across = (exchanged(dist.sum_, sums) / count).to(mean.dtype).chunk(2)
    scale = invstd if weight is None else invstd * weight.to(mean.dtype)
    shape = [-1] + [1] * (x.dim() - 2)
    if not ctx.counted:  # no statistics are of these values
        return (gradient * scale.view(shape)).to(ctx.dtype)
    found = (x - mean.view(shape)).mul_((-scale * invstd * along).view(shape))
    found.addcmul_(gradient, scale.view(shape)).sub_((scale * across).view(shape))
    return found.to(ctx.dtype)
