"""The decoder: transformers' Llama in arithmetic and names, documents apart, and a cache."""

import math

import pytest
import torch
from torch import nn

from dist_train.config.tree import OptimConfig
from dist_train.errors import ConfigError
from dist_train.loop.groups import groups_of
from dist_train.models import decoder
from dist_train.models.blocks import blocks
from dist_train.models.cache import Cache
from dist_train.models.decoder import Decoder

VOCAB, BLOCK = 101, 32
# Documents of a window, and the same with none that says where they begin.
STARTS = torch.cat([torch.arange(n) for n in (10, 1, 14, 7)]).expand(2, -1)
SHAPES = {
    "tied": {},
    "untied, grouped": {"tied": False, "kv_heads": 2},
    "tied, one of keys, wide heads": {"kv_heads": 1, "head_size": 24},
}


def made(dtype=torch.float64, **args) -> Decoder:
    torch.manual_seed(0)
    return Decoder(VOCAB, BLOCK, layers=3, width=64, heads=4, rope_theta=5000.0, **args).to(dtype)


def tokens(rows: int = 2) -> torch.Tensor:
    return torch.randint(VOCAB, (rows, BLOCK), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("args", SHAPES.values(), ids=SHAPES)
def test_it_is_llama(args):
    transformers = pytest.importorskip("transformers")
    ours = made(torch.float32, **args)
    size, tied = args.get("head_size", 16), args.get("tied", True)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=args.get("kv_heads", 4), head_dim=size, rms_norm_eps=1e-5, tie_word_embeddings=tied,
        max_position_embeddings=BLOCK, rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config)
    state = ours.state_dict()
    assert ("lm_head.weight" in state) is not tied
    assert list(state) == [name for name, _ in theirs.named_parameters()]
    loaded = theirs.load_state_dict(state, strict=False)
    assert loaded.missing_keys == (["lm_head.weight"] if tied else []) and not loaded.unexpected_keys
    for dtype, near in ((torch.float32, 1e-5), (torch.float64, 1e-9)):
        ours, theirs = ours.to(dtype), theirs.to(dtype)
        if dtype == torch.float64:  # theirs squares in float32
            for module in [module for module in theirs.modules() if "Norm" not in type(module).__name__]:
                for name, norm in module.named_children():
                    if "Norm" in type(norm).__name__:
                        setattr(module, name, nn.RMSNorm(64, 1e-5, dtype=dtype))
        for given in ({}, {"position_ids": STARTS}):
            with torch.no_grad():
                wanted = theirs(input_ids=tokens(), use_cache=False, **given).logits
                assert (ours(tokens(), **given) - wanted).abs().max() < near


def test_initial_weights():
    model = Decoder(512, 8, layers=8, width=256, heads=4, tied=False)
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            assert (parameter == 1).all()
        else:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            assert float(parameter.detach().std()) == pytest.approx(0.02 / (4 if residual else 1), rel=0.02)


@pytest.mark.parametrize("args", SHAPES.values(), ids=SHAPES)
def test_documents_that_are_packed_are_as_alone(args):
    model, rows = made(**args), tokens()
    assert _apart(model, rows) < 1e-12


def test_documents_that_leak_are_seen(monkeypatch):
    model, rows = made(), tokens()
    with monkeypatch.context() as planted:  # a mask that leaks
        planted.setattr(decoder, "_mask", lambda input_ids, position_ids, first: None)
        assert _apart(model, rows) > 1e-3
    # Positions that do not start anew: the mask is made of them. Rotary angles alone would not show it, as a token sees
    # only how far others are from it.
    assert _apart(model, rows, torch.arange(BLOCK).expand(2, -1)) > 1e-3


def _apart(model: Decoder, rows: torch.Tensor, positions: torch.Tensor = STARTS) -> float:
    """The largest difference between logits of packed documents and of each alone."""
    first = [*(STARTS[0] == 0).nonzero().flatten().tolist(), BLOCK]
    with torch.no_grad():
        alone = [model(rows[:, i:j]) for i, j in zip(first, first[1:], strict=False)]
        return float((model(rows, positions) - torch.cat(alone, 1)).abs().max())


@pytest.mark.parametrize("args", SHAPES.values(), ids=SHAPES)
def test_a_cache_gives_the_same(args):
    model, rows = made(**args).eval(), tokens()
    cache = Cache(3)
    with torch.no_grad():
        whole, parts = model(rows), []
        for part in rows.split([7, 1, 1, 5, 1, 17], 1):
            parts.append(model(part, cache=cache))
    assert len(cache) == BLOCK
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-12
    with torch.no_grad():
        fault = model(rows[:, 7:8], cache=Cache(3))  # of a token that does not know those before it
    assert (fault[:, 0] - whole[:, 7]).abs().max() > 1e-3


def test_memory_of_a_cache_grows_in_steps():
    cache = Cache(1).layers[0]
    sizes = set()
    for _ in range(100):
        cache.append(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2))
        sizes.add(cache.memory[0].shape[2])
    assert len(sizes) < math.log2(100)


def test_blocks_and_groups():
    for tied in (True, False):
        model = made(tied=tied)
        assert list(blocks(model)) == list(model.model.layers)
        groups = groups_of(OptimConfig(name="Muon", lr=0.01, no_decay=True), model)
        kinds = {name: groups.settings[groups.of.get(name, 0)] for name, _ in model.named_parameters()}
        for name, settings in kinds.items():
            matrix = ".self_attn." in name or ".mlp." in name
            assert settings["optimizer"] == ("Muon" if matrix else "AdamW"), name
            assert (settings.get("weight_decay") == 0) is ("norm" in name), name


def test_arguments_that_do_not_fit():
    with pytest.raises(ConfigError, match=r"model.args.kv_heads: got 3, expected a divisor of heads, which is 4"):
        made(kv_heads=3)
    with pytest.raises(ConfigError, match=r"model.args.head_size: got 15, expected an even number"):
        made(head_size=15)
