"""Layers that are split over tensor ranks: the result of one process, and what is refused before anything starts."""

import math
from functools import cache
from pathlib import Path

import pytest
import tensor_cells
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn import functional as F

from dist_train.config.tree import ModelConfig
from dist_train.errors import ConfigError
from dist_train.models import chunked_loss, draw_functions, split
from dist_train.models.decoder import Decoder
from dist_train.models.draw_bits import hashes
from dist_train.models.draw_functions import part_of
from dist_train.models.draw_places import Kind, now
from dist_train.models.mlp import MLP
from dist_train.models.split_words import Word, word_of
from dist_train.tools.agreement import Trajectory, difference

import parity_cells
from checkpoint_runs import weights
from workers import run_ranks
from zygote import Run, Zygote

TOLERANCE = 1e-5
TENSOR, SHARDED, COPIED = {"tensor": 2}, {"shard": 2, "tensor": 2}, {"replicate": 2, "shard": 1, "tensor": 2}
EVERY = [*tensor_cells.TEXT, *tensor_cells.PICTURES]


@cache
def alone(name: str) -> Trajectory:
    """The run of one process."""
    return parity_cells.run_single(tensor_cells.cell(name))


def off(
    sizes: dict[str, int], names: list[str], compiled: bool = False, timeout_s: float = 120, **given
) -> list[float | str]:  # fmt: skip
    """How far each run on a mesh is from one process, or the error that it ended with."""
    cells = [tensor_cells.cell(name, sizes, compiled) for name in names]
    runs = run_ranks(tensor_cells.run_cells, math.prod(sizes.values()), cells, *given.values(), timeout_s=timeout_s)[0]
    return [
        run if isinstance(run, str) else difference(run, alone(name)).worst
        for name, run in zip(names, runs, strict=True)
    ]


def agree(found: list[float | str]) -> None:
    assert not (failed := [error for error in found if isinstance(error, str)]), "\n".join(failed)
    assert max(found) < TOLERANCE


@pytest.mark.parametrize(
    ("sizes", "names"),
    [(TENSOR, ["decoder", "mlp", "vit_tokens"]), (SHARDED, ["untied"])],
    ids=["tensor", "shard and tensor"],
)
def test_the_result_of_one_process(sizes: dict[str, int], names: list[str]):
    agree(off(sizes, names))


@pytest.mark.full
@pytest.mark.parametrize("sizes", [TENSOR, SHARDED, COPIED], ids=lambda sizes: " ".join(sizes))
def test_the_result_of_one_process_everywhere(sizes: dict[str, int]):
    agree(off(sizes, EVERY, timeout_s=400))


@pytest.mark.full
def test_four_ranks_split_layers():
    agree(off({"tensor": 4}, ["mlp", "vit", "vit_tokens"]))


@pytest.mark.full
def test_it_may_be_compiled():
    agree(off(TENSOR, ["mlp", "decoder"], compiled=True, timeout_s=900))


SEEN = {  # by the comparison before training, by name of a run
    "dropout_differs_between_tensor_ranks": "decoder",
    "dropout_of_another_part": "decoder",
    "embedding_off_by_one_part": "decoder",
    "bias_on_every_tensor_rank": "mlp",
    "norm_left_out": "decoder",
}


@pytest.mark.parametrize(("fault", "name"), SEEN.items(), ids=list(SEEN))
def test_a_fault_is_seen_before_training(fault: str, name: str):
    (error,) = off(TENSOR, [name], fault=fault)
    assert "computes another" in error


