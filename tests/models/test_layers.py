"""Layers by name: those that are frozen, and those that are sharded each by itself."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from dist_train.config.load import load
from dist_train.errors import ConfigError
from dist_train.models.blocks import blocks
from dist_train.models.frozen import freeze
from dist_train.run import assemble

import zoo_cells
from checkpoint_runs import ARGV, DDP, SINGLE, refused
from parity_cells import ALONE
from zygote import Zygote

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT asks transformers by an old name
LAYERS = {
    "ResNet18": ["BasicBlock"] * 8,
    "VisionTransformer": ["EncoderBlock", "EncoderBlock", "Linear"],
    "Bert": ["BertLayer", "BertLayer"],
    "BertLora": ["BertLayer", "BertLayer", "Linear"],
    "Llama": ["LlamaDecoderLayer", "LlamaDecoderLayer"],
}


def built(kind: str) -> nn.Module:
    """The model of a kind of the zoo, without memory."""
    cell = zoo_cells.config(kind, n=4)
    data = assemble.read_data(cell.data, False)
    with torch.device("meta"):
        return assemble.maker(cell, data)()


@cache
def resnet() -> nn.Module:
    return built("ResNet18")


class Net(nn.Module):
    """Two linear layers that share a weight, a norm with statistics and one without, and a buffer."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.second.weight = self.first.weight
        self.norm, self.plain = nn.BatchNorm1d(4), nn.LayerNorm(4)
        self.register_buffer("scale", torch.ones(4))

    def forward(self, x):
        return self.head(self.plain(self.norm(self.second(self.first(x)) * self.scale)))


def trained(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


@pytest.mark.parametrize(
    ("patterns", "left"),
    [
        (["head.*", "plain.*", "norm.*"], ["first.weight", "first.bias", "second.bias"]),
        (["second.*", "norm.*"], ["first.bias", "head.weight", "head.bias", "plain.weight", "plain.bias"]),  # tied
        (["*", "!head.*"], ["head.weight", "head.bias"]),
        (["*", "!head.*", "*.bias"], ["head.weight"]),
        (["*", "!second.*"], ["first.weight", "second.bias"]),
        (["scale"], trained(Net())),
    ],
)
def test_weights_are_frozen_by_name(patterns: list[str], left: list[str]):
    model = Net()
    freeze(model, patterns)
    assert trained(model) == left


def test_a_frozen_norm_keeps_its_statistics_whoever_says_train():
    model, untouched = Net(), Net()
    freeze(model, ["norm.*"])
    freeze(untouched, ["norm.weight", "norm.bias"])  # its statistics were not named
    for each in (model, untouched):
        each.eval().train()(torch.ones(3, 4))
    assert not model.norm.training and model.plain.training and untouched.norm.training
    assert torch.equal(model.norm.running_mean, torch.zeros(4)) and int(model.norm.num_batches_tracked) == 0
    assert int(untouched.norm.num_batches_tracked) == 1


def test_an_evaluation_leaves_frozen_norms_as_they_are():
    cell = zoo_cells.config("ResNet18", n=4)
    parts = assemble.build(cell, torch.device("cpu"))
    norms = [module for name, module in parts.model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    parts.evaluation(cell, ALONE).run(parts.model)
    assert len(norms) == 20 and not any(norm.training for norm in norms) and parts.model.training
    assert parts.findings.buffers == () and "of them trained" in parts.describe()


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("norm", "model.frozen: got 'norm', which matches no parameter or buffer, expected a pattern of their names, "
                 "such as first.weight; the model has first, second, head, norm, plain, scale; did you mean norm.*?"),
        ("!heads.weight", "; did you mean head.weight?"),
        ("zzz*", "such as first.weight; the model has first, second, head, norm, plain, scale"),
    ],
)  # fmt: skip
def test_a_pattern_that_matches_nothing_is_refused(pattern: str, said: str):
    with pytest.raises(ConfigError) as caught:
        freeze(Net(), ["*", pattern])
    assert caught.value.lines[0].endswith(said)


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_of_libraries_are_found(kind: str):
    model = resnet() if kind == "ResNet18" else built(kind)
    assert [type(layer).__name__ for layer in blocks(model)] == LAYERS[kind]


