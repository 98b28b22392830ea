"""How much a sample or a pixel counts in a loss, by its class."""

import torch

from dist_train.errors import ConfigError


def weights_of(class_weights: list[float] | None, classes: int) -> torch.Tensor | None:
    """`task.args.class_weights` as a float64 tensor [classes]; None for none. Raises ConfigError."""
    if class_weights is None:
        return None
    if len(class_weights) != classes:
        raise ConfigError(
            f"task.args.class_weights: got {len(class_weights)} numbers, expected one for each of {classes} classes"
        )
    return torch.tensor(class_weights, dtype=torch.float64)


def weight_of(targets: torch.Tensor, weights: torch.Tensor | None, ignored: int | None) -> torch.Tensor:
    """The sum of the weights of all that counts, a scalar; without weights, its number.

    Args:
        targets: class numbers, [batch, ...].
        weights: [classes].
        ignored: a class number that does not count.
    """
    counts = torch.ones_like(targets, dtype=torch.bool) if ignored is None else targets != ignored
    if weights is None:
        return counts.sum()
    by_class = weights.to(targets.device, torch.float32 if targets.device.type == "mps" else torch.float64)
    return by_class[targets.where(counts, 0)].mul(counts).sum()
