"""Text of a language model: prompts in, and what it writes after them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dist_train.data.chat import Chat
from dist_train.data.sets import Data
from dist_train.data.tokenizer_base import Tokenizer
from dist_train.data.tokenizers import Characters
from dist_train.errors import ConfigError
from dist_train.models.generation import Sampling, decoder_in, reader_of, written
from dist_train.tasks.base import tensor_of

SHOWN = 40  # characters of a prompt that an error has
UNKNOWN = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Writer:
    """A model and its tokenizer.

    Args:
        model: as it was built.
        called: the same as it is to be called, such as wrapped by a backend. In eval mode.
        tokenizer: of its tokens.
        context: tokens that it sees at once, at most.
        device: of the model.
        chat: makes a chat of a prompt, which is then a question; None takes it as it is.
    """

    model: nn.Module
    called: Callable[..., Any]
    tokenizer: Tokenizer
    context: int
    device: torch.device
    chat: Chat | None = None

    def tokens_of(self, prompt: str, option: str) -> list[int]:
        """Token numbers of a prompt; of an empty one, the token that ends a document, after which another begins.
        Raises ConfigError, which names the option that the prompt is of."""
        shown = f"{option}: got {prompt[:SHOWN]!r}{'...' if len(prompt) > SHOWN else ''}"
        if isinstance(self.tokenizer, Characters):
            strange = next((c for c in prompt if c not in self.tokenizer.vocabulary), None)
            if strange is not None:
                raise ConfigError(
                    f"{shown}, where the model knows no {strange!r}, expected text of the {self.tokenizer.vocab_size} "
                    f"characters that it was trained on; take it out"
                )
        found = (self.tokenizer.encode(prompt) if self.chat is None else self.chat.asked(prompt)).tolist()
        if not found and self.tokenizer.end is not None:
            found = [self.tokenizer.end]
        if not found:
            raise ConfigError(
                f"{shown}, expected some text to go on from, as no token of {self.tokenizer.name} begins a document"
            )
        if len(found) > self.context:
            raise ConfigError(
                f"{shown} of {len(found):,} tokens, expected at most {self.context:,}, which the model sees at once; "
                f"leave out its beginning"
            )
        return found

    @torch.no_grad()
    def write(
        self, prompts: Sequence[Sequence[int]], count: int, sampling: Sampling, stops: bool = True
    ) -> Iterator[list[str]]:  # fmt: skip
        """What the model writes after each prompt, piece by piece: texts to be put together, the last at the end.

        Args:
            prompts: token numbers of each.
            count: tokens to write, at most.
            sampling: how they are chosen.
            stops: whether writing stops once each text has ended. Else as many tokens are computed in any case, as
                ranks that compute together need it.
        """
        end, size = self.tokenizer.end, self.tokenizer.vocab_size
        reader = reader_of(self.model, self.called, self.device, lambda outputs: tensor_of(outputs)[..., :size])
        texts, ended = [Stream(self.tokenizer) for _ in prompts], [False] * len(prompts)
        for step in written(reader, prompts, count, self.context, sampling, end if stops else None):
            ended = [was or token == end for was, token in zip(ended, step, strict=True)]
            yield [
                "" if token is None or over else text.add(token)
                for text, token, over in zip(texts, step, ended, strict=True)
            ]
        yield [text.rest() for text in texts]


class Stream:
    """Text of tokens that come one by one. Bytes of a character that is not yet whole are held back."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.before: list[int] = []  # decoded with those that follow, as some tokenizers begin a text otherwise
        self.held: list[int] = []

    def add(self, token: int) -> str:
        """What can be said once there is this token."""
        self.held.append(token)
        text = self._text()
        return "" if text.endswith(UNKNOWN) else self._said(text)

    def rest(self) -> str:
        """What was held back."""
        return self._said(self._text()) if self.held else ""

    def _text(self) -> str:
        before = self.tokenizer.decode(self.before)
        return self.tokenizer.decode([*self.before, *self.held])[len(before) :]

    def _said(self, text: str) -> str:
        self.before, self.held = self.held, []
        return text


def uncompiled(compiled: bool) -> AbstractContextManager[Any]:
    """Has compiled models compute as they are written: a compiler would make code for each length of text."""
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


def context_of(model: nn.Module, data: Data) -> int:
    """Tokens that a model sees at once: those of a sample, or as many as the model says itself."""
    decoder = decoder_in(model)
    return int(data.known()["block"]) if decoder is None else decoder.block