@pytest.mark.parametrize(
    ("named", "count"),
    [(["layer?"], 4), (["BasicBlock"], 8), (["layer[34].*"], 4), (["layer1", "fc"], 2), (["*"], 7), ([], 0)],
)
def test_layers_by_name_or_class(named: list[str], count: int):
    found = list(blocks(resnet(), named))
    assert len(found) == count and resnet() not in found
    within = [other for layer in found for other in layer.modules() if other is not layer]
    assert not set(within).intersection(found)  # one that lies in another would be sharded twice


def test_members_of_a_list_that_is_named():
    """A list has no forward of its own, at which its weights would be gathered."""
    found = list(blocks(built("Llama"), ["model.layers"]))
    assert [type(layer).__name__ for layer in found] == LAYERS["Llama"]


@pytest.mark.parametrize(
    ("named", "said"),
    [
        (["Basicblock"], "model.blocks: got 'Basicblock', which matches no layer with weights, expected names or "
                         "classes of layers; the model has Conv2d, BatchNorm2d, Sequential, BasicBlock, Linear"),
        (["layer1", "relu"], "model.blocks: got 'relu', which matches no layer with weights, "),
    ],
)  # fmt: skip
def test_a_name_without_a_layer_is_refused(named: list[str], said: str):
    with pytest.raises(ConfigError) as caught:
        list(blocks(resnet(), named))
    assert caught.value.lines[0].startswith(said)


def test_a_layer_that_shares_a_weight_is_refused_where_it_is_named():
    with pytest.raises(ConfigError, match="got .'second'., which matches second, but its weight is shared with"):
        list(blocks(Net(), ["second"]))
    assert list(blocks(nn.Sequential(nn.Linear(2, 2), Net()), None))  # else it goes with the model


@pytest.mark.parametrize("key", ["frozen", "blocks"])
def test_both_are_checked_before_a_start(key: str):
    cell = zoo_cells.config("ResNet18", n=4)
    cell = replace(cell, model=replace(cell.model, **{key: ["layerX*"]}))
    with pytest.raises(ConfigError, match=f"model.{key}: got 'layerX.'"):
        assemble.build(cell, torch.device("cpu"))


def test_weights_are_thawed_in_a_resumed_run_by_one_who_says_so(zygote: Zygote, tmp_path: Path):
    """The first half with a frozen layer, the second without, on other ranks."""
    half = ["--train.max_steps", "6"]
    zygote.run(DDP.run(tmp_path, *half, "--model.frozen", "[layers.1.*]"))[0].check()
    drawn = assemble.build(load(list(ARGV)), torch.device("cpu")).model.state_dict()
    first = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert differ(drawn, first) == first.keys() - {"layers.1.weight", "layers.1.bias"}
    (tmp_path / "summary.json").unlink()  # as of a run that is not finished
    said = refused(zygote.run(SINGLE.run(tmp_path))[0])
    assert "model.frozen: got [], expected ['layers.1.*'] as in " in said
    assert "checkpoint.allow '[model.frozen]'" in said
    zygote.run(SINGLE.run(tmp_path, "--checkpoint.allow", "[model.frozen]"))[0].check()
    assert differ(first, torch.load(tmp_path / "weights.pt", weights_only=True)) == first.keys()


def differ(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, value in a.items() if not torch.equal(value, b[name])}


@pytest.mark.parametrize("kind", ["Bert", "BertRecomputed", "BertLora", "Llama"])
def test_a_first_look_at_a_model_of_transformers(kind: str):
    """Its inputs are named numbers that take no gradient; and it leaves no trace, with dropout as well."""
    cell = zoo_cells.config(kind, n=4)
    if kind == "Bert":
        args = {"config": cell.model.args["config"] | {"hidden_dropout_prob": 0.3}}
        cell = replace(cell, model=replace(cell.model, args=args))
    drawn = torch.get_rng_state()
    parts = assemble.build(cell, torch.device("cpu"))
    found = parts.findings
    assert torch.equal(torch.get_rng_state(), drawn)
    assert (found.unused, found.written, found.buffers, found.needs_two) == ((), (), (), False)
    assert found.sample_bytes == (8 + 8 + 1) * 8 + 3 * 4  # words, mask, label; logits
    assert all(p.grad is None for p in parts.model.parameters())
    fresh = assemble.maker(cell, parts.data)().state_dict()
    assert all(torch.equal(value, fresh[name]) for name, value in parts.model.state_dict().items())
