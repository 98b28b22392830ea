"""A model that is made later has the bits of one that is built at once, and never more than a few tensors of it are
there together."""

import copy
import random
import re
from collections.abc import Callable
from unittest import mock

import numpy as np
import pytest
import torch
from start_cells import hashes, peak_bytes
from torch import nn

from dist_train.models import deferred
from dist_train.models.decoder import Decoder
from dist_train.models.deferred import record
from dist_train.models.mlp import MLP
from dist_train.models.recording import Unrecordable
from dist_train.models.unet import UNet

import zoo

SEED = 7


def torchvision(name: str, **args) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from torchvision import models

        return getattr(models, name)(**args)

    return make


def transformers(name: str, config: str, **args) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers as library

        return getattr(library, name)(getattr(library, config)(**args))

    return make


class Truncated(nn.Module):
    """Draws until all numbers fit, and so reads values; in both of torch's ways."""

    def __init__(self):
        super().__init__()
        self.first, self.table = nn.Linear(50, 60), nn.Parameter(torch.empty(40, 30))
        self.far, self.last = nn.Parameter(torch.empty(33)), nn.Linear(3, 3)
        nn.init.trunc_normal_(self.first.weight, std=1.0, a=-1.0, b=1.0)
        nn.init.trunc_normal_(self.table, std=0.02, a=-0.04, b=0.04)
        nn.init.trunc_normal_(self.far, mean=3.0, std=1.0, a=-1.0, b=1.0)
        nn.init.normal_(self.last.bias)


