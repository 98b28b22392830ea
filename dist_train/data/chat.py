"""Chats as tokens, by the chat template of a tokenizer, with a flag on all that is not an answer: a model learns the
answers alone."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch

from dist_train.data.sets import Gathered
from dist_train.data.tokenizer_base import Tokenizer
from dist_train.data.tokenizer_file import FromFile
from dist_train.errors import ConfigError
from dist_train.models.chunked_loss import IGNORED

NAME = "chat"
FLAG = 1 << 31  # of the number of a token that is no answer
ANSWERS = "assistant"  # the role that they are of
ASKS = "user"


class Chat(Tokenizer):
    """A tokenizer of chats: of the JSON of a list of messages, such as [{"role": "user", "content": "..."}].

    A template writes each message after those before it. What it adds for an answer, after what it writes to ask for
    one, is that answer, with the token that ends it. All other tokens have FLAG in their numbers.

    Args:
        inner: the tokenizer, with a chat_template in the tokenizer_config.json or a chat_template.jinja beside its
            file.

    Raises:
        ConfigError: it has no template.
    """

    name, end, flags = NAME, None, True  # the template ends documents

    def __init__(self, inner: FromFile):
        self.inner, self.vocab_size = inner, inner.vocab_size
        self.template = inner.config.get("chat_template")
        if not isinstance(self.template, str):
            raise ConfigError(
                f"data.args.format: got chat with {inner.name}, which has no chat template, expected a chat_template "
                f"in the tokenizer_config.json, or a chat_template.jinja, beside it"
            )

    def encode(self, text: str) -> np.ndarray:
        """See Tokenizer."""
        messages = _messages(json.loads(text))
        whole, spans, so_far = self._rendered(messages, ask=False), [], ""
        for i, message in enumerate(messages):
            if message["role"] != ANSWERS:
                continue
            before = self._rendered(messages[:i], ask=True) if i else ""
            so_far = self._rendered(messages[: i + 1], ask=False)
            if not so_far.startswith(before) or not whole.startswith(so_far):
                raise ConfigError(
                    f"data.args.format: got a chat template that writes message {i + 1} of {len(messages)} otherwise "
                    f"where others follow, expected one that adds to what is there; take such parts, as of thoughts "
                    f"that are left out later, from the template"
                )
            spans.append((len(before), len(so_far)))
        if not spans:
            raise ConfigError(
                f"data.args.format: got a chat without an answer, expected a message of the role {ANSWERS}; leave it "
                f"out of the file"
            )
        numbers, begins = self.inner.with_places(whole)
        first, last = np.array(spans).T
        # the last span that begins before the token, or with it
        span = np.searchsorted(first, begins, side="right") - 1
        answers = (span >= 0) & (begins < last[span])
        return np.where(answers, numbers, numbers | FLAG)

    def asked(self, question: str) -> np.ndarray:
        """Token numbers of a chat that is to be answered: a message of the user, and what the template writes to ask
        for an answer. int64 [tokens]. Raises ConfigError where it refuses such a chat."""
        return self.inner.encode(self._rendered([{"role": ASKS, "content": question}], ask=True))

    def _rendered(self, messages: Sequence[dict[str, Any]], ask: bool) -> str:
        import jinja2

        try:
            return self._of_library.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=ask)
        except (jinja2.TemplateError, ValueError, TypeError) as error:
            raise ConfigError(
                f"data.args.format: got a chat of {', '.join(message['role'] for message in messages)}, which the chat "
                f"template refuses: {error}"
            ) from None

    @cached_property
    def _of_library(self) -> Any:
        try:
            from transformers import PreTrainedTokenizerFast
        except ImportError as error:
            raise ConfigError(
                "data.args.format: got chat without the library transformers, which renders chat templates, expected "
                "it installed; pip install 'dist-train[text]'"
            ) from error
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        special = {name: _content(self.inner.config.get(name)) for name in names}
        known = {name: token for name, token in special.items() if token is not None}
        return PreTrainedTokenizerFast(tokenizer_object=self.inner.of_library, chat_template=self.template, **known)

    def decode(self, tokens: Sequence[int]) -> str:
        """See Tokenizer."""
        return self.inner.decode([int(token) & ~FLAG for token in tokens])

    def token_bytes(self) -> np.ndarray:
        """See Tokenizer."""
        return self.inner.token_bytes()

    def identity(self) -> str:
        """See Tokenizer."""
        told = f"{self.template}\0{self.inner.identity()}"
        return f"{NAME} {hashlib.sha256(told.encode()).hexdigest()}"

    def definition(self) -> tuple[str, dict[str, Any]]:
        """See Tokenizer."""
        return self.inner.definition()


def _content(token: Any) -> str | None:
    return token["content"] if isinstance(token, dict) else token


def _messages(found: Any) -> list[dict[str, Any]]:
    """The messages of a chat. Raises ConfigError where they are none."""
    fits = isinstance(found, list) and all(isinstance(one, dict) and isinstance(one.get("role"), str) for one in found)
    if not fits:
        raise ConfigError(
            'data.args.format: got a chat that is no list of messages, expected [{"role": "user", "content": '
            '"..."}, ...]'
        )
    return found


def answers_only(split: Gathered) -> Gathered:
    """The windows of tokens of chats, with the answers as the only targets that count."""

    def gather(numbers: np.ndarray) -> Any:
        tree = dict(split.gather(numbers))
        tree["targets"] = torch.where(tree["targets"] >= FLAG, IGNORED, tree["targets"])
        tree["input_ids"] = tree["input_ids"] & (FLAG - 1)
        return tree

    about = f"{split.about}, of which those of answers count"
    return dataclasses.replace(split, gather=gather, identity=f"{split.identity} answers", about=about)
