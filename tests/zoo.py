"""Tiny classifiers of pictures [2, 4, 4], each with a kind of layer or habit that people's models have.

Activations are smooth: at a kink, the last bit of a sum decides a gradient.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

SHAPE, CLASSES, WIDTH = (2, 4, 4), 3, 6


class Kind(nn.Module):
    """A body from pictures to [batch, WIDTH], then a head."""

    def __init__(self, input_shape, classes):
        super().__init__()
        self.inner = nn.Linear(math.prod(input_shape), WIDTH)
        self.make()
        self.head = nn.Linear(WIDTH, classes)

    def make(self):
        """More layers."""

    def body(self, x):
        """[batch, WIDTH] to [batch, WIDTH]."""
        return x

    def forward(self, x):
        return self.head(self.body(torch.tanh(self.inner(x.flatten(1)))))


class Pictures(nn.Module):
    """A body from pictures to pictures of 4 channels, then their means and a head."""

    def __init__(self, input_shape, classes):
        super().__init__()
        self.first = nn.Conv2d(input_shape[0], 4, 3, padding=1)
        self.make()
        self.head = nn.Linear(4, classes)

    def make(self):
        """More layers."""

    def body(self, x):
        """[batch, 4, height, width] to [batch, 4, any, any]."""
        return x

    def forward(self, x):
        return self.head(self.body(torch.tanh(self.first(x))).mean((2, 3)))


# -- norms -------------------------------------------------------------------------------------------------------------


class BatchNorm1d(Kind):
    def make(self):
        self.norm = nn.BatchNorm1d(WIDTH)

    def body(self, x):
        return self.norm(x)


class BatchNorm2d(Pictures):
    def make(self):
        self.norm = nn.BatchNorm2d(4)

    def body(self, x):
        return self.norm(x)


class InstanceNormStats(Pictures):
    """It normalizes each sample by itself, and remembers a mean over the batch."""

    def make(self):
        self.norm = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)

    def body(self, x):
        return self.norm(x).sigmoid()  # the mean of what it gives is its bias


class FrozenNorm(BatchNorm2d):
    """Fine-tuning with the statistics of before: in eval by its own choice."""

    def make(self):
        super().make()
        self.norm.running_mean.fill_(0.1)
        self.norm.eval()

    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()
        return self


class SampleNorms(Pictures):
    def make(self):
        self.group, self.layer = nn.GroupNorm(2, 4), nn.LayerNorm(4)
        self.rms = nn.RMSNorm(4)

    def body(self, x):
        x = self.layer(self.group(x).movedim(1, -1)).tanh()
        return self.rms(x).movedim(-1, 1)


# -- buffers and parametrizations --------------------------------------------------------------------------------------


class Buffers(Kind):
    """A constant buffer, one that is not saved, and a whole number."""

    def make(self):
        self.register_buffer("scale", torch.linspace(0.5, 1.5, WIDTH))
        self.register_buffer("shift", torch.linspace(-1, 1, WIDTH), persistent=False)
        self.register_buffer("order", torch.arange(WIDTH).flip(0))

    def body(self, x):
        return (x * self.scale + self.shift)[:, self.order]


class Counts(Kind):
    """A buffer that every forward of training changes by the samples that it sees."""

    def make(self):
        self.register_buffer("center", torch.zeros(WIDTH))

    def body(self, x):
        if self.training:
            with torch.no_grad():
                self.center.lerp_(x.mean(0) if len(x) else self.center, 0.1)
        return x


class SpectralNorm(Kind):
    def make(self):
        self.middle = nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))

    def body(self, x):
        return self.middle(x).tanh()


class SpectralNormHook(SpectralNorm):
    def make(self):
        self.middle = nn.utils.spectral_norm(nn.Linear(WIDTH, WIDTH))


class WeightNorm(SpectralNorm):
    def make(self):
        self.middle = nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))


class WeightNormHook(SpectralNorm):
    def make(self):
        self.middle = nn.utils.weight_norm(nn.Linear(WIDTH, WIDTH))


class ExtraState(Kind):
    def make(self):
        self.scale = torch.full((WIDTH,), 0.7)

    def get_extra_state(self):
        return self.scale

    def set_extra_state(self, state):
        self.scale = state.clone()

    def body(self, x):
        return x * self.scale


# -- embeddings --------------------------------------------------------------------------------------------------------


def words(x):
    """Pictures as words of a vocabulary of 11: [batch, 32]."""
    return (x.flatten(1) * 1000).round().long() % 11


class Embedding(nn.Module):
    sparse, max_norm = False, None

    def __init__(self, input_shape, classes):
        super().__init__()
        self.table = nn.Embedding(11, WIDTH, padding_idx=0, sparse=self.sparse, max_norm=self.max_norm)
        self.head = nn.Linear(WIDTH, classes)

    def forward(self, x):
        return self.head(self.table(words(x)).mean(1).tanh())


class SparseEmbedding(Embedding):
    sparse = True


class MaxNorm(Embedding):
    max_norm = 1.0


class EmbeddingBag(nn.Module):
    def __init__(self, input_shape, classes):
        super().__init__()
        self.table, self.head = nn.EmbeddingBag(11, WIDTH), nn.Linear(WIDTH, classes)

    def forward(self, x):
        return self.head(self.table(words(x)).tanh())


# -- sequences ---------------------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self, input_shape, classes):
        super().__init__()
        self.long = nn.LSTM(8, 5, batch_first=True)
        self.gated = nn.GRU(5, 4, batch_first=True, bidirectional=True)
        self.head = nn.Linear(8, classes)

    def forward(self, x):
        return self.head(self.gated(self.long(x.reshape(len(x), 4, 8))[0])[0][:, -1])


class Attention(nn.Module):
    def __init__(self, input_shape, classes):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, activation="gelu", batch_first=True)
        self.head = nn.Linear(8, classes)

    def forward(self, x):
        x = x.reshape(len(x), 4, 8)
        return self.head(self.layer(self.attention(x, x, x, need_weights=False)[0]).mean(1))


# -- convolutions ------------------------------------------------------------------------------------------------------


class Convolutions(Pictures):
    """Depthwise, transposed."""

    def make(self):
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4, bias=False)
        self.transposed = nn.ConvTranspose2d(4, 4, 2, stride=2)

    def body(self, x):
        return F.gelu(self.transposed(F.gelu(self.depthwise(x))))


class ChannelsLast(Pictures):
    def make(self):
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.table = nn.Parameter(torch.randn(4, 3).t())  # [3, 4], not contiguous either
        self.to(memory_format=torch.channels_last)

    def body(self, x):
        return self.second(x.contiguous(memory_format=torch.channels_last)).tanh() + self.table.mean(0)[:, None, None]


# -- weights -----------------------------------------------------------------------------------------------------------


class Tied(Kind):
    """A weight under two names, and a layer that two blocks of a list have."""

    def make(self):
        one, two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList([nn.Sequential(one, nn.Tanh()), nn.Sequential(two, nn.GELU()), one])
        self.again = nn.Linear(WIDTH, WIDTH, bias=False)
        self.again.weight = two.weight

    def body(self, x):
        for block in self.blocks:
            x = block(x)
        return self.again(x)


class FrozenBackbone(Kind):
    def make(self):
        self.middle = nn.Linear(WIDTH, WIDTH)
        self.inner.requires_grad_(False)

    def body(self, x):
        return self.middle(x).tanh()


class FrozenBias(FrozenBackbone):
    """Some weights of a layer."""

    def make(self):
        self.middle = nn.Linear(WIDTH, WIDTH)
        self.middle.bias.requires_grad_(False)


class UnusedHead(Kind):
    def make(self):
        self.other = nn.Linear(WIDTH, 5)


class Scalars(Kind):
    def make(self):
        self.temperature, self.shift = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.tensor(0.1))

    def body(self, x):
        return x * self.temperature + self.shift


class Empty(Kind):
    """A prompt of no words."""

    def make(self):
        self.prompt = nn.Parameter(torch.zeros(0, WIDTH))

    def body(self, x):
        return x + self.prompt.sum(0)


class Complex(Kind):
    """A filter in the Fourier domain."""

    def make(self):
        self.filter = nn.Parameter(torch.randn(WIDTH // 2 + 1, dtype=torch.complex64))
        self.register_buffer("phase", torch.polar(torch.ones(4), torch.linspace(0, 1, 4)))

    def body(self, x):
        return torch.fft.irfft(torch.fft.rfft(x) * self.filter * self.phase, n=WIDTH)


class Lazy(nn.Sequential):
    def __init__(self, input_shape, classes):
        super().__init__(nn.LazyConv2d(3, 3), nn.Tanh(), nn.Flatten(), nn.LazyLinear(classes))


class Bare(nn.Linear):
    """The model is a layer itself."""

    def __init__(self, input_shape, classes):
        super().__init__(math.prod(input_shape), classes)

    def forward(self, x):
        return super().forward(x.flatten(1))


class Lists(Kind):
    """Weights in lists and dictionaries, in odd numbers."""

    def make(self):
        self.shifts = nn.ParameterList([torch.randn(WIDTH) * 0.1, torch.randn(1)])
        self.matrices = nn.ParameterDict({"a": torch.randn(WIDTH, 7) * 0.3, "b": torch.randn(7, WIDTH) * 0.3})

    def body(self, x):
        for shift in self.shifts:
            x = x + shift
        return torch.tanh(x @ self.matrices["a"]) @ self.matrices["b"]


class Shrunk(torch.autograd.Function):
    """tanh, by hand."""

    @staticmethod
    def forward(ctx, x):
        y = torch.tanh(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, gradient):
        (y,) = ctx.saved_tensors
        return gradient * (1 - y * y)


class OwnFunction(FrozenBackbone):
    def make(self):
        self.middle = nn.Linear(WIDTH, WIDTH)

    def body(self, x):
        return Shrunk.apply(self.middle(x))


class Recomputed(Kind):
    """Activation checkpointing, of the kind that torch recommends and of the older one."""

    reentrant = True

    def make(self):
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(2))

    def body(self, x):
        for block, reentrant in zip(self.blocks, (False, self.reentrant), strict=True):
            x = checkpoint(block, x, use_reentrant=reentrant)
        return x


class InPlace(Kind):
    """It changes its input."""

    def forward(self, x):
        x.mul_(0.5).add_(0.1)
        return super().forward(x)
