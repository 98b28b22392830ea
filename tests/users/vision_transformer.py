"""A vision transformer of torchvision's with its own settings for some of its weights, and an average of all."""

import torch
from torchvision.models import VisionTransformer

from dist_train import Columns, Data


def small(input_shape: tuple[int, int, int], classes: int, layers: int = 2) -> VisionTransformer:
    """Two layers for pictures in patches of 8 by 8."""
    size = {"image_size": input_shape[1], "patch_size": 8, "num_layers": layers, "num_heads": 2}
    model = VisionTransformer(**size, hidden_dim=16, mlp_dim=24, num_classes=classes)
    torch.nn.init.normal_(model.heads.head.weight, std=0.2)  # torchvision begins with zeros
    return model


def corners(n: int = 30, n_test: int = 13) -> Data:
    """Pictures [3, 16, 16] of noise that is brighter in one of four corners."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(4, (n + n_test,), generator=generator)
    pictures = torch.rand(n + n_test, 3, 2, 8, 2, 8, generator=generator)
    for picture, label in zip(pictures, labels, strict=True):
        picture[:, label // 2, :, label % 2] += 0.5
    pictures = pictures.view(n + n_test, 3, 16, 16)
    train, test = (Columns((pictures[part], labels[part])) for part in (slice(n), slice(n, None)))
    return Data(train, test, input_shape=(3, 16, 16), classes=("top left", "top right", "bottom left", "bottom right"))