class Initialised(nn.Module):
    """In many ways."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(50, 60), nn.Conv2d(3, 5, 3), nn.Linear(4, 4)
        for layer in (self.a, self.b):
            nn.init.orthogonal_(layer.weight)
        nn.init.dirac_(self.b.weight[:3])
        with torch.no_grad():
            self.a.weight[3:7, ::2].mul_(2)
            self.a.weight[:, 4].normal_()  # a part of it
            self.a.bias[1] = 5.0
            self.c.weight.copy_(torch.eye(4) * torch.randn(4, 1))
            self.c.weight[self.c.weight > 0] = 1
            torch.mul(self.c.bias, 2, out=self.c.bias)
        self.same = copy.deepcopy(self.a)
        self.words = nn.Embedding(10, 4, padding_idx=3)
        nn.init.sparse_(nn.Linear(5, 6).weight, 0.2)  # of a layer that goes
        self.register_buffer("steps", torch.linspace(0, 1, 5))
        self.register_buffer("drawn", torch.randn(4, 4).cumsum(0), persistent=False)
        self.rates = [x.item() for x in torch.linspace(0, 0.1, 4)]
        self.scale = torch.tensor([1.5, float(len(self.rates))]) * torch.from_numpy(np.arange(2))
        self.order = nn.Parameter(torch.randperm(6).float())
        self.flat = nn.Parameter(torch.empty(2, 3))
        self.flat.data = torch.rand(6).view(2, 3)
        self.last = nn.Linear(2, 2).double()


class Transposed(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(4, 3).t())
        self.tied = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
        self.tied[1].weight = self.tied[0].weight
        self.frozen = nn.Linear(3, 2).requires_grad_(False)


LLAMA = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS = {
    "mlp": lambda: MLP((1, 8, 8), 10),
    "decoder": lambda: Decoder(300, 32, layers=2),
    "decoder, untied": lambda: Decoder(300, 32, layers=2, tied=False, kv_heads=2),
    "unet": lambda: UNet((3, 32, 32), 4),
    "resnet18": torchvision("resnet18"),
    "vit": torchvision(
        "VisionTransformer", image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=128
    ),
    "gpt2": transformers("GPT2LMHeadModel", "GPT2Config", n_embd=64, n_layer=2, n_head=2, vocab_size=101),
    "llama": transformers("LlamaForCausalLM", "LlamaConfig", vocab_size=101, **LLAMA),
    "nn.Transformer": lambda: nn.Transformer(16, 2, 2, 2, 32),
    "truncated": Truncated,
    "initialised": Initialised,
    "transposed": Transposed,
    **{kind: lambda kind=kind: getattr(zoo, kind)(zoo.SHAPE, zoo.CLASSES) for kind in ("Complex", "SpectralNorm")},
}


def seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        torch.default_generator.manual_seed(SEED)
        return make()

    return made


def made_later(make: Callable[[], nn.Module]) -> tuple[nn.Module, dict[str, str]]:
    """The model on meta, and the hashes of what it gets."""
    model, later = record(seeded(make))
    found: dict[str, str] = {}
    by_storage: dict[int, list] = {}
    for each in later.tensors:
        by_storage.setdefault(each.place.storage, []).append(each)

    def give(number: int, view: Callable) -> None:
        for each in by_storage.pop(number):
            found.update(hashes({name: view(each.place) for name in each.names}))

    before = torch.get_rng_state()
    later.replay(list(by_storage), give)
    assert torch.equal(before, torch.get_rng_state()) and not by_storage
    return model, found


def held(model: nn.Module) -> dict[str, torch.Tensor]:
    """All tensors of its modules, by each of their names."""
    return {
        f"{name}.{own}" if name else own: value
        for name, module in model.named_modules(remove_duplicate=False)
        for those in (module._parameters, module._buffers, vars(module))
        for own, value in those.items()
        if isinstance(value, torch.Tensor)
    }


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")  # of torch's own transformer
@pytest.mark.parametrize("name", MODELS)
def test_the_same_bits(name: str):
    whole = seeded(MODELS[name])()
    model, found = made_later(MODELS[name])
    assert all(value.is_meta for value in held(model).values())
    assert found == hashes(held(whole))
    for (own, meta), real in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert (meta.shape, meta.dtype, meta.requires_grad) == (real.shape, real.dtype, real.requires_grad), own


def test_a_planted_fault_is_caught():
    """Numbers of a weight that is drawn again later are not consumed, so that all others shift."""
    expected, planned = hashes(held(seeded(MODELS["decoder"])())), deferred.planned

    def without(*args, **kwargs):
        return [each for each in planned(*args, **kwargs) if not each.only_draws]

    with mock.patch.object(deferred, "planned", without):
        assert made_later(MODELS["decoder"])[1] != expected


def test_only_few_tensors_are_there_at_a_time():
    make = lambda: Decoder(512, 32, layers=6, width=256, tied=False)  # noqa: E731
    whole, sizes = [], []
    built = peak_bytes(lambda: whole.append(seeded(make)()))
    weights = [p.nbytes for p in whole[0].parameters()]
    assert built >= sum(weights)  # what is measured is seen
    _, later = record(seeded(make))
    by_storage = {each.place.storage for each in later.tensors}
    peak = peak_bytes(lambda: later.replay(by_storage, lambda number, view: sizes.append(number)))
    assert len(sizes) == len(weights) and peak <= max(weights) + 100_000 < sum(weights) / 10


def test_values_that_are_read_do_not_gather():
    """Each truncated normal is drawn in the memory of a few of its tensors."""

    def make() -> nn.Module:
        layers = nn.ModuleList(nn.Linear(256, 256) for _ in range(30))
        for layer in layers:
            nn.init.trunc_normal_(layer.weight, std=1.0)
        return layers

    assert peak_bytes(lambda: record(seeded(make))) < 12 * 256 * 256 * 4


class Odd(nn.Module):
    def __init__(self, what: str):
        super().__init__()
        self.first = nn.Linear(2, 2)
        getattr(self, what)()
        self.last = nn.Linear(2, 2)

    def seeds(self):
        torch.manual_seed(3)

    def forks(self):
        with torch.random.fork_rng(devices=[]):
            self.middle = nn.Linear(2, 2)

    def draws(self):
        self.middle = nn.Parameter(torch.randn(2, generator=torch.Generator().manual_seed(1)))

    def reads(self):
        if self.first.weight.sum() > 0:
            torch.rand(1).item()
            float(self.first.bias.sum())

    def keeps(self):
        self.tables = [torch.ones(2)]

    def shares(self):
        table = np.zeros(4, np.float32)
        self.register_buffer("table", torch.from_numpy(table))
        table[:] = 1

    def brings(self):
        self.first.weight.data.copy_(torch.from_numpy(np.zeros((1 << 24, 2), np.float32))[:2])

    def catches(self):
        try:
            self.keeps()
            self.first.weight.data_ptr()
        except Exception:
            del self.tables

    def fails(self):
        raise ValueError("no")


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("seeds", "seeds torch's generator"),
        ("forks", "seeds torch's generator, or puts it back"),
        ("draws", "draws from a generator of its own"),
        ("reads", "reads values of tensors"),
        ("keeps", "keeps tensors in lists or objects of its own"),
        ("shares", "writes to arrays that are not torch's"),
        ("brings", "has large tensors from elsewhere"),
        ("catches", "asks for the address of a tensor"),
        ("fails", r"does not run on tensors without values \(ValueError: no\)"),
    ],
)
def test_what_cannot_be_made_again_is_told(what: str, why: str):
    with pytest.raises(Unrecordable) as caught:
        record(seeded(lambda: Odd(what)))
    assert re.match(why, str(caught.value))


def test_nothing_stays_of_what_was_not_recorded():
    """The model is built again then, and draws as if it were the first time."""

    def make() -> nn.Module:
        model = nn.Linear(2, 2)
        model.drawn = [random.random(), np.random.rand()]
        model.tables = [torch.ones(2)]
        return model

    random.seed(1), np.random.seed(1)
    before = torch.get_rng_state()
    expected = make().drawn
    torch.set_rng_state(before)
    random.seed(1), np.random.seed(1)
    with pytest.raises(Unrecordable):
        record(make)
    assert make().drawn == expected
    assert record(lambda: nn.Linear(2, 2), least=7) is None and record(lambda: nn.Linear(2, 2), least=6) is not None
