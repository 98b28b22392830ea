"""Number formats. What each name means, in every backend:

| precision | parameters, optimizer state, gradients, their sums over ranks, loss | matrix products |
|-----------|-----------------------------------------------------------------------|-----------------|
| float32   | float32                                                               | float32         |
| tf32      | float32                                                               | tf32 (CUDA)     |
| bfloat16  | float32                                                               | bfloat16        |
| float16   | float32, with a scaled loss                                           | float16         |
| float64   | float64                                                               | float64         |
"""

import copy
from collections.abc import MutableMapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dist_train.errors import ConfigError

NOTHING = nullcontext()


@dataclass(frozen=True)
class Precision:
    """A row of the table.

    Args:
        name: train.precision.
        device: of this rank.
    """

    name: str
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of parameters, inputs, loss and gradients."""
        return torch.float64 if self.name == "float64" else torch.float32

    def autocast(self) -> AbstractContextManager:
        """Around forward: matrix products in the short format, and what needs range in float32."""
        if self.name in ("bfloat16", "float16"):
            return torch.autocast(self.device.type, dtype=getattr(torch, self.name))
        return NOTHING

    def called(self, model: nn.Module) -> nn.Module:
        """The model as it is to be called: in its short format, with outputs in that of the loss."""
        return Short(self, model) if self.name in ("bfloat16", "float16") else model  # type: ignore[return-value]

    def apply(self) -> None:
        """Sets what torch holds for the process. Raises ConfigError where the device does not have the format."""
        if self.name == "tf32" and self.device.type != "cuda":
            raise ConfigError(
                f"train.precision: got tf32 on {self.device.type}, expected a CUDA device, whose matrix units have it; "
                f"write --train.precision float32"
            )
        torch.set_float32_matmul_precision("high" if self.name == "tf32" else "highest")


class Short:
    """A model that is called in a short format, and gives its floats in that of the loss."""

    def __init__(self, precision: Precision, model: nn.Module):
        self.precision, self.model = precision, model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the model gives."""
        with self.precision.autocast():
            outputs = self.model(*args, **kwargs)
        return self._wide(outputs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def _wide(self, outputs: Any) -> Any:
        if isinstance(outputs, torch.Tensor):
            return outputs.to(self.precision.dtype) if outputs.is_floating_point() else outputs
        if isinstance(outputs, tuple):
            return tuple(map(self._wide, outputs))
        if isinstance(outputs, MutableMapping):  # such as transformers' ModelOutput, which stays one
            wide = copy.copy(outputs)
            for key, value in outputs.items():
                wide[key] = self._wide(value)
            return wide
        return outputs


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model with its real numbers in `dtype`, and its complex ones in the format of two of those; in place. The
    model's own `to` would drop imaginary parts."""

    def to(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_complex():
            return tensor.to(dtype.to_complex())
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    return model._apply(to)


class LossScale:
    """Keeps float16 gradients in range: the loss is multiplied by a factor that halves after a gradient that is not
    finite, whose step is left out, and doubles after `GROWTH_STEPS` finite ones. The rule of torch.amp.GradScaler, by
    the global norm, which is the same on every rank and under every backend.
    """

    GROWTH_STEPS = 2000

    def __init__(self) -> None:
        self.factor = 2.0**16
        self.finite_steps = 0

    def saw(self, finite: bool) -> None:
        """The gradient of a step was finite, or not."""
        self.finite_steps = self.finite_steps + 1 if finite else 0
        if not finite:
            self.factor = max(1.0, self.factor / 2)
        elif self.finite_steps == self.GROWTH_STEPS:
            self.factor, self.finite_steps = self.factor * 2, 0
