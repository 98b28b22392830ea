"""Writing with a language model: token after token, each computed once.

Rows of different lengths are written together as in Meta's Llama: all begin at the first position, and where a longer
one still has its prompt, the others go on. So nothing is padded, and no mask is needed.
"""

import hashlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dist_train.errors import ConfigError
from dist_train.models.cache import Cache
from dist_train.models.decoder import Decoder

# What transformers' models call what they have read, in what they take and give.
PASTS = ("cache", "past_key_values")
# Gives the logits of the tokens that it gets next, [rows, tokens, vocab_size], for each row.
Reader = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Args:
        temperature: that logits are divided by; 0 always takes the most probable.
        top_k: of so many most probable ones (None: all).
        top_p: of the fewest that are as probable as this together (1: all).
        seed: of what is drawn.

    Raises:
        ConfigError: a number that is out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        wrong = {
            "temperature": (self.temperature, 0 <= self.temperature < float("inf"), "a number from 0, such as 0.8"),
            "top_k": (self.top_k, self.top_k is None or self.top_k > 0, "a number of tokens from 1, such as 50"),
            "top_p": (self.top_p, 0 < self.top_p <= 1, "a probability above 0 and at most 1, such as 0.9"),
        }
        lines = [f"{name}: got {got}, expected {what}" for name, (got, right, what) in wrong.items() if not right]
        if lines:
            raise ConfigError(*lines)

    def chosen(self, logits: torch.Tensor, draws: Sequence[float]) -> list[int]:
        """The next token of each row.

        Args:
            logits: of the next token, [rows, vocab_size].
            draws: a number in [0, 1) for each row.
        """
        if self.temperature == 0:
            return logits.argmax(-1).tolist()
        found, order = (logits.double().cpu() / self.temperature).sort(dim=-1, descending=True, stable=True)
        found = found[:, : self.top_k].softmax(-1)
        before = found.cumsum(-1) - found
        found = found.where((before < self.top_p) | (before == 0), 0.0)
        sums = found.cumsum(-1)
        places = torch.searchsorted(sums, torch.tensor(draws, dtype=torch.float64)[:, None] * sums[:, -1:], right=True)
        last = (found > 0).sum(-1, keepdim=True) - 1  # where a sum is rounded up
        return order.gather(1, places.minimum(last))[:, 0].tolist()

    def draw(self, key: bytes, position: int) -> float:
        """A number in [0, 1), a function of the seed, the row's key and the position in the row alone."""
        told = hashlib.blake2b(f"{self.seed} {position} ".encode() + key, digest_size=8).digest()
        return (int.from_bytes(told, "big") >> 11) / 2**53


def written(
    reader: Callable[[], Reader], prompts: Sequence[Sequence[int]], count: int, context: int, sampling: Sampling,
    end: int | None = None,
) -> Iterator[list[int | None]]:  # fmt: skip
    """What a model writes after each prompt.

    A row has the same text alone and beside others, as far as the model's arithmetic does not depend on how many rows
    it is given. Of equal prompts each is continued in its own way. Once rows have `context` tokens, the model reads the
    last half of them anew and goes on from there: it sees no position that it was not trained on, and a token costs as
    much as before.

    Args:
        reader: begins to read; see `reader_of`.
        prompts: token numbers, one at least and at most `context` in each.
        count: tokens to write after each.
        context: tokens that the model sees at once, at most.
        sampling: how a token is chosen.
        end: the token after which a row is not continued; None is none.

    Yields:
        The next token of each row, None of one that has its prompt still or has ended.
    """
    rows = [list(prompt) for prompt in prompts]
    assert rows and all(0 < len(row) <= context for row in rows)
    keys = [repr((row, rows[:i].count(row))).encode() for i, row in enumerate(rows)]
    left = [count] * len(rows)
    read, unread = reader(), min(map(len, rows))  # how many tokens of each row are to be read next
    length, held = unread, 0  # of each row, as far as it was read; and what the model has of it
    while any(left):
        if held + unread > context:
            read, held, unread = reader(), 0, max(1, context // 2)
        logits = read(torch.tensor([row[length - unread : length] for row in rows]))[:, -1]
        chosen = sampling.chosen(logits, [sampling.draw(key, length) for key in keys])
        found: list[int | None] = []
        for i, (row, token) in enumerate(zip(rows, chosen, strict=True)):
            if length < len(row):
                found.append(None)
                continue
            row.append(token)
            found.append(token if left[i] else None)
            left[i] = 0 if token == end else max(0, left[i] - 1)
        held, unread, length = held + unread, 1, length + 1
        yield found


def reader_of(
    model: nn.Module, called: Callable[..., Any], device: torch.device, logits_of: Callable[[Any], torch.Tensor]
) -> Callable[[], Reader]:
    """A function that begins to read, with what was read before forgotten.

    Args:
        model: says what its forward takes: `cache` as `decoder` and transformers' models do, or `past_key_values`.
            One that takes neither reads all tokens again for each new one.
        called: the same as it is to be called, such as wrapped by a backend.
        device: of the model.
        logits_of: of what it gives.
    """
    takes = inspect.signature(model.forward).parameters
    passes_on = any(p.kind is p.VAR_KEYWORD for p in takes.values())
    decoder = decoder_in(model)
    if decoder is not None and (decoder is model or passes_on):
        return lambda: _with_cache(called, device, logits_of, Cache(len(decoder.model.layers)))
    if any(name in takes for name in PASTS) or passes_on:
        past = next((name for name in PASTS if name in takes), PASTS[0])
        return lambda: _with_past(called, device, logits_of, past)
    return lambda: _without(called, device, logits_of)


def decoder_in(model: nn.Module) -> Decoder | None:
    """The decoder that a model is, or wraps, as PEFT does."""
    return next((module for module in model.modules() if isinstance(module, Decoder)), None)


def _with_cache(
    called: Callable[..., Any], device: torch.device, logits_of: Callable[[Any], torch.Tensor], cache: Cache
) -> Reader:  # fmt: skip
    return lambda tokens: logits_of(called(input_ids=tokens.to(device), cache=cache))


def _with_past(
    called: Callable[..., Any], device: torch.device, logits_of: Callable[[Any], torch.Tensor], name: str
) -> Reader:  # fmt: skip
    past: Any = None

    def read(tokens: torch.Tensor) -> torch.Tensor:
        nonlocal past
        outputs = called(input_ids=tokens.to(device), use_cache=True, **{name: past})
        past = outputs[name]
        return logits_of(outputs)

    return read


def _without(called: Callable[..., Any], device: torch.device, logits_of: Callable[[Any], torch.Tensor]) -> Reader:
    so_far: list[torch.Tensor] = []

    def read(tokens: torch.Tensor) -> torch.Tensor:
        so_far.append(tokens.to(device))
        return logits_of(called(input_ids=torch.cat(so_far, 1)))

    return read
