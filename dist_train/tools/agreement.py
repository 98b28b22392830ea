"""How far a run is from a reference, and how far rounding may take it: the rule of "the backend changes nothing".

In float64 a constant is the rule. In the other formats it is not: a unit of a ReLU whose input is within rounding of
zero is on in one run and off in the next, and the gradient jumps. So the reference is run several times more, from
initial weights that are moved by a few roundings, and a run may be `MULTIPLE` times as far from it as these are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

# Relative differences that pass without a question. The short formats round each product.
FLOOR = {"float64": 1e-9, "float32": 1e-5, "tf32": 1e-3, "bfloat16": 5e-2, "float16": 5e-2}
# Of what rounding did to the reference, how much is allowed; and what never is, whatever rounding did.
MULTIPLE, CAP = 4, 1e-2


@dataclass(frozen=True)
class Trajectory:
    """A run as numbers.

    Args:
        losses: of each step, the mean over its global batch.
        grad_norms: of each step, before clipping.
        weights: after the last step, float64 by the model's own names; of rank 0, the others may have none.
        evaluation: `eval/loss` and the task's other metrics after the last step.
        samples_per_s: of all ranks together, by the median step of the second half.
        update: the norm of what training has changed, over all weights.
        buffers: after the last step, as the weights.
    """

    losses: list[float]
    grad_norms: list[float]
    weights: dict[str, np.ndarray]
    evaluation: Mapping[str, float]
    samples_per_s: float
    update: float
    buffers: dict[str, np.ndarray]


@dataclass(frozen=True)
class Difference:
    """Relative differences of a run from a reference, or limits of them.

    Args:
        losses: of each step, then of the final evaluation: float64 [steps + 1].
        grad_norms: of each step: float64 [steps].
        weights: the norm of the difference over all weights by that of the reference's update; or, if it is larger,
            that of a buffer by the buffer's own norm.
        worst_tensor: the weight or buffer that is furthest off.
    """

    losses: np.ndarray
    grad_norms: np.ndarray
    weights: float
    worst_tensor: str = ""

    @property
    def loss(self) -> float:
        """The largest over the steps and the evaluation; nan if one is."""
        return float(np.max(self.losses))  # numpy's max keeps a nan, Python's may not

    @property
    def grad_norm(self) -> float:
        """The largest over the steps; nan if one is."""
        return float(np.max(self.grad_norms))

    @property
    def worst(self) -> float:
        """The largest of all; nan if one is."""
        return float(np.max([self.loss, self.grad_norm, self.weights]))


def difference(run: Trajectory, reference: Trajectory) -> Difference:
    """How far `run` is from `reference`. Raises ValueError where they are not the same steps or weights."""
    for what, got, expected in (
        ("steps", len(run.losses), len(reference.losses)),
        ("weights", _shapes(run.weights), _shapes(reference.weights)),
        ("buffers", _shapes(run.buffers), _shapes(reference.buffers)),
    ):
        if got != expected:
            raise ValueError(f"{what}: got {got}, expected {expected} as in the reference")
    far = {name: float(np.linalg.norm(run.weights[name] - value)) for name, value in reference.weights.items()}
    moved = {
        name: float(_by(np.linalg.norm(run.buffers[name] - value), np.linalg.norm(value)))
        for name, value in reference.buffers.items()
    }
    weights = float(_by(np.linalg.norm(list(far.values())), reference.update))
    by_tensor = {name: float(_by(value, reference.update)) for name, value in far.items()} | moved
    return Difference(
        _relative(*([*t.losses, *_evaluated(t)] for t in (run, reference))),
        _relative(run.grad_norms, reference.grad_norms),
        float(np.max([weights, *moved.values()])),
        max(by_tensor, key=lambda name: (np.isnan(by_tensor[name]), by_tensor[name]), default=""),
    )


def _evaluated(run: Trajectory) -> list[float]:
    """The losses of the last evaluation: of each test split, of none where there is none."""
    return [value for name, value in run.evaluation.items() if name.endswith("/loss")]


def spread(moved: Sequence[Trajectory], reference: Trajectory) -> Difference:
    """What rounding alone does to the reference: up to each step, the largest difference of those that were moved."""
    far = [difference(run, reference) for run in moved]
    return Difference(
        np.maximum.accumulate(np.max([one.losses for one in far], axis=0)),
        np.maximum.accumulate(np.max([one.grad_norms for one in far], axis=0)),
        float(np.max([one.weights for one in far])),
    )


def limit(precision: str, rounding: Difference | None = None) -> Difference | float:
    """The largest difference that passes: a number where rounding was not measured, as is never needed in float64."""
    floor = FLOOR[precision]
    if rounding is None or precision == "float64":
        return floor
    losses, grad_norms, weights = (
        np.maximum(floor, np.minimum(CAP, MULTIPLE * np.nan_to_num(of, nan=np.inf)))
        for of in (rounding.losses, rounding.grad_norms, rounding.weights)
    )
    return Difference(losses, grad_norms, float(weights))


def beyond(found: Difference, allowed: Difference | float) -> str:
    """What is further off than allowed, first by step; empty if nothing is. A nan is."""
    steps = len(found.grad_norms)
    if not isinstance(allowed, Difference):
        allowed = Difference(np.full(steps + 1, allowed), np.full(steps, allowed), allowed)
    for i in range(steps + 1):
        where = f"of step {i + 1}" if i < steps else "of the evaluation"
        if not found.losses[i] <= allowed.losses[i]:
            return f"loss {where} {_off(found.losses[i], allowed.losses[i])}"
        if i < steps and not found.grad_norms[i] <= allowed.grad_norms[i]:
            return f"gradient norm {where} {_off(found.grad_norms[i], allowed.grad_norms[i])}"
    if not found.weights <= allowed.weights:
        return f"final weights {_off(found.weights, allowed.weights)}, most of all {found.worst_tensor}"
    return ""


def _off(got: float, allowed: float) -> str:
    return f"{got:.1e} off, expected at most {allowed:.1e}"


def _shapes(weights: dict[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    return {name: value.shape for name, value in weights.items()}


def _relative(values: list[float], expected: list[float]) -> np.ndarray:
    a, b = np.array(values), np.array(expected)
    return np.where(a == b, 0.0, _by(np.abs(a - b), np.abs(b)))


def _by(difference: np.ndarray | float, scale: np.ndarray | float) -> np.ndarray:
    """A difference by what it is held against; none is 0 also of a scale of 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.equal(difference, 0), 0.0, np.divide(difference, scale))
