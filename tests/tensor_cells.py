"""Models whose layers are split over tensor ranks, runs of them, and what may go wrong in these: apart from the tests,
so that both can import it."""

import dataclasses
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest import mock

import torch
import torch.distributed as torch_dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

from dist_train import Columns, Data
from dist_train.backends import mesh, tensor
from dist_train.backends.fsdp2 import FSDP2
from dist_train.config.tree import (
    BackendConfig,
    CompileConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    TaskConfig,
    TrackConfig,
    TrainConfig,
)
from dist_train.loop import optim
from dist_train.models import draw_functions
from dist_train.models.cache import Cache
from dist_train.models.draws import Draws
from dist_train.ranks import dist
from dist_train.ranks.dist import World
from dist_train.run import assemble
from dist_train.tools.agreement import Trajectory
from dist_train.tools.trajectory import trajectory

import parity_cells

STEPS = 4
VOCABULARY, BLOCK = 65, 12
# Small enough that training does not amplify the last bit. The gradient of a token that is in no batch is 0.
ADAMW = OptimConfig(name="AdamW", lr=1e-3, weight_decay=0.1, args={"eps": 1e-3})


def documents(n: int = 40, n_test: int = 7) -> Data:
    """Windows of made-up tokens, in each of which two documents are packed; some targets do not count."""
    generator = torch.Generator().manual_seed(3)
    numbers = torch.randint(VOCABULARY, (n + n_test, BLOCK + 1), generator=generator)
    ids, targets = numbers[:, :-1].clone(), numbers[:, 1:].clone()
    targets[::3, :4] = -100
    places = torch.arange(BLOCK).expand(n + n_test, -1).clone()
    places[:, 5:] -= 5
    columns = {"input_ids": ids, "targets": targets, "position_ids": places}
    train, test = ({name: rows[part] for name, rows in columns.items()} for part in (slice(n), slice(n, None)))
    return Data(Columns(train), Columns(test), facts={"vocab_size": VOCABULARY, "block": BLOCK})


