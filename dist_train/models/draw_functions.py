"""torch's functions that drop at random, with masks that are a function of the sample and the place; see draws.py.

Outside of a forward that is trained on they are torch's own.
"""

import sys
import traceback
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from dist_train.errors import ConfigError
from dist_train.models.draw_bits import kept
from dist_train.models.draw_places import Kind, now

ALPHA = 1.7580993408473766  # of selu: what a dropped unit of alpha dropout is, negated
# Where the samples are in a tensor: in the first dimension; in the second, as in sequences before batches; in the first
# with several rows of each together, such as its heads; nowhere, so that all samples of a step share a mask.
FIRST, SECOND, FOLDED, SHARED = range(4)
DEPTH = "torchvision.ops.stochastic_depth"
_dropout, _sdpa, _attention = F.dropout, F.scaled_dot_product_attention, F.multi_head_attention_forward
# The compiler takes torch's own as a whole, and so would not see the functions in it that are replaced.
_attention_inlined = FunctionType(_attention.__code__, _attention.__globals__, "inlined", _attention.__defaults__)
_dropout1d, _dropout2d, _dropout3d = F.dropout1d, F.dropout2d, F.dropout3d
_alpha_dropout, _feature_alpha_dropout = F.alpha_dropout, F.feature_alpha_dropout
_depth: list[Any] = []  # torchvision's own, where that has been imported


def replacements() -> dict[Any, Any]:
    """Ours, by the functions that they stand for."""
    found = {
        _dropout: dropout,
        _dropout1d: dropout1d,
        _dropout2d: dropout2d,
        _dropout3d: dropout3d,
        _alpha_dropout: alpha_dropout,
        _feature_alpha_dropout: feature_alpha_dropout,
        _sdpa: scaled_dot_product_attention,
        _attention: multi_head_attention_forward,
    }
    if DEPTH in sys.modules:
        _depth[:] = [_depth[0] if _depth else sys.modules[DEPTH].stochastic_depth]
        found[_depth[0]] = stochastic_depth
    return found


def dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """See torch.nn.functional."""
    if not _draws(input, p, training):
        return _dropout(input, p, training, inplace)
    return _times(input, _kept(input, input.shape, p, 1 / (1 - p)), inplace)


