"""Runs of a decoder on real text, with all that such runs have: apart from the tests, so that both can import it."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import token_cells

from dist_train.config.tree import Config, DataConfig, ModelConfig, OptimConfig, TaskConfig, TrainConfig
from dist_train.data import prose, text
from dist_train.data.sets import Data
from dist_train.data.tokenizer_base import Tokenizer
from dist_train.data.tokens import Tokens
from dist_train.data.windows import packed
from dist_train.errors import ConfigError
from dist_train.loop.evaluate import Sums
from dist_train.run import assemble
from dist_train.tools import trajectory
from dist_train.tools.agreement import Trajectory

import faults
import parity_cells

# Shares are 7 and 6 windows on 2 ranks, 5, 4 and 4 on 3, one of 4 and three of 3 on 4: so ranks may have different
# numbers of micro-batches as well.
BLOCK, BATCH = 32, 13
MODEL = {"layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "mlp_width": 48}
# The gradient of a token that is in no batch is 0 but for rounding, and so is its step to this eps.
OPTIM = OptimConfig(
    name="Muon", lr=0.002, weight_decay=0.1, no_decay=True, args={"adamw": {"lr": 1e-3, "eps": 1e-3}},
    schedule="linear", warmup_steps=5, lr_final=1e-4, ema=0.9, ema_start=3,
)  # fmt: skip
MIXED = [{"files": "docs0.jsonl", "weight": 2}, {"files": "docs1.jsonl", "weight": 1}]
run_cells = token_cells.run_cells


def write_corpus(root: Path) -> None:
    """Paragraphs of Python's documentation as documents: `docs0.jsonl` and `docs1.jsonl`; and `few.jsonl` of 7."""
    for i, many in enumerate((36, 20)):
        parts = [part for one in prose.topics()[3 * i : 3 * i + 3] for part in one.split("\n\n") if part.strip()]
        _write(root / f"docs{i}.jsonl", [part[:150] for part in parts[:many]])
    _write(root / "few.jsonl", [prose.topics()[0][i * 100 : i * 100 + 2 + 4 * i] for i in range(7)])


def _write(file: Path, documents: list[str]) -> None:
    file.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))


def config(
    root: Path, backend: str = "single", ranks: int = 1, accumulation: int = 1, steps: int = 24,
    precision: str = "float32", **args,
) -> Config:  # fmt: skip
    """Packed documents, dropout, Muon, averaged weights, gradients that are clipped.

    Args:
        root: has the corpus.
        backend: DeepSpeed's with its stage.
        ranks: with which the largest share of a step is `accumulation` micro-batches, or one more.
        accumulation: see there.
        steps: of the run.
        precision: of the run.
        **args: of the data set.
    """
    share = -(-BATCH // ranks)
    train = TrainConfig(
        epochs=steps, max_steps=steps, global_batch_size=BATCH, micro_batch_size=-(-share // accumulation),
        grad_clip=0.3, precision=precision, device="cpu", threads=1, eval_every_epochs=None,
    )  # fmt: skip
    where = {} if "sources" in args else {"files": "docs0.jsonl"}
    return dataclasses.replace(
        parity_cells.config(backend),
        data=DataConfig(name="text", root=str(root), args={"block": BLOCK, "packing": "packed"} | where | args),
        model=ModelConfig(name="decoder", args=MODEL, dropout=0.2),
        task=TaskConfig(name="language_modelling"),
        optim=OPTIM,
        train=train,
    )


def evaluate(cells: list[Config], fault: str | None = None) -> list[Mapping[str, float]]:
    """In a worker: each config's evaluation before its first step; with a function of faults.py planted."""
    world, found = parity_cells.this_world(), []
    with mock.patch.object(Sums, "over_ranks", Sums.over_ranks):
        if fault is not None:
            getattr(faults, fault)()
        for cell in cells:
            parts = assemble.build(cell, world.device)
            found.append(parts.evaluation(cell, world).run(parts.model))
    return found


def run_packed_by_rank(cell: Config) -> list[Trajectory]:
    """In a worker: a run in which each rank packs documents of its own into windows. It is refused, and goes on where
    nobody looks."""
    world = parity_cells.this_world()

    def own(tokens: Tokens, block: int, by: Tokenizer | None = None) -> Data:
        ends = np.append(tokens.starts[1:], len(tokens))
        mine = [np.arange(*of) for of in list(zip(tokens.starts, ends, strict=True))[world.rank :: world.size]]
        row = np.concatenate([tokens.at(places) for places in mine])
        starts = np.cumsum([0, *map(len, mine[:-1])])
        whole, part = packed(tokens, block, by), packed(Tokens([row], starts, ""), block, by)
        gather = lambda numbers: part.gather(numbers % len(part))  # noqa: E731
        return dataclasses.replace(whole, gather=gather)

    with mock.patch.object(text, "packed", own):
        with pytest.raises(ConfigError, match="rank 1 has another training sample 0 than rank 0"):
            run_cells([cell])
        with mock.patch.object(trajectory, "agree"):
            return run_cells([cell])
