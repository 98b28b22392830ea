"""Runs of language models, in the workers: apart from the tests, so that both can import it."""

import dataclasses

from dist_train.backends import rules
from dist_train.config.tree import Config, DataConfig, ModelConfig, OptimConfig, TaskConfig
from dist_train.models import chunked_loss
from dist_train.tasks.language_modelling import LanguageModelling
from dist_train.tools.agreement import Trajectory

import parity_cells

STEPS = 8
ARGS = {"layers": 2, "width": 48, "heads": 4, "kv_heads": 2, "mlp_width": 64}


def config(
    backend: str = "single", micro_batch_size: int | None = None, tied: bool = True, task: str = "language_modelling",
    **train,
) -> Config:  # fmt: skip
    """Four steps an epoch, the last ragged, with packed documents, dropout, and gradients that are clipped."""
    cell = parity_cells.config(backend, "AdamW", micro_batch_size)
    return dataclasses.replace(
        cell,
        data=DataConfig(name="token_data:packed", args={"n": 35}),
        model=ModelConfig(name="decoder", args=ARGS | {"tied": tied}, dropout=0.2),
        task=TaskConfig(name=task),
        # Gradients of tokens that are in no batch are 0 but for rounding, and so are their steps to this eps.
        optim=OptimConfig(name="AdamW", lr=1e-3, args={"eps": 1e-3}),
        train=dataclasses.replace(cell.train, max_steps=STEPS, global_batch_size=10, grad_clip=0.2, **train),
    )


def run_cells(cells: list[Config]) -> list[Trajectory]:
    """In a worker: each config's run, with logits of a few rows at a time; ZeRO 3 parts embedding and output."""
    before = chunked_loss.AT_ONCE, rules.SMALL
    chunked_loss.AT_ONCE, rules.SMALL = 257 * 7, 1000
    try:
        return parity_cells.run_cells(cells)
    finally:
        chunked_loss.AT_ONCE, rules.SMALL = before


class CountedByRank(LanguageModelling):
    """A fault: each rank's mean over its own tokens, and the mean of these by samples."""

    units_per_sample = 1

    def sums(self, model, batch):
        found = super().sums(model, batch)
        return {"loss": found["loss"] / self.units(batch).clamp(min=1) * len(batch)} if model.training else found
