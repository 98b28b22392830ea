"""Floating-point operations of a step, and what a GPU could do at most."""

import copy
import logging
import re
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from dist_train.backends.precision import Precision
from dist_train.backends.pretended import fake_of
from dist_train.config.tree import Config, group_of
from dist_train.data.batch import like
from dist_train.data.order import largest_piece
from dist_train.data.randomness import kept_apart
from dist_train.models.decoder import Decoder
from dist_train.ranks.dist import World, device_name
from dist_train.run.assemble import Parts

# TFLOP/s by the name of the GPU and train.precision: dense (NVIDIA's larger figures are for sparse matrices), float16
# with sums in float32. Sources: NVIDIA's data sheets of H200, H100, A100, A10, V100, L40S, L4 and T4; for GeForce the
# white papers "NVIDIA Ada GPU Architecture" and "NVIDIA Ampere GA102 GPU Architecture".
PEAK_TFLOPS = {
    r"H200|H100 80GB HBM3": {"float64": 67, "float32": 67, "tf32": 494.7, "bfloat16": 989.4, "float16": 989.4},
    r"H100 NVL|H200 NVL": {"float64": 60, "float32": 60, "tf32": 417.5, "bfloat16": 835.5, "float16": 835.5},
    r"H100 PCIe": {"float64": 51, "float32": 51, "tf32": 378, "bfloat16": 756, "float16": 756},
    r"A100[- ].*GB.*": {"float64": 19.5, "float32": 19.5, "tf32": 156, "bfloat16": 312, "float16": 312},
    r"V100-SXM2-\d+GB": {"float64": 7.8, "float32": 15.7, "float16": 125},
    r"V100-PCIE-\d+GB": {"float64": 7, "float32": 14, "float16": 112},
    r"L40S": {"float32": 91.6, "tf32": 183, "bfloat16": 362, "float16": 362},
    r"L4": {"float32": 30.3, "tf32": 60, "bfloat16": 121, "float16": 121},
    r"A10": {"float32": 31.2, "tf32": 62.5, "bfloat16": 125, "float16": 125},
    r"T4": {"float32": 8.1, "float16": 65},
    r"GeForce RTX 4090": {"float32": 82.6, "tf32": 82.6, "bfloat16": 165.2, "float16": 165.2},
    r"GeForce RTX 3090": {"float32": 35.6, "tf32": 35.6, "bfloat16": 71, "float16": 71},
}


def of_step(config: Config, world: World, parts: Parts) -> int:
    """FLOPs of an optimizer step over all ranks, forward and backward: those of matrix products, convolutions and
    attention, where a multiplication and an addition are two. The optimizer's are left out, as is customary.

    Counted on a micro-batch of a rank and scaled to the global batch. The model must not be sharded or compiled yet.

    Raises:
        Exception: whatever the model raises on tensors without values, such as where its way depends on them.
    """
    cfg = config.train
    sizes = cfg.global_batch_size, world.data_size, cfg.micro_batch_size
    batch = largest_piece(*sizes, group_of(config.model) or 1)
    kind = parts.feed.of(np.zeros(1, np.int64))
    counted = of_batch(parts.model, lambda model: parts.task.sums(model, like(kind, batch))["loss"], parts.precision)
    return round(counted / batch * cfg.global_batch_size)


def of_batch(model: nn.Module, loss_of: Callable[[nn.Module], torch.Tensor], precision: Precision) -> int:
    """FLOPs of a forward and backward. A copy of the model runs on fake tensors: nothing is computed, on no device, and
    nothing of the model or of the random numbers changes.

    Args:
        model: not sharded or compiled.
        loss_of: makes a batch, calls the model that it is given, and returns the loss.
        precision: the formats of the run.
    """
    # Here, as they take long to import, and only a run that is profiled needs them.
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    log = logging.getLogger("torch._subclasses.fake_tensor")
    level, fake = log.level, FakeTensorMode(allow_non_fake_inputs=True)
    log.setLevel(logging.CRITICAL)  # it shows a traceback before it raises
    try:
        tensors = [*model.buffers(), *model.parameters()]
        with kept_apart():
            made = {id(tensor): fake_of(fake, tensor, precision.device) for tensor in tensors}
            twin = copy.deepcopy(model, made).train()  # with the fakes for its tensors
            with fake, FlopCounterMode(display=False) as counter:
                loss_of(precision.called(twin)).backward()
    finally:
        log.setLevel(level)
    return counter.get_total_flops()


def peak_s_of_sample(config: Config, world: World, model: nn.Module) -> float | None:
    """Seconds that a sample of a decoder takes at the peak of all devices of a run: by what a second is, that is the
    model FLOPs utilisation. None where the peak is not known, and of another model."""
    precision = config.train.precision
    peak = peak_tflops(device_name(world.device), precision) if world.device.type == "cuda" else None
    if peak is None or not isinstance(model, Decoder):
        return None
    return of_token(model) * model.block / (peak * 1e12 * world.size)


def of_token(model: Decoder) -> int:
    """Model FLOPs of a token, forward and backward, as they are counted for language models: 6 for each number of a
    matrix that it is multiplied with, and 12 for each number of a layer's heads and each token of a block, whatever its
    mask. What is computed again does not count. Source: A. Chowdhery and others, "PaLM", 2022, appendix B."""
    looked_up = 0 if model.lm_head.weight is None else model.model.embed_tokens.weight.numel()
    numbers = sum(p.numel() for p in model.parameters() if p.dim() == 2) - looked_up
    heads, _, size = model.model.layers[0].self_attn.sizes
    return 6 * numbers + 12 * len(model.model.layers) * heads * size * model.block


def peak_tflops(name: str, precision: str) -> float | None:
    """The most that a GPU of this name can do; None where that is not known, as of a part of one (MIG).

    Args:
        name: as torch.cuda.get_device_name gives it.
        precision: a value of train.precision.
    """
    model = re.sub(r"^(NVIDIA |Tesla )+", "", name)
    row = next((row for pattern, row in PEAK_TFLOPS.items() if re.fullmatch(pattern, model)), {})
    return None if "MIG" in model else row.get(precision)
