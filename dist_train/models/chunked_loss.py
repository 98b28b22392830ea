"""The cross-entropy of a linear layer's outputs, a chunk of rows at a time: the logits of a large vocabulary are the
largest tensor of a language model by far, and are never whole in memory."""

import sys
from typing import Any

import torch
import torch.distributed as torch_dist
import torch.nn.functional as F

IGNORED = -100  # a target that counts for nothing; torch's cross_entropy and transformers ignore the same
AT_ONCE = 1 << 24  # logits: 64 MiB in float32


def chunked_loss(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The loss of each target, in float32 (float64 of float64); 0 of those that are -100. Under autocast the logits are
    computed in its format, as a linear layer computes them.

    Args:
        hidden: [..., width].
        weight: of the linear layer, [vocab, width]. Tensor ranks may have a part of the vocabulary each: a DTensor.
        targets: int64 [...].
    """
    dtensor = sys.modules.get("torch.distributed.tensor")  # takes long to import; without it there is no DTensor
    if dtensor is not None and isinstance(weight, dtensor.DTensor):
        return _of_parts(dtensor, hidden, weight, targets)
    rows, numbers = hidden.flatten(0, -2), targets.flatten()
    if rows.shape[0] * weight.shape[0] <= AT_ONCE:
        logits = F.linear(rows, weight)
        losses = F.cross_entropy(_wide(logits), numbers, ignore_index=IGNORED, reduction="none")
    else:
        losses = _Chunked.apply(rows, weight, numbers, _short(hidden))
    return losses.view(targets.shape).clone()  # as fully_shard warns of a model that returns a view


class _Chunked(torch.autograd.Function):
    """The backward computes the logits of a chunk again. A weight that a backend takes apart between forward and
    backward is whole again when the backward asks for it, as it is saved itself, and not what was made of it."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, short: torch.dtype
    ) -> torch.Tensor:  # fmt: skip
        """Losses [rows] of rows [rows, width]."""
        size = max(1, AT_ONCE // weight.shape[0])
        inner, losses, logs = weight.to(short), [], []
        with torch.autocast(rows.device.type, enabled=False):
            for part, right in zip(rows.split(size), targets.split(size), strict=True):
                logits = _wide(part.to(short) @ inner.T)
                log = logits.logsumexp(1)
                chosen = logits.gather(1, right.clamp(min=0)[:, None])[:, 0]
                losses.append((log - chosen).where(right != IGNORED, 0))
                logs.append(log)
                del logits  # before the next ones are there
        ctx.save_for_backward(rows, weight, targets, torch.cat(logs))
        ctx.short, ctx.size = short, size
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Of rows and weight, from that of the losses."""
        rows, weight, targets, logs = ctx.saved_tensors
        inner, of_rows = weight.to(ctx.short), []
        of_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        with torch.autocast(rows.device.type, enabled=False):
            each = (tensor.split(ctx.size) for tensor in (rows, targets, logs, gradient.where(targets != IGNORED, 0)))
            for part, right, log, factor in zip(*each, strict=True):
                part = part.to(ctx.short)
                logits = _wide(part @ inner.T)
                logits = (logits - log[:, None]).exp_().mul_(factor[:, None])
                logits.scatter_add_(1, right.clamp(min=0)[:, None], -factor[:, None])
                wrong = logits.to(ctx.short)  # the gradient of the logits
                of_rows.append((wrong @ inner).to(rows.dtype))
                if of_weight is not None:
                    of_weight += wrong.T @ part
                del logits, wrong
        return torch.cat(of_rows), of_weight, None, None


def _of_parts(dtensor: Any, hidden: torch.Tensor, weight: Any, targets: torch.Tensor) -> torch.Tensor:
    """The same on each of the ranks that have a part of the vocabulary."""
    mesh, placements = weight.device_mesh, weight.placements
    assert placements == (dtensor.Shard(0),), f"got a vocabulary that lies as {placements}, expected parts of its rows"
    if not isinstance(hidden, dtensor.DTensor):
        hidden = dtensor.DTensor.from_local(hidden, mesh, [dtensor.Replicate()], run_check=False)
    rows = hidden.to_local(grad_placements=[dtensor.Partial()]).flatten(0, -2)  # of its part of the vocabulary alone
    each = -(-weight.shape[0] // mesh.size())
    first = each * mesh.get_local_rank()
    mine = targets.flatten() - first
    losses = _Parts.apply(rows, weight.to_local(), mine, _short(rows), each, mesh.get_group())
    return losses.where(targets.flatten() != IGNORED, 0).view(targets.shape).clone()


class _Parts(torch.autograd.Function):
    """As _Chunked, with a part of the vocabulary: ranks exchange the largest logit of a row, the sum of exponentials
    and the logit of the target, which one of them has."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, short: torch.dtype, each: int,
        group: Any,
    ) -> torch.Tensor:  # fmt: skip
        """Losses [rows] of rows [rows, width]. `targets` count from this rank's first; `each` is what the first has."""
        size = max(1, AT_ONCE // each)  # the same on all ranks
        inner, losses, logs = weight.to(short), [], []
        here = (targets >= 0) & (targets < weight.shape[0])
        with torch.autocast(rows.device.type, enabled=False):
            for part, right, is_here in zip(rows.split(size), targets.split(size), here.split(size), strict=True):
                logits = _wide(part.to(short) @ inner.T)
                largest = logits.amax(1)
                torch_dist.all_reduce(largest, torch_dist.ReduceOp.MAX, group)
                logits -= largest[:, None]
                chosen = logits.gather(1, right.where(is_here, 0)[:, None])[:, 0].where(is_here, 0)
                sums = torch.stack([logits.exp_().sum(1), chosen])
                torch_dist.all_reduce(sums, group=group)
                log = sums[0].log()
                losses.append(log - sums[1])
                logs.append(log + largest)
                del logits  # before the next ones are there
        ctx.save_for_backward(rows, weight, targets, torch.cat(logs))
        ctx.short, ctx.size = short, size
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Of rows, by this part of the vocabulary, and of weight."""
        rows, weight, targets, logs = ctx.saved_tensors
        inner, of_rows = weight.to(ctx.short), []
        of_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        here = ((targets >= 0) & (targets < weight.shape[0])).to(gradient.dtype)
        with torch.autocast(rows.device.type, enabled=False):
            each = (tensor.split(ctx.size) for tensor in (rows, targets, logs, gradient, here))
            for part, right, log, factor, is_here in zip(*each, strict=True):
                part = part.to(ctx.short)
                logits = _wide(part @ inner.T)
                logits = (logits - log[:, None]).exp_().mul_(factor[:, None])
                logits.scatter_add_(1, right.clamp(0, weight.shape[0] - 1)[:, None], -(factor * is_here)[:, None])
                wrong = logits.to(ctx.short)  # the gradient of the logits
                of_rows.append((wrong @ inner).to(rows.dtype))
                if of_weight is not None:
                    of_weight += wrong.T @ part
                del logits, wrong
        return torch.cat(of_rows), of_weight, None, None, None, None


def _short(hidden: torch.Tensor) -> torch.dtype:
    """The format of matrix products."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _wide(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