@pytest.mark.parametrize(
    ("fault", "sizes", "name"),
    [
        *(pytest.param(fault, TENSOR, name, marks=pytest.mark.full) for fault, name in SEEN.items()),
        ("gradient_summed_over_tensor_ranks", TENSOR, "vit_tokens"),
        ("dropout_equal_between_data_ranks", SHARDED, "mlp"),
    ],
    ids=[*SEEN, "gradient_summed_over_tensor_ranks", "dropout_equal_between_data_ranks"],
)
def test_a_fault_changes_the_result(fault: str, sizes: dict[str, int], name: str):
    """So the parity tests can fail."""
    (found,) = off(sizes, [name], fault=fault, unseen=True)
    assert "gradient of" in found if isinstance(found, str) else not found < 10 * TOLERANCE


def test_a_rank_holds_its_part_alone():
    (first, *others) = run_ranks(tensor_cells.sizes_of, 2, tensor_cells.cell("decoder", TENSOR))
    split_ones = {name for name, (mine, whole) in first.items() if mine < whole}
    assert split_ones == {name for name in first if not name.endswith("norm.weight")}
    assert first["model.embed_tokens.weight"] == (33 * 16, 65 * 16)
    assert all(2 * mine == whole for name, (mine, whole) in first.items() if "_proj" in name)
    assert [of["model.embed_tokens.weight"][0] for of in others] == [32 * 16]


def test_a_split_decoder_writes_with_a_cache():
    """In evaluation each rank has all tokens, of which there may be an odd number."""
    tokens = torch.randint(65, (2, 9), generator=torch.Generator().manual_seed(0)).tolist()
    config = tensor_cells.cell("decoder", TENSOR)
    found, _ = run_ranks(tensor_cells.read_with_cache, 2, config, tokens)
    torch.manual_seed(config.train.seed)
    whole = Decoder(65, 12, **tensor_cells.DECODER, dropout=0.2).eval()
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(found), whole(torch.tensor(tokens)), rtol=1e-5, atol=1e-6)


def test_a_run_goes_on(zygote: Zygote, tmp_path: Path):
    """With weights that the first samples were not looked at with."""
    argv = ["--model.hidden", "[16, 8]", "--model.activation", "Tanh", "--model.dropout", "0.2", "--train.threads", "1"]
    argv += ["--train.device", "cpu", "--train.max_steps", "12", "--run.dir"]
    split_run = [*argv, str(tmp_path / "run"), "--backend.name", "fsdp2", "--backend.mesh.tensor", "2"]
    split_run += ["--checkpoint.every_steps", "4"]
    kill = dict.fromkeys(range(2), ("at_phase", "forward", 10, "kill"))
    assert set(zygote.run(Run(split_run, 2, kill, kill_all=True))[0].codes) == {-9}
    assert "step-00000008: step 8" in zygote.run(Run(split_run, 2))[0].check().out[0]
    zygote.run(Run([*argv, str(tmp_path / "one")]))[0].check()
    found, expected = (weights(tmp_path / name) for name in ("run", "one"))
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)


# -- the loss of parts of the vocabulary -------------------------------------------------------------------------------


def losses_of_parts(at_once: int) -> list[list]:
    """In a worker: losses, and the gradients of hidden and weight, whole."""
    hidden, weight, targets = _head()
    devices = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    parts = distribute_tensor(weight, devices, [Shard(0)], src_data_rank=None).requires_grad_()
    before, chunked_loss.AT_ONCE = chunked_loss.AT_ONCE, at_once
    losses = chunked_loss.chunked_loss(hidden, parts, targets)
    (losses * torch.arange(1.0, 11).view(2, 5)).sum().backward()
    chunked_loss.AT_ONCE = before
    assert isinstance(parts.grad, DTensor)
    return [values.tolist() for values in (losses, hidden.grad, parts.grad.full_tensor())]


def _head() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(11, 4, generator=generator, dtype=torch.float64) * 5
    return hidden, weight, torch.tensor([[0, 10, 5, -100, 3], [7, 4, 6, 8, -100]])


