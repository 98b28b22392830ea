"""python benchmarks/draws.py [--repeats 40] [--steps 3] [--compiled]

What keyed draws (train.draws) cost: training steps of a ResNet and of a decoder, whose draws are keyed, by those of the
same model that draws from torch's generator. They take turns in one process, with one thread. A ratio is of the CPU
times of a round; the median over the rounds, and the quartiles.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

from dist_train.models import draws


class Residual(nn.Module):
    """Two convolutions, which some samples go without."""

    def __init__(self, into: int, out: int, p: float):
        super().__init__()
        stride = 1 if into == out else 2
        self.conv1 = nn.Conv2d(into, out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(out), nn.BatchNorm2d(out)
        self.skip = nn.Identity() if into == out else nn.Conv2d(into, out, 1, stride, bias=False)
        self.drop, self.depth = nn.Dropout(p), StochasticDepth(p, "row")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, into, height, width]"""
        inner = self.drop(self.norm1(self.conv1(x)).relu())
        return (self.skip(x) + self.depth(self.norm2(self.conv2(inner)))).relu()


class ResNet(nn.Sequential):
    """A wide residual network of pictures of 32 by 32, with dropout between the convolutions of a block, as in its
    paper (Zagoruyko and Komodakis, 2016), and stochastic depth."""

    def __init__(self, p: float = 0.1):
        super().__init__(
            nn.Conv2d(3, 32, 3, 1, 1), Residual(32, 32, p), Residual(32, 64, p), Residual(64, 128, p),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10),
        )  # fmt: skip


class Layer(nn.Module):
    """Of a decoder, as nanoGPT has it."""

    def __init__(self, width: int, heads: int, p: float):
        super().__init__()
        self.norm1, self.norm2, self.heads, self.p = nn.LayerNorm(width), nn.LayerNorm(width), heads, p
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(p))
        self.drop = nn.Dropout(p)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, width]"""
        qkv = self.qkv(self.norm1(x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in qkv)
        found = F.scaled_dot_product_attention(q, k, v, dropout_p=self.p, is_causal=True)
        x = x + self.drop(self.out(found.transpose(1, 2).flatten(2)))
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    """nanoGPT's setting for CPUs, with its dropout for small data."""

    def __init__(self, p: float = 0.1, width: int = 128, tokens: int = 64):
        super().__init__()
        self.words, self.places = nn.Embedding(65, width), nn.Embedding(tokens, width)
        self.drop, self.layers = nn.Dropout(p), nn.ModuleList(Layer(width, 4, p) for _ in range(4))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 65)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, tokens]"""
        x = self.drop(self.words(x) + self.places.weight)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x)).transpose(1, 2)


MODELS: dict[str, tuple[Callable[[], nn.Module], torch.Tensor, torch.Tensor]] = {
    "ResNet, batch 16": (ResNet, torch.randn(16, 3, 32, 32), torch.randint(10, (16,))),
    "decoder, batch 12": (Decoder, torch.randint(65, (12, 64)), torch.randint(65, (12, 64))),
}


def stepper(model: nn.Module, kind: str, x: torch.Tensor, y: torch.Tensor, compiled: bool) -> Callable[[], None]:
    """A function that takes a step."""
    samples, done = torch.randperm(50_000)[: len(x)], 0
    if kind == "keyed":
        draws.frame(model, None, parts=False)
        with draws.looking(draws.Draws(0, 0, model, "keyed"), samples[:2]):
            model(x[:2])
        draws.settle(model)
    drawing, optimizer = draws.Draws(0, 0, model, kind), torch.optim.AdamW(model.parameters())
    if compiled:
        model.compile()

    def step() -> None:
        nonlocal done
        with drawing.of(samples, done):
            F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        done += 1

    return step


def main() -> None:
    """Measures, and prints a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--steps", type=int, default=3, help="of a side in a round")
    parser.add_argument("--compiled", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| | ratio | quartiles |\n|---|---|---|")
    for name, (make, x, y) in MODELS.items():
        torch.manual_seed(0)
        model = make()
        sides = {kind: stepper(copy.deepcopy(model), kind, x, y, options.compiled) for kind in ("torch", "keyed")}
        ratios = []
        for turn in range(options.repeats + 2):
            took = {}
            for kind in sorted(sides, reverse=bool(turn % 2)):
                start = time.process_time()
                for _ in range(options.steps):
                    sides[kind]()
                took[kind] = time.process_time() - start
            ratios.append(took["keyed"] / took["torch"])
        low, median, high = statistics.quantiles(ratios[2:], n=4)
        print(f"| {name}{', compiled' * options.compiled} | {median:.2f} | {low:.2f}-{high:.2f} |", flush=True)


if __name__ == "__main__":
    main()
