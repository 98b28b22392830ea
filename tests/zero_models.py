"""Models that flat buffers and sharded weights get wrong easily. Apart from the tests, so that the workers can import
them by name; each takes [batch, 1, 6, 6]."""

import warnings

import torch
import torch.distributed as torch_dist
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

WIDTH = 320  # of which a square weight is above the 100,000 elements below which ZeRO 3 leaves it whole


class Base(nn.Module):
    """Two layers between an input and an output layer."""

    def __init__(self, input_shape, classes, width=8):
        super().__init__()
        self.into = nn.Linear(36, width)
        self.layers = nn.ModuleList([nn.Linear(width, width), nn.Linear(width, width)])
        self.out = nn.Linear(width, classes)

    def forward(self, x):
        h = self.into(x.flatten(1)).relu()
        for layer in self.layers:
            h = h + layer(h).relu()
        return self.out(h)


class Counting(Base):
    """Counts its forwards in training, in a buffer."""

    def __init__(self, input_shape, classes):
        super().__init__(input_shape, classes)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        if self.training:
            self.calls += 1
        return super().forward(x)


class Frozen(Base):
    """A body that stays as it is, one of its layers above ZeRO 3's threshold, and only a head that is trained."""

    def __init__(self, input_shape, classes):
        super().__init__(input_shape, classes, WIDTH)
        self.requires_grad_(False)
        self.out.requires_grad_(True)


class PartlyFrozen(Base):
    """In each layer one of weight and bias is frozen; between frozen layers there is one that is trained."""

    def __init__(self, input_shape, classes):
        super().__init__(input_shape, classes, WIDTH)
        self.into.weight.requires_grad_(False)
        self.layers[0].requires_grad_(False)
        self.layers[1].bias.requires_grad_(False)


class TiedFrozen(Base):
    """The weight of two layers is one, and frozen; their biases are trained."""

    def __init__(self, input_shape, classes):
        super().__init__(input_shape, classes)
        self.layers[1].weight = self.layers[0].weight
        self.layers[0].weight.requires_grad_(False)


class Tied(Base):
    def __init__(self, input_shape, classes):
        super().__init__(input_shape, classes)
        self.layers[1].weight = self.layers[0].weight


class Unused(Base):
    """A head that is not used, before one that is."""

    def __init__(self, input_shape, classes):
        super().__init__(input_shape, classes)
        self.other = nn.Linear(8, 5)
        self.out = nn.Linear(8, classes)


class Odd(Base):
    """1,061 weights, no two tensors of the same size."""

    def __init__(self, input_shape, classes):
        super().__init__(input_shape, classes, 17)


class Shapes(Base):
    """A scalar, a transposed weight, a buffer, state of its own."""

    def __init__(self, input_shape, classes):
        super().__init__(input_shape, classes)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.turned = nn.Parameter(torch.randn(8, 5).t())
        self.register_buffer("constant", torch.full((), 2.0))

    def forward(self, x):
        h = self.into(x.flatten(1)).relu()
        h = torch.cat([h @ self.turned.t(), h[:, :3]], 1) * self.scale / self.constant
        return self.out(h)

    def get_extra_state(self):
        return torch.tensor([7])

    def set_extra_state(self, state):
        assert state.tolist() == [7]


class Empty(Base):
    """A weight of no elements."""

    def __init__(self, input_shape, classes):
        super().__init__(input_shape, classes)
        self.empty = nn.Parameter(torch.empty(0, 8))

    def forward(self, x):
        return super().forward(x) + self.empty.sum()


class Tiny(nn.Module):
    """Fewer weights than two ranks' alignment."""

    def __init__(self, input_shape, classes):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("marks", torch.linspace(-1, 1, classes))

    def forward(self, x):
        return self.slope * x.flatten(1).sum(1, keepdim=True) * self.marks


class ChannelsLast(nn.Sequential):
    def __init__(self, input_shape, classes):
        super().__init__(
            nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 9, 3), nn.ReLU(), nn.Flatten(),
            nn.Linear(144, classes),
        )  # fmt: skip
        self.to(memory_format=torch.channels_last)

    def forward(self, x):
        return super().forward(x.contiguous(memory_format=torch.channels_last))


class Normed(Base):
    """Weights that are computed from others in every forward."""

    def __init__(self, input_shape, classes):
        super().__init__(input_shape, classes, WIDTH)
        self.layers[0] = weight_norm(nn.Linear(WIDTH, WIDTH))
        self.layers[1] = spectral_norm(nn.Linear(WIDTH, WIDTH))


class NormedByHook(Base):
    """The same by a hook around forward, which comes before those of the library."""

    def __init__(self, input_shape, classes):
        super().__init__(input_shape, classes, WIDTH)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated, and still in use
            self.layers[0] = nn.utils.weight_norm(nn.Linear(WIDTH, WIDTH))


class Checkpointed(Base):
    """Computes its layers again in a backward within the backward."""

    def forward(self, x):
        h = self.into(x.flatten(1)).relu()
        for layer in self.layers:
            h = h + (checkpoint(layer, h, use_reentrant=True) if h.requires_grad else layer(h)).relu()
        return self.out(h)


class Dropping(Base):
    """Leaves its last layer out in the forwards of `at`, counted from 1 for the first look, on the ranks of `ranks`.
    Where a rank 1 is to do it, one process does it for the second half of its samples."""

    def __init__(self, input_shape, classes, at=(), ranks=()):
        super().__init__(input_shape, classes)
        self.at, self.ranks, self.count = at, ranks, 0

    def forward(self, x):
        h = F.relu(self.into(x.flatten(1)))
        h = h + self.layers[0](h).relu()
        if self.training:
            self.count += 1
        drops, joined = self.training and self.count in self.at, torch_dist.is_initialized()
        if drops and self.ranks and not joined:
            h = h + self.layers[1](h).relu() * (torch.arange(len(h)) < len(h) // 2)[:, None]
        elif not drops or (self.ranks and torch_dist.get_rank() not in self.ranks):
            h = h + self.layers[1](h).relu()
        return self.out(h)