@pytest.mark.parametrize(("ranks", "at_once"), [(2, 1 << 24), (3, 12)], ids=["at once", "chunks"])
def test_the_loss_of_a_split_vocabulary(ranks: int, at_once: int):
    hidden, weight, targets = _head()
    weight.requires_grad_()
    losses = F.cross_entropy((hidden @ weight.T).flatten(0, 1), targets.flatten(), reduction="none").view(2, 5)
    (losses * torch.arange(1.0, 11).view(2, 5)).sum().backward()
    for found in run_ranks(losses_of_parts, ranks, at_once):
        for got, expected in zip(found, [losses.detach(), hidden.grad, weight.grad], strict=True):
            torch.testing.assert_close(torch.tensor(got, dtype=torch.float64), expected, rtol=1e-12, atol=1e-12)


# -- draws of parts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", range(3))
def test_a_part_has_the_bits_of_the_whole(dim: int):
    keys, shape = torch.tensor([3, -(1 << 40)]), (6, 5, 7)
    whole = hashes(keys, shape)
    parts = []
    for rank in range(3):
        of = part_of(shape[dim], rank, 3)
        first = tuple(of.start if i == dim else 0 for i in range(3))
        parts.append(hashes(keys, tuple(len(of) if i == dim else n for i, n in enumerate(shape)), first))
    assert torch.equal(torch.cat(parts, dim + 1), whole)


def test_parts_of_samples_of_another_length(monkeypatch: pytest.MonkeyPatch):
    """Of a dimension that does not divide, and of one that is as long as the sample."""
    monkeypatch.setattr(now, "part", (2, 3))
    assert draw_functions._first(Kind(0, (4, 10), 1), (4, 2)) == (0, 8)
    assert draw_functions._first(Kind(0, (12, 8), 0), (6, 8)) == (12, 0)
    assert draw_functions._first(Kind(0, (12, 8)), (30, 8)) == ()
    with pytest.raises(ConfigError, match="that the first samples did not come to, on one of 3 tensor ranks"):
        draw_functions._first(None, (4,))


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("columns", Word("columns")),
        ("columns by 64", Word("columns", 64)),
        ("rows by 4 gathered", Word("rows", 4, True)),
        ("columns gathered", Word("columns", gathered=True)),
        ("sequence", Word("sequence")),
        ("cut", Word("cut")),
    ],
)
def test_words(text: str, word: Word):
    assert word_of("model.split: x", text) == word


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("column", "got unknown word 'column', expected one of columns, rows, sequence, gather, cut; did you mean col"),
        ("", "got unknown word ''"),
        ("sequence by 4", "got 'sequence by 4', expected sequence alone"),
        ("rows by 0", r"got 'rows by 0', expected rows alone, or with a number that stays together \(by 64\)"),
        (3, "got 3, expected one of columns"),
    ],
)
def test_words_that_are_none(text: str, told: str):
    with pytest.raises(ConfigError, match=f"^model.split: x: {told}"):
        word_of("model.split: x", text)


