"""Muon: the momentum of a matrix is orthogonalised before it is added. AdamW for all that is no matrix.

After https://kellerjordan.github.io/posts/muon/, with the arguments and the arithmetic of torch.optim.Muon, which
orthogonalises what a rank holds of a matrix; here it is the whole of it.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from dist_train.backends.matrices import Alone, Matrix, SeesMatrices, Work
from dist_train.backends.shards import local_of
from dist_train.loop.eager import eager

# What the length of an update is multiplied with, by its rows and columns.
ADJUSTED: dict[str | None, Callable[[int, int], float]] = {
    None: lambda rows, columns: math.sqrt(max(1, rows / columns)),
    "original": lambda rows, columns: math.sqrt(max(1, rows / columns)),
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
    "spectral_unclamped": lambda rows, columns: math.sqrt(rows / columns),
}
AT_ONCE = 1 << 25  # elements for each rank that are exchanged at once: an exchange takes a few times their memory
TYPES = {None: None, "float32": torch.float32, "bfloat16": torch.bfloat16}


class Muon(SeesMatrices):
    """Muon for matrices, AdamW for the rest.

    Args:
        params: parameters, or groups of them. A group has `optimizer`, Muon or AdamW, and arguments of that one.
        lr: learning rate.
        weight_decay: decoupled from the gradient.
        momentum: of the average of gradients.
        nesterov: the update is the gradient, moved towards the average.
        ns_coefficients: of a Newton-Schulz iteration: of the matrix, its third and its fifth power.
        eps: the least norm by which a matrix is divided.
        ns_steps: iterations.
        adjust_lr_fn: original, match_rms_adamw or spectral_unclamped; None is original.
        ns_dtype: of the iteration: float32 or bfloat16; None is that of the weights.
        adamw: arguments of AdamW for groups that do not give them: lr, betas, eps, weight_decay.
        optimizer: of groups that do not say it.
        fused: AdamW is one kernel.

    Raises:
        ValueError: an argument that there is not, or out of its range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        ns_dtype: str | None = None,
        adamw: Mapping[str, Any] | None = None,
        optimizer: str = "Muon",
        fused: bool | None = None,
    ):
        if ns_dtype not in TYPES:
            raise ValueError(f"ns_dtype: got {ns_dtype!r}, expected float32 or bfloat16")
        self.ns_dtype, self.exchange = TYPES[ns_dtype], Alone()
        of_all = {"lr": lr, "weight_decay": weight_decay, "optimizer": optimizer}
        of_matrices = {
            "momentum": momentum, "nesterov": nesterov, "ns_coefficients": ns_coefficients, "eps": eps,
            "ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn,
        }  # fmt: skip
        given = list(params)
        groups = [of_all | group for group in (given if isinstance(given[0], dict) else [{"params": given}])]
        for group in groups:
            rest = of_matrices if self.sees(group) else (adamw or {})
            group.update({key: value for key, value in rest.items() if key not in group})
        others = [group for group in groups if not self.sees(group)]
        # Its own groups and state are these here: see step.
        self.adamw = eager(torch.optim.AdamW)(others, fused=fused) if others else None
        super().__init__(groups, of_all | of_matrices | {"betas": (0.9, 0.999)})
        for group in self.param_groups:
            if self.sees(group):
                _check(group)

    def sees(self, group: Mapping[str, Any]) -> bool:
        """See SeesMatrices."""
        return group["optimizer"] == "Muon"

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Any:
        """Takes a step. Collective, where several ranks hold the matrices.

        Args:
            closure: computes the gradients first, as in torch.optim.

        Returns:
            What the closure gives; None without one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        begun, elements = list[Begun](), 0
        for of in self._begun():
            if begun and (elements > AT_ONCE * self.exchange.size or of.part.dtype != begun[-1].part.dtype):
                self._finish(begun)
                begun, elements = [], 0
            begun.append(of)
            elements += math.prod(of.matrix.shape)
        self._finish(begun)
        if self.adamw is not None:
            self.adamw.param_groups = [group for group in self.param_groups if not self.sees(group)]
            self.adamw.state = self.state
            self.adamw.step()
        return loss

    def _begun(self) -> Iterator["Begun"]:
        """Takes the gradients into the momentum, and decays the weights."""
        for group in self.param_groups:
            for parameter in group["params"] if self.sees(group) else ():
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                average, gradient = local_of(state["momentum_buffer"]), local_of(parameter.grad)
                average.lerp_(gradient, 1 - group["momentum"])
                update = gradient.lerp(average, group["momentum"]) if group["nesterov"] else average
                weights = local_of(parameter)
                weights.mul_(1 - group["lr"] * group["weight_decay"])
                flat = update.to(self.ns_dtype or update.dtype).reshape(-1)
                for matrix, count in self.parts(parameter):
                    mine = weights if weights.dim() > 1 else weights.narrow(0, matrix.offset, count)
                    yield Begun(matrix, flat.narrow(0, matrix.offset, count), mine, group)

    def _finish(self, begun: Sequence["Begun"]) -> None:
        """Orthogonalises what was begun, and adds it to the weights. Collective."""
        for of, update in zip(begun, self.exchange.mapped([of.work for of in begun]), strict=True):
            rate = of.group["lr"] * ADJUSTED[of.group["adjust_lr_fn"]](*of.matrix.shape)
            of.weights.add_(update.view(of.weights.shape), alpha=-rate)


@dataclass(frozen=True)
class Begun:
    """The update of a matrix that is not orthogonalised yet.

    Args:
        matrix: how it lies.
        part: what this rank holds of it [count].
        weights: what it is added to.
        group: settings.
    """

    matrix: Matrix
    part: torch.Tensor
    weights: torch.Tensor
    group: Mapping[str, Any]

    @property
    def work(self) -> Work:
        """What is asked of an exchange."""
        settings = {"coefficients": "ns_coefficients", "steps": "ns_steps", "eps": "eps"}
        function = partial(orthogonalised, **{name: self.group[key] for name, key in settings.items()})
        return self.matrix, self.part, function


def orthogonalised(
    matrix: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> torch.Tensor:
    """The matrix [rows, columns] with singular values near 1, by Newton-Schulz iterations in its own type."""
    a, b, c = coefficients
    tall = matrix.shape[0] > matrix.shape[1]
    found = matrix.T if tall else matrix
    found = found / found.norm().clamp(min=eps)  # no singular value is above 1
    for _ in range(steps):
        gram = found @ found.T
        found = torch.addmm(found, torch.addmm(gram, gram, gram, beta=b, alpha=c), found, beta=a)
    return found.T if tall else found


def _check(group: Mapping[str, Any]) -> None:
    """Raises ValueError for what is wrong with the settings of a group of matrices."""
    for key in ("lr", "weight_decay", "momentum", "eps"):
        if not group[key] >= 0:
            raise ValueError(f"{key}: got {group[key]}, expected 0 or more")
    if group["adjust_lr_fn"] not in ADJUSTED:
        known = ", ".join(name for name in ADJUSTED if name)
        raise ValueError(f"adjust_lr_fn: got {group['adjust_lr_fn']!r}, expected one of {known}")
    if len(group["ns_coefficients"]) != 3:
        raise ValueError(f"ns_coefficients: got {group['ns_coefficients']}, expected three numbers")
    if type(group["ns_steps"]) is not int or not 0 < group["ns_steps"] < 100:
        raise ValueError(f"ns_steps: got {group['ns_steps']!r}, expected a whole number from 1 to 99")
