"""A multilayer perceptron, by default that of PyTorch's quickstart: 784-512-512-10 with ReLU."""

import math

import torch
from torch import nn

from dist_train.errors import ConfigError

WORDS = ("columns", "rows")  # of two layers, how tensor ranks split them


class MLP(nn.Module):
    """Flatten, then linear layers with an activation between them.

    Args:
        input_shape: shape of a sample.
        outputs: how many numbers it gives for a sample: of a data set of classes, one for each.
        hidden: sizes of the hidden layers; none of them makes a linear model.
        activation: name of a class in torch.nn.
        dropout: probability of dropping a hidden unit in training.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        outputs: int,
        hidden: list[int] | tuple[int, ...] = (512, 512),
        activation: str = "ReLU",
        dropout: float = 0.0,
    ):
        super().__init__()
        kind = getattr(nn, activation, None)
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise ConfigError(f"model.activation: got {activation!r}, expected a class of torch.nn; for example ReLU")
        layers: list[nn.Module] = [nn.Flatten()]
        size = math.prod(input_shape)
        for width in hidden:
            layers += [nn.Linear(size, width), kind()]
            if dropout:
                layers.append(nn.Dropout(dropout))
            size = width
        layers.append(nn.Linear(size, outputs))
        self.layers = nn.Sequential(*layers)
        linear = [name for name, layer in self.layers.named_children() if isinstance(layer, nn.Linear)]
        pairs = zip(linear[::2], linear[1::2], strict=False)  # one that is left is computed by all ranks
        self.split = {f"layers.{name}": word for pair in pairs for name, word in zip(pair, WORDS, strict=True)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Outputs [batch, outputs], such as logits, of samples [batch, *input_shape]."""
        return self.layers(x)