class Tied(nn.Module):
    """Two layers with one weight, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm, self.drop = nn.Embedding(9, 6), nn.BatchNorm1d(6), nn.Dropout(0.1)
        self.up, self.down, self.head = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 9, bias=False)
        self.head.weight = self.embedding.weight


PAIR = {"up": "columns", "down": "rows"}


@pytest.mark.parametrize(
    ("table", "ranks", "told"),
    [
        ({}, 2, "backend.mesh.tensor: got 2, but no table of what is split for Tied, expected model.split, such as"),
        ({"norm": "gather"}, 2, "got 2, but a table that splits no layer for Tied"),
        ({"uup": "columns"}, 1, "model.split: got 'uup', which matches no layer, expected a pattern"),
        ({"up": "colums"}, 1, "model.split: up: got unknown word 'colums'"),
        (PAIR, 3, r"got 3, but up has 8 columns, expected one of 1, 2, 4, 8; or leave it out of the table"),
        (PAIR | {"up": "columns by 4"}, 4, "got 4, but up has 2 times 4 columns, expected one of 1, 2; or"),
        (PAIR | {"up": "columns by 3"}, 2, "got 2, but up has 8 columns, expected a multiple of the 3 that stay tog"),
        (PAIR | {"drop": "rows"}, 2, "model.split: got rows for drop, which is a Dropout, expected a Linear or an Emb"),
        (PAIR | {"norm": "sequence"}, 2, "got sequence for norm, which is a BatchNorm1d with layers or buffers in it"),
        (PAIR | {"embedding": "rows by 3"}, 2, "got pieces of 3 for embedding, expected a Linear; write rows alone"),
        (
            PAIR | {"embedding": "rows"}, 2,
            "got embedding.weight, which is split in its first dimension, and head.weight, the same weight, which is "
            "not split, expected both alike; name both layers",
        ),
        (PAIR | {"embedding": "rows", "head": "columns gathered"}, 8, "got 8, but embedding and 1 more|but embedding"),
        (PAIR | {"drop": "sequence"}, 2, "data.args.block: got 5 tokens on 2 tensor ranks, which have a part of them"),
    ],
)  # fmt: skip
def test_a_table_that_does_not_fit(table: dict[str, str], ranks: int, told: str):
    with pytest.raises(ConfigError, match=told):
        split.check(Tied(), ModelConfig(split=table), ranks, 5)


def test_tables_that_fit():
    split.check(Tied(), ModelConfig(split=PAIR | {"embedding": "rows", "head": "columns gathered"}), 2, 5)
    split.check(MLP((4,), 3, (8, 6, 4)), ModelConfig(), 2, None)
    split.check(Decoder(65, 8, width=16, heads=4, kv_heads=2), ModelConfig(), 2, 8)


def test_heads_and_blocks_of_a_decoder():
    with pytest.raises(ConfigError) as caught:
        split.check(Decoder(65, 9, layers=2, width=16, heads=4, kv_heads=2), ModelConfig(), 4, 9)
    assert caught.value.lines == (
        "backend.mesh.tensor: got 4, but model.layers.0.self_attn.k_proj and 3 more has 2 times 4 columns, expected "
        "one of 1, 2; or leave it out of the table",
        "data.args.block: got 9 tokens on 4 tensor ranks, which have a part of them each (Decoder.split), expected a "
        "multiple, such as 8",
    )


def test_it_is_said_before_the_ranks_join(zygote: Zygote, tmp_path: Path):
    argv = [
        "--backend.name",
        "fsdp2",
        "--backend.mesh.tensor",
        "2",
        "--model.hidden",
        "[9]",
        "--run.dir",
        str(tmp_path),
    ]
    (ended,) = zygote.run(Run(argv, 2))
    assert set(ended.codes) == {2} and "got 2, but layers.1 has 9 columns, expected one of 1, 3, 9" in ended.err[0]


def test_draws_of_the_models_own_are_refused(zygote: Zygote, tmp_path: Path):
    argv = ["--backend.name", "fsdp2", "--backend.mesh.tensor", "2", "--model.dropout", "0.5", "--train.draws", "torch"]
    (ended,) = zygote.run(Run([*argv, "--run.dir", str(tmp_path)], 2))
    assert set(ended.codes) == {2} and "backend.mesh.tensor: got 2, but the model draws by" in ended.err[0]


def test_a_table_that_computes_something_else_is_refused(zygote: Zygote, tmp_path: Path):
    """Rows that get all numbers on each rank."""
    table = '{"layers.3": rows}'
    argv = ["--backend.name", "fsdp2", "--backend.mesh.tensor", "2", "--model.split", table, "--run.dir", str(tmp_path)]
    (ended,) = zygote.run(Run(argv, 2))
    told = [
        err for code, err in zip(ended.codes, ended.err, strict=True) if code == 2
    ]  # the first; others may be cut off
    assert told and told[0].startswith("dist_train: model.split: got a model that fails on the first samples")
