"""A ResNet-18 of torchvision's, as narrow as small pictures need; its norms keep the statistics that they have."""

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from dist_train import Columns, Data


class Narrow(ResNet):
    """An eighth of the usual channels."""

    def __init__(self, classes: int):
        super().__init__(BasicBlock, [2, 2, 2, 2], num_classes=classes)
        self.fc = nn.Linear(64, classes)

    def _make_layer(self, block, planes, *more, **options):
        return super()._make_layer(block, planes // 8, *more, **options)


def stripes(n: int = 30, n_test: int = 13) -> Data:
    """Pictures [3, 16, 16] with stripes in one of three directions."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    waves = torch.stack([torch.sin(at.float()) for at in (x, y, x + y)])
    labels = torch.randint(3, (n + n_test,), generator=generator)
    pictures = waves[labels].unsqueeze(1) + 0.5 * torch.randn(n + n_test, 3, 16, 16, generator=generator)
    train, test = (Columns((pictures[part], labels[part])) for part in (slice(n), slice(n, None)))
    return Data(train, test, input_shape=(3, 16, 16), classes=("columns", "rows", "diagonals"))