def dropout1d(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """See torch.nn.functional."""
    if not _draws(input, p, training):
        return _dropout1d(input, p, training, inplace)
    return _times(input, _channels(input, p, 1 / (1 - p), 2), inplace)


def dropout2d(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """See torch.nn.functional."""
    if not _draws(input, p, training):
        return _dropout2d(input, p, training, inplace)
    return _times(input, _channels(input, p, 1 / (1 - p)), inplace)


def dropout3d(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """See torch.nn.functional."""
    if not _draws(input, p, training):
        return _dropout3d(input, p, training, inplace)
    return _times(input, _channels(input, p, 1 / (1 - p), 4), inplace)


def alpha_dropout(input: torch.Tensor, p: float = 0.5, training: bool = False, inplace: bool = False) -> torch.Tensor:
    """See torch.nn.functional."""
    if not _draws(input, p, training):
        return _alpha_dropout(input, p, training, inplace)
    return _alpha(input, _kept(input, input.shape, p, 1.0), p, inplace)


def feature_alpha_dropout(
    input: torch.Tensor, p: float = 0.5, training: bool = False, inplace: bool = False
) -> torch.Tensor:
    """See torch.nn.functional."""
    if not _draws(input, p, training):
        return _feature_alpha_dropout(input, p, training, inplace)
    return _alpha(input, _channels(input, p, 1.0), p, inplace)


def stochastic_depth(input: torch.Tensor, p: float, mode: str, training: bool = True) -> torch.Tensor:
    """See torchvision.ops. In the mode "batch" all samples of the step are dropped, or none."""
    if not _draws(input, p, training) or mode not in ("row", "batch"):
        return _depth[0](input, p, mode, training)
    rows = input.shape[0] if mode == "row" else 1
    return input * _kept(input, (rows, *[1] * (input.dim() - 1)), p, 1 / (1 - p))


def scaled_dot_product_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    """See torch.nn.functional. With dropout the weights [..., queries, keys] are made whole, as torch does on CPUs."""
    if not _draws(query, dropout_p, True):
        return _sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    factor = (query.shape[-1] ** -0.5 if scale is None else scale) ** 0.5
    scores = (query * factor) @ (key * factor).transpose(-2, -1)
    if is_causal:
        if attn_mask is not None:
            raise RuntimeError("scaled_dot_product_attention: got attn_mask and is_causal=True, expected one of them")
        weights = (scores + scores.new_full(scores.shape[-2:], -torch.inf).triu(1)).softmax(-1)
    elif attn_mask is None:
        weights = scores.softmax(-1)
    elif attn_mask.dtype == torch.bool:
        added = torch.zeros_like(attn_mask, dtype=scores.dtype).masked_fill(attn_mask.logical_not(), -torch.inf)
        weights = torch.ops.aten._safe_softmax(scores + added, -1)  # of a query that may look at nothing: zeros
    else:
        weights = (scores + attn_mask).softmax(-1)
    return (weights * _kept(weights, weights.shape, dropout_p, 1 / (1 - dropout_p))) @ value


def multi_head_attention_forward(*args: Any, **kwargs: Any) -> Any:
    """See torch.nn.functional."""
    before, now.folds = now.folds, True
    found = _attention_inlined(*args, **kwargs)
    now.folds = before
    return found


def _draws(input: torch.Tensor, p: float, training: bool) -> bool:
    return training and now.frame is not None and 0 < p < 1 and input.numel() > 0


def _channels(input: torch.Tensor, p: float, scale: float, unbatched: int | None = None) -> torch.Tensor:
    """`scale` for each channel of each sample that is kept, else 0.

    Args:
        input: [samples, channels, ...].
        p: that one is dropped.
        scale: see above.
        unbatched: the dimensions of one without samples.
    """
    ones = [1] * (input.dim() - 2)
    if input.dim() == unbatched:
        return _kept(input, (1, input.shape[0], 1, *ones), p, scale)[0]
    return _kept(input, (*input.shape[:2], *ones), p, scale)


def _kept(input: torch.Tensor, shape: tuple[int, ...], p: float, scale: float) -> torch.Tensor:
    """`scale` for each position that is kept, else 0, in the input's format.

    Args:
        input: what is multiplied by it.
        shape: of what is drawn, which has the dimension of the samples where the input has it.
        p: that one is dropped.
        scale: see above.
    """
    keys, kinds, number = now.next()
    samples = keys.shape[0] - 1
    rows = shape[0] if shape else 1
    known = kinds.get(number)
    kind = None if known is None else known.samples
    if kind is None or not _fits(kind, shape, rows, samples):
        kind = _kind(input, shape, rows, samples)
    own = _of_sample(kind, shape, rows, samples)
    if now.looks:
        known = kinds[number] = _seen(known, kind, own)
    of = own, p, input.dtype, scale, () if now.part[1] == 1 else _first(known, own)
    if kind == SHARED:
        return kept(keys[samples:], *of)[0]
    drawn = kept(keys[:samples], *of)
    if kind == SECOND:
        return drawn.transpose(0, 1)
    return drawn.flatten(0, 1) if kind == FOLDED else drawn


def _of_sample(kind: int, shape: tuple[int, ...], rows: int, samples: int) -> tuple[int, ...]:
    """The shape of what belongs to a sample."""
    if kind == FIRST:
        return tuple(shape[1:])
    if kind == SECOND:
        return (rows, *shape[2:])
    return (rows // samples, *shape[1:]) if kind == FOLDED else tuple(shape)


def _seen(known: Kind | None, kind: int, own: tuple[int, ...]) -> Kind:
    """The kind of a draw at the first samples: of the whole model, and then again of this rank's part, `own`."""
    rank, ranks = now.part
    if ranks == 1:
        return Kind(kind, own)
    if known is not None and len(known.shape) == len(own):
        differs = [i for i, (whole, mine) in enumerate(zip(known.shape, own, strict=True)) if whole != mine]
        if not differs:
            return Kind(kind, own)
        if len(differs) == 1 and own[differs[0]] == len(part_of(known.shape[differs[0]], rank, ranks)):
            return Kind(kind, known.shape, differs[0])
    raise ConfigError(
        f"train.draws: got dropout of {list(own)} numbers a sample on one of {ranks} tensor ranks{_where()}, where the "
        f"whole model has {None if known is None else list(known.shape)}, expected the same, or a part of one "
        f"dimension; name the layer around it otherwise in the table of what is split, or leave it out there"
    )


def _first(known: Kind | None, own: tuple[int, ...]) -> tuple[int, ...]:
    """Where this rank's part of a draw begins in that of the whole model; nothing where it has all."""
    rank, ranks = now.part
    if known is None:
        raise ConfigError(
            f"train.draws: got dropout{_where()} that the first samples did not come to, on one of {ranks} tensor "
            f"ranks, so that nobody knows of which part it is, expected a task that calls the model, and the same "
            f"layers at every step; write dropout 0, or --backend.mesh.tensor 1"
        )
    if known.split is None:
        return ()
    whole, mine = known.shape[known.split], own[known.split]
    part = part_of(whole, rank, ranks)
    begin = part.start if mine == len(part) else rank * mine  # of samples of another length, in equal parts
    return tuple(begin if i == known.split else 0 for i in range(len(own)))


def part_of(size: int, rank: int, ranks: int) -> range:
    """What one of several ranks has of a dimension, as torch shares it out: the last ones may have less."""
    each = -(-size // ranks)
    return range(min(size, rank * each), min(size, (rank + 1) * each))


def _fits(kind: int, shape: tuple[int, ...], rows: int, samples: int) -> bool:
    """Whether samples may lie so in a tensor."""
    if kind == FIRST:
        return rows == samples
    if kind == SECOND:
        return len(shape) > 1 and shape[1] == samples
    return kind == SHARED or rows % samples == 0


def _kind(input: torch.Tensor, shape: tuple[int, ...], rows: int, samples: int) -> int:
    """Where the samples are; see `_kept`. A guess, if another dimension happens to have as many."""
    if isinstance(input, nn.Parameter):
        return SHARED
    if rows == samples:
        return FIRST
    if not now.folds and len(shape) > 2 and shape[1] == samples:
        return SECOND
    if rows == 1:
        return SHARED
    if rows % samples == 0:
        return FOLDED
    raise ConfigError(
        f"train.draws: got dropout of a tensor {list(shape)} in a batch of {samples} samples{_where()}, expected one "
        f"whose first or second dimension is the samples; write --train.draws torch, or drop something else"
    )


def _where() -> str:
    """The user's own line, for people."""
    own = [line for line in traceback.extract_stack() if "/torch/" not in line.filename and __file__ != line.filename]
    return f" ({own[-1].filename}:{own[-1].lineno})" if own else ""


def _times(input: torch.Tensor, noise: torch.Tensor, inplace: bool) -> torch.Tensor:
    return input.mul_(noise) if inplace else input * noise


def _alpha(input: torch.Tensor, noise: torch.Tensor, p: float, inplace: bool) -> torch.Tensor:
    """Dropped units become -ALPHA; then mean and variance are made again what they were. Source: Klambauer and others,
    "Self-normalizing neural networks", 2017."""
    scale = ((ALPHA**2 * p + 1) * (1 - p)) ** -0.5
    shift = (noise - 1) * (ALPHA * scale) + ALPHA * scale * p
    noise = noise.mul_(scale)
    return input.mul_(noise).add_(shift) if inplace else input * noise + shift
