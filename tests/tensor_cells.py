"""Models whose layers are split over tensor ranks, and runs of them: apart from the tests, so that both can import
it."""

import dataclasses

import torch
from torch import nn
from torch.nn import functional as F

from dist_train import Columns, Data
from dist_train.config.tree import Config, DataConfig, ModelConfig, OptimConfig, TaskConfig, TrackConfig, TrainConfig

STEPS = 6
VOCABULARY, BLOCK = 65, 12
# Small enough that training does not amplify the last bit. The gradient of a token that is in no batch is 0.
ADAMW = OptimConfig(name="AdamW", lr=1e-3, weight_decay=0.1, args={"eps": 1e-3})


def documents(n: int = 40, n_test: int = 7, packed: bool = True) -> Data:
    """Windows of made-up tokens, in each of which two documents are packed; some targets do not count."""
    generator = torch.Generator().manual_seed(3)
    numbers = torch.randint(VOCABULARY, (n + n_test, BLOCK + 1), generator=generator)
    ids, targets = numbers[:, :-1].clone(), numbers[:, 1:].clone()
    targets[::3, :4] = -100
    columns = {"input_ids": ids, "targets": targets}
    if packed:
        places = torch.arange(BLOCK).expand(n + n_test, -1).clone()
        places[:, 5:] -= 5
        columns["position_ids"] = places
    train, test = ({name: rows[part] for name, rows in columns.items()} for part in (slice(n), slice(n, None)))
    return Data(Columns(train), Columns(test), facts={"vocab_size": VOCABULARY, "block": BLOCK})


def pictures(n: int = 40, n_test: int = 7) -> Data:
    """Made-up pictures [1, 8, 8] of three classes."""
    generator = torch.Generator().manual_seed(1)
    labels, noise = torch.randint(3, (n + n_test,), generator=generator), torch.randn(n + n_test, 1, 8, 8, generator=generator)
    noise += labels[:, None, None, None] * 0.5
    train, test = (Columns((noise[part], labels[part])) for part in (slice(n), slice(n, None)))
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
    """Dropout everywhere."""

    def __init__(self, width: int):
        super().__init__()
        self.one, self.two = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.drop = Attention(width, 4), nn.Dropout(0.2)
        self.mlp = nn.Sequential(nn.Linear(width, 24), nn.GELU(), nn.Dropout(0.2), nn.Linear(24, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop(self.attention(self.one(x)))
        return x + self.drop(self.mlp(self.two(x)))


class ViT(nn.Module):
    """A small vision transformer, with a BatchNorm and a weight of its own that all ranks compute alike."""

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


VIT = {"*.q": "columns by 4", "*.k": "columns by 4", "*.v": "columns by 4", "*.out": "rows by 4"}
VIT |= {"layers.*.mlp.0": "columns", "layers.*.mlp.3": "rows"}
VIT_TOKENS = VIT | {"embedded": "cut", "*.one": "sequence", "*.two": "sequence", "*.attention": "gather"}
VIT_TOKENS |= {"layers.*.mlp": "gather", "last": "gather"}
DECODER = {"layers": 2, "width": 16, "heads": 4, "kv_heads": 2, "mlp_width": 24}


def cell(name: str) -> Config:
    """A run by its name: decoder or untied, vit, vit_tokens, or mlp."""
    train = TrainConfig(
        epochs=STEPS, max_steps=STEPS, global_batch_size=14, micro_batch_size=3, device="cpu", eval_every_epochs=None
    )
    config = Config(optim=ADAMW, train=train, track=TrackConfig(every_steps=1))
    if name in ("decoder", "untied"):
        model = ModelConfig(name="decoder", args=DECODER | {"tied": name == "decoder"}, dropout=0.2)
        data, task = DataConfig(name="tensor_cells:documents"), TaskConfig(name="language_modelling")
        return dataclasses.replace(config, data=data, model=model, task=task)
    if name == "llama":
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        args = {"config": sizes | {"intermediate_size": 24, "attention_dropout": 0.2, "tie_word_embeddings": True}}
        table = {"*.[qkv]_proj": "columns by 4", "*.o_proj": "rows by 4", "*.gate_proj": "columns", "*.up_proj": "columns", "*.down_proj": "rows", "*embed_tokens": "rows", "lm_head": "columns gathered"}
        model = ModelConfig(name="transformers:LlamaForCausalLM", args=args, split=table)
        data, task = DataConfig(name="tensor_cells:documents"), TaskConfig(name="language_modelling")
        return dataclasses.replace(config, data=data, model=model, task=task)
    data = DataConfig(name="tensor_cells:pictures")
    if name == "mlp":
        # No kink, at which rounding would decide whether a unit is on.
        return dataclasses.replace(config, data=data, model=ModelConfig(hidden=[24, 12, 8], activation="Tanh", dropout=0.2))
    model = ModelConfig(name="tensor_cells:ViT", split=VIT if name == "vit" else VIT_TOKENS, batch_statistics={"group": 1})
    return dataclasses.replace(config, data=data, model=model)
