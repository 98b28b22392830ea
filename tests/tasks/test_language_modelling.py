"""The task of language modelling: the same at every world size, exact in evaluation, for models of anybody."""

import dataclasses
import math

import numpy as np
import pytest
import token_data
import torch
import torch.nn.functional as F
from token_cells import config, run_cells

from dist_train.config.tree import ModelConfig
from dist_train.data.batch import Batch
from dist_train.data.tokenizers import Bytes
from dist_train.errors import ConfigError
from dist_train.run import assemble
from dist_train.tasks.language_modelling import LanguageModelling
from dist_train.tools.agreement import difference

from parity_cells import ALONE, TOLERANCE, run_single
from workers import run_ranks

BACKENDS = {1: ["single"], 2: ["ddp", "fsdp2", "deepspeed:3"], 3: ["ddp"]}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied, in micro-batches"])
def test_parity(tied: bool):
    """Dropout, packed and padded documents, clipping, the loss in chunks."""
    wanted = run_single(config(tied=tied))
    for ranks, names in BACKENDS.items():
        for name in names:
            cell = config(name, None if tied else -(-10 // ranks // 2), tied)
            found = run_ranks(run_cells, ranks, [cell])[0][0] if ranks > 1 else run_cells([cell])[0]
            assert difference(found, wanted).worst < TOLERANCE["float32"], f"{ranks} ranks, {name}"
            for metric, value in wanted.evaluation.items():
                assert found.evaluation[metric] == pytest.approx(value, rel=1e-5)


def test_tokens_counted_by_rank_are_seen():
    cell = config("ddp", task="token_cells:CountedByRank")
    wanted = run_single(dataclasses.replace(cell, backend=config().backend))
    assert difference(run_ranks(run_cells, 2, [cell])[0][0], wanted).loss > 10 * TOLERANCE["float32"]


def test_an_evaluation_is_that_of_torch():
    cell = config()
    parts = assemble.build(cell, ALONE.device)
    found = parts.evaluation(cell, ALONE).run(parts.model)
    batch = parts.data.test.gather(np.arange(len(parts.data.test)))
    targets = batch["targets"].flatten()
    with torch.no_grad():
        logits = parts.model.eval()(batch["input_ids"], batch["position_ids"]).flatten(0, 1)
        nats = float(F.cross_entropy(logits.double(), targets, reduction="sum"))
    known = targets[targets != token_data.IGNORED]
    loss, count = nats / len(known), sum(int(Bytes().token_bytes()[token]) for token in known)
    assert count == len(known)  # bytes
    expected = {"loss": loss, "perplexity": math.exp(loss), "bits_per_byte": nats / math.log(2) / count}
    assert {name.removeprefix("eval/"): value for name, value in found.items()} == pytest.approx(expected, rel=1e-6)


THEIRS = {
    "transformers:LlamaForCausalLM": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
    "transformers:GPT2LMHeadModel": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 12, "bos_token_id": 0},
}  # fmt: skip


@pytest.mark.parametrize("name", THEIRS)
def test_models_of_transformers(name: str):
    pytest.importorskip("transformers")
    cell = dataclasses.replace(config(), model=ModelConfig(name=name, args={"config": THEIRS[name]}))
    parts = assemble.build(cell, ALONE.device)
    batch = parts.feed.of(np.arange(8))
    with torch.no_grad():
        packed = parts.task.sums(parts.model.eval(), batch)["loss"]
        alone = torch.zeros(())
        for row, targets, places in zip(*(batch[key] for key in token_data.NAMES), strict=True):
            ends = [*(places == 0).nonzero().flatten().tolist(), len(row)]
            for i, j in zip(ends, ends[1:], strict=False):
                if (targets[i:j] >= 0).any():
                    logits = parts.model(input_ids=row[None, i:j]).logits[0]
                    alone += F.cross_entropy(logits, targets[i:j], reduction="sum")
    assert torch.allclose(packed, alone, rtol=1e-5)


def test_what_does_not_fit_is_said():
    class Logits(torch.nn.Linear):
        def forward(self, input_ids):
            return super().forward(F.one_hot(input_ids, 257).float())

    class Losses(torch.nn.Linear):
        def forward(self, input_ids, targets):
            return super().forward(F.one_hot(input_ids, 257).float()).mean()

    with pytest.raises(ConfigError, match="got language_modelling of a data set without a vocab_size"):
        LanguageModelling()
    task = LanguageModelling(vocab_size=257)
    with pytest.raises(ConfigError, match="got Linear, whose forward takes input, expected a language model"):
        task.begin(torch.nn.Linear(2, 2))
    feed = assemble.build(config(), ALONE.device).feed
    batch = feed.of(np.arange(2))
    for model, line in (
        (Logits(257, 256), r"got outputs torch.float32 \[2, 12, 256\], expected logits: .* \[2, 12, 257\]"),
        (Losses(257, 257), r"got outputs torch.float32 \[\] for targets \[2, 12\], expected the loss of each"),
    ):
        task.begin(model)
        inputs = {"input_ids": batch["input_ids"]} | ({"targets": batch["targets"]} if task.gives_loss else {})
        with pytest.raises(ConfigError, match=line):
            task.check(batch, model(**inputs))
    with pytest.raises(ConfigError, match="got samples with ids, expected a dict with input_ids and targets"):
        task.units(Batch({"ids": torch.zeros(2, 3)}, torch.arange(2), 2))