def pictures(n: int = 40, n_test: int = 7) -> Data:
    """Made-up pictures [1, 8, 8] of three classes."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(3, (n + n_test,), generator=generator)
    pixels = torch.randn(n + n_test, 1, 8, 8, generator=generator) + labels[:, None, None, None] * 0.5
    train, test = (Columns((pixels[part], labels[part])) for part in (slice(n), slice(n, None)))
    return Data(train, test, input_shape=(1, 8, 8), classes=("a", "b", "c"))


class Attention(nn.Module):
    """Knows nothing of ranks; its dropout is in the weights."""

    def __init__(self, width: int, size: int):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.size = size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (of(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for of in (self.q, self.k, self.v))
        found = F.scaled_dot_product_attention(q, k, v, dropout_p=0.2 * self.training)
        return self.out(found.transpose(1, 2).flatten(2))


class Encoder(nn.Module):
    """Dropout wherever it may be."""

    def __init__(self, width: int):
        super().__init__()
        self.one, self.two = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.drop = Attention(width, 4), nn.Dropout(0.2)
        self.mlp = nn.Sequential(nn.Linear(width, 24), nn.GELU(), nn.Dropout(0.2), nn.Linear(24, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop(self.attention(self.one(x)))
        return x + self.drop(self.mlp(self.two(x)))


class ViT(nn.Module):
    """A small vision transformer, with a BatchNorm, and with weights that all ranks compute with alike."""

    def __init__(self, classes: int, width: int = 16):
        super().__init__()
        self.patches, self.norm = nn.Conv2d(1, width, 2, stride=2), nn.BatchNorm2d(width)
        self.places = nn.Parameter(torch.randn(1, 16, width) * 0.1)
        self.embedded, self.layers = nn.Dropout(0.2), nn.ModuleList(Encoder(width) for _ in range(2))
        self.last, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.patches(x)).flatten(2).transpose(1, 2) + self.places
        x = self.embedded(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.last(x).mean(1))


DECODER = {"layers": 2, "width": 16, "heads": 4, "kv_heads": 2, "mlp_width": 24}
LLAMA = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA |= {"intermediate_size": 24, "attention_dropout": 0.2, "tie_word_embeddings": True}
LLAMA_SPLIT = {
    "*.[qkv]_proj": "columns by 4",
    "*.o_proj": "rows by 4",
    "*.gate_proj": "columns",
    "*.up_proj": "columns",
    "*.down_proj": "rows",
    "*.embed_tokens": "rows",
    "lm_head": "columns gathered",
}
VIT_SPLIT = {"*.[qkv]": "columns by 4", "*.out": "rows by 4", "*.mlp.0": "columns", "*.mlp.3": "rows"}
VIT_TOKENS = VIT_SPLIT | {
    "embedded": "cut",
    "*.one": "sequence",
    "*.two": "sequence",
    "*.attention": "gather",
    "layers.?.mlp": "gather",
    "last": "gather",
}
TEXT = {
    "decoder": ModelConfig(name="decoder", args=DECODER, dropout=0.2),
    "heads": ModelConfig(name="decoder", args=DECODER | {"kv_heads": 4}, dropout=0.2),
    "untied": ModelConfig(name="decoder", args=DECODER | {"tied": False}, dropout=0.2, frozen=["*.k_proj.weight"]),
    "llama": ModelConfig(name="transformers:LlamaForCausalLM", args={"config": LLAMA}, split=LLAMA_SPLIT),
}
PICTURES = {
    # No kink, at which rounding would decide whether a unit is on.
    "mlp": ModelConfig(hidden=[24, 12, 8], activation="Tanh", dropout=0.2),
    "vit": ModelConfig(name="tensor_cells:ViT", split=VIT_SPLIT, batch_statistics={"group": 1}),
    "vit_tokens": ModelConfig(name="tensor_cells:ViT", split=VIT_TOKENS, batch_statistics={"group": 1}),
}


def cell(
    name: str, sizes: dict[str, int] | None = None, compiled: bool = False, recompute: str = "none", start: str = "auto"
) -> Config:  # fmt: skip
    """A run of ragged shares and micro-batches, with dropout.

    Args:
        name: of TEXT or PICTURES.
        sizes: backend.mesh; None is one process.
        compiled: compile.mode default.
        recompute: see backend.recompute.
        start: see backend.start.
    """
    train = TrainConfig(
        epochs=STEPS, max_steps=STEPS, global_batch_size=14, micro_batch_size=3, device="cpu", eval_every_epochs=None
    )
    return Config(
        data=DataConfig(name=f"tensor_cells:{'documents' if name in TEXT else 'pictures'}"),
        model=(TEXT | PICTURES)[name],
        task=TaskConfig(name="language_modelling" if name in TEXT else "classification"),
        optim=ADAMW,
        train=train,
        backend=BackendConfig(name="fsdp2", mesh=sizes, recompute=recompute, start=start)
        if sizes
        else BackendConfig(name="single"),
        compile=CompileConfig(mode="default" if compiled else "off"),
        track=TrackConfig(every_steps=1),
    )


@cache
def _data_group(ranks: int) -> torch_dist.ProcessGroup:
    size = torch_dist.get_world_size()
    return torch_dist.new_subgroups_by_enumeration([list(range(at, size, ranks)) for at in range(ranks)])[0]


def world_of(config: Config) -> World:
    """In a worker: its place on the mesh of a config, as a run that joins takes it."""
    world = parity_cells.this_world()
    ranks = mesh.of(config, world.size).tensor
    dist._data = None if ranks == 1 else _data_group(ranks)
    return dataclasses.replace(world, tensor=ranks)


def run_cells(cells: list[Config], fault: str | None = None, unseen: bool = False) -> list[Trajectory | str]:
    """In a worker: each config's run, or the error that it ends with.

    Args:
        cells: configs on meshes.
        fault: a function of here.
        unseen: nothing is compared before training.
    """
    found: list[Trajectory | str] = []
    with mock.patch.object(tensor, "_others", lambda *_: "") if unseen else mock.MagicMock():
        for one in cells:
            with globals()[fault]() if fault else mock.MagicMock():
                try:
                    found.append(trajectory(one, world_of(one)))
                except Exception as error:
                    found.append("".join(traceback.format_exception(error)))
    return found


# -- faults ------------------------------------------------------------------------------------------------------------


@contextmanager
def dropout_differs_between_tensor_ranks() -> Iterator[None]:
    """Each has masks of its own."""
    keys = Draws.keys
    with mock.patch.object(Draws, "keys", lambda self, *of: keys(self, *of) + self.part[0]):
        yield


@contextmanager
def dropout_of_another_part() -> Iterator[None]:
    """Each has the masks of the first part."""
    with mock.patch.object(draw_functions, "_first", lambda known, own: ()):
        yield


@contextmanager
def dropout_equal_between_data_ranks() -> Iterator[None]:
    """By the place of a sample in the batch, not by its number."""
    keys = Draws.keys
    with mock.patch.object(Draws, "keys", lambda self, ids, *of: keys(self, torch.arange(len(ids)), *of)):
        yield


@contextmanager
def embedding_off_by_one_part() -> Iterator[None]:
    """Each rank has the next one's rows."""
    cut = tensor.Rows._partition_embedding_fn

    def wrong(self: Any, name: str, module: nn.Module, devices: DeviceMesh) -> None:
        each = -(-module.weight.shape[0] // devices.size())
        module.weight = nn.Parameter(module.weight.detach().roll(-each, 0))
        cut(self, name, module, devices)

    with mock.patch.object(tensor.Rows, "_partition_embedding_fn", wrong):
        yield


@contextmanager
def bias_on_every_tensor_rank() -> Iterator[None]:
    """It is added as often as there are ranks."""
    give = tensor.Rows._prepare_output_fn

    def wrong(self: Any, gives: Any, local: bool, module: nn.Module, outputs: Any, devices: DeviceMesh) -> Any:
        bias = getattr(module, "bias", None)
        more = outputs if bias is None else outputs + bias * (devices.size() - 1)
        return give(self, gives, local, module, more, devices)

    with mock.patch.object(tensor.Rows, "_prepare_output_fn", wrong):
        yield


@contextmanager
def gradient_summed_over_tensor_ranks() -> Iterator[None]:
    """That of weights of which each has a copy, and which is whole already."""
    step = FSDP2.step

    def wrong(self: FSDP2, *of: Any) -> Any:
        for name, parameter in self.model.named_parameters():
            if "norm" in name or "one" in name or "last" in name:
                parameter.grad *= self.world.tensor
        return step(self, *of)

    with mock.patch.object(FSDP2, "step", wrong):
        yield


@contextmanager
def norm_left_out() -> Iterator[None]:
    """A layer computes a part of the tokens, and nobody says so: the gradient of its weight is a part."""
    words_of = tensor.words_of

    def wrong(*of: Any) -> dict[str, Any]:
        return {name: word for name, word in words_of(*of).items() if not name.endswith("input_layernorm")}

    with mock.patch.object(tensor, "words_of", wrong):
        yield


# -- what else the workers do ------------------------------------------------------------------------------------------


def sizes_of(config: Config) -> dict[str, tuple[int, int]]:
    """In a worker: of each parameter, the numbers that this rank holds once it is split and sharded, and all."""
    return _prepared(config, lambda model: {n: (p.to_local().numel(), p.numel()) for n, p in model.named_parameters()})


def read_with_cache(config: Config, rows: list[list[int]]) -> list:
    """In a worker: logits of a split decoder in eval mode, which gets the first three tokens, and then one by one."""

    def read(model: nn.Module) -> list:
        model.eval()
        tokens = torch.tensor(rows)
        cache = Cache(len(model.model.layers))
        with torch.no_grad():
            parts = [model(tokens[:, :3], cache=cache)]
            parts += [model(tokens[:, i : i + 1], cache=cache) for i in range(3, tokens.shape[1])]
        return torch.cat(parts, 1).tolist()

    return _prepared(config, read)


def _prepared(config: Config, then: Callable[[nn.Module], Any]) -> Any:
    world = world_of(config)
    parts = assemble.build(config, world.device)
    model, _ = FSDP2(config, world, parts.findings).prepare(
        parts.model, optim.factory(config.optim, parts.model, False)
    )
    return then(model)
