"""Language modelling: the next token, at every place."""

import inspect
import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dist_train.data.batch import Batch
from dist_train.data.tokenizer_base import Tokenizer
from dist_train.errors import ConfigError
from dist_train.models.chunked_loss import IGNORED
from dist_train.tasks.base import Task, tensor_of

NEEDED = ("input_ids", "targets")


class LanguageModelling(Task):
    """The next token, at every place of a sample. The loss is the cross-entropy, a mean over the tokens that count.

    A batch is a dict of `input_ids` and `targets`, int64 [batch, block], where a target is the token after, or -100
    where none counts; and, of packed documents, `position_ids`. The model takes all but the targets by name and gives
    logits, [batch, block, vocab] or such as `.logits`; or, where its forward has an argument `targets`, the loss of
    each, [batch, block], so that the logits need never be whole.

    Args:
        vocab_size: token numbers are below it.
        tokenizer: says how many bytes of text a token is; without one there is no bits_per_byte.
    """

    unit = "tokens"
    lower_is_better = ("loss", "perplexity", "bits_per_byte")

    def __init__(self, vocab_size: int | None = None, tokenizer: Tokenizer | None = None):
        if vocab_size is None:
            raise ConfigError(
                "task.name: got language_modelling of a data set without a vocab_size, expected one of tokens; for "
                'example --data.name text, or give it as Data(..., facts={"vocab_size": 50257})'
            )
        self.vocab_size, self.tokenizer = vocab_size, tokenizer
        self.more: dict[str, Any] = {}  # arguments of the model
        self.gives_loss = False

    def begin(self, model: nn.Module) -> None:
        """What its forward takes."""
        takes = inspect.signature(model.forward).parameters
        if "input_ids" not in takes and not any(p.kind is p.VAR_KEYWORD for p in takes.values()):
            raise ConfigError(
                f"model.name: got {type(model).__name__}, whose forward takes {', '.join(takes) or 'nothing'}, "
                f"expected a language model, which takes input_ids; for example --model.name decoder"
            )
        self.gives_loss = "targets" in takes
        # With a cache, which training has no use for, transformers look from a packed document into those before it.
        self.more = {"use_cache": False} if "use_cache" in takes else {}

    def units(self, batch: Batch) -> torch.Tensor:
        """Tokens that count."""
        return (_tree_of(batch)["targets"] != IGNORED).sum()

    def sums(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """`loss`, and in evaluation the `bytes` of text that the targets are."""
        tree = _tree_of(batch)
        targets = tree["targets"]
        inputs = {name: value for name, value in tree.items() if name != "targets"} | self.more
        if self.gives_loss:
            loss = model(**inputs, targets=targets).sum()
        else:
            logits = tensor_of(model(**inputs)).flatten(0, 1)
            loss = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="sum")
        if model.training or self.tokenizer is None:
            return {"loss": loss}
        sizes = self._token_bytes.to(targets.device)[targets.clamp(min=0)]
        return {"loss": loss, "bytes": sizes.where(targets != IGNORED, 0).sum()}

    def metrics(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Loss a token in nats, perplexity, and bits a byte of text."""
        loss = sums["loss"] / sums["units"]
        found = super().metrics(sums) | {"perplexity": float(loss.exp())}
        if "bytes" in sums:
            found["bits_per_byte"] = float(sums["loss"] / math.log(2) / sums["bytes"])
        return found

    def check(self, batch: Batch, outputs: Any) -> None:
        """Where a loss would raise from deep inside, or be of something else."""
        found, shape = tensor_of(outputs), tuple(batch["targets"].shape)
        got = f"model: got outputs {found.dtype} {list(found.shape)}"
        if self.gives_loss:
            if tuple(found.shape) != shape or not found.is_floating_point():
                raise ConfigError(
                    f"{got} for targets {list(shape)}, expected the loss of each, a float tensor of that shape; leave "
                    f"the argument targets out of its forward, and return logits"
                )
        elif found.shape[:-1] != shape or found.shape[-1] < self.vocab_size or not found.is_floating_point():
            raise ConfigError(
                f"{got}, expected logits: a float tensor {[*shape, self.vocab_size]}, a number for each token of the "
                f"vocabulary at each place; build the model with vocab_size {self.vocab_size}"
            )

    @cached_property
    def _token_bytes(self) -> torch.Tensor:
        assert self.tokenizer is not None
        return torch.from_numpy(self.tokenizer.token_bytes())


def _tree_of(batch: Batch) -> Mapping[str, torch.Tensor]:
    tree = batch.tree
    if isinstance(tree, Mapping) and all(name in tree for name in NEEDED):
        return tree
    got = f"samples with {', '.join(map(str, tree))}" if isinstance(tree, Mapping) else type(tree).__name__
    raise ConfigError(
        f"data.name: got {got}, expected a dict with {' and '.join(NEEDED)}, int64 [batch, block], for task.name "
        f"language_modelling; for example --data.name text"
    )
