"""Tokenizers in files: tokenizer.json, as Hugging Face's library tokenizers reads and writes it."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dist_train.data.tokenizer_base import CONFIG, END, FILE, Tokenizer, byte_characters
from dist_train.errors import ConfigError

# Of the tokenizers that people use, what ends a document.
ENDS = (END, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]")
TEMPLATE = "chat_template.jinja"
PATH = "data.args.tokenizer"


def library() -> Any:
    """tokenizers. Raises ConfigError where it is not installed."""
    try:
        import tokenizers
    except ImportError as error:
        raise ConfigError(
            f"{PATH}: got the path of a {FILE} without the library tokenizers, expected it installed; pip install "
            f"'dist-train[text]'"
        ) from error
    return tokenizers


class FromFile(Tokenizer):
    """A tokenizer of a file.

    Args:
        path: tokenizer.json, or the folder that has it. A tokenizer_config.json beside it may name its eos_token.
        end_token: that ends a document (null: that eos_token, else one of ENDS that it has, else none).

    Raises:
        ConfigError: it cannot be read, or has no such token.
    """

    def __init__(self, path: Path, end_token: str | None = None):
        path = path / FILE if path.is_dir() else path
        try:
            self.text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{PATH}: got {path}, which cannot be read: {error}; expected bytes, characters, or a {FILE} (paths "
                f"start from data.root)"
            ) from None
        try:
            self._inner = library().Tokenizer.from_str(self.text)
        except ConfigError:
            raise
        except Exception as error:  # of the library, which has no other
            raise ConfigError(
                f"{PATH}: got {path}, which the library tokenizers does not read ({error}), expected a whole {FILE}; "
                f"for example one of python -m dist_train tokenize --vocab 4096 --output {FILE}"
            ) from None
        self._inner.no_truncation()
        self._inner.no_padding()
        self.name = path.name
        self.vocabulary = self._inner.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self.vocabulary.values(), default=-1) + 1
        if not self.vocab_size:
            raise ConfigError(f"{PATH}: got {path} with an empty vocabulary, expected tokens")
        self.config = _config(path.with_name(CONFIG)) | _template(path.with_name(TEMPLATE))
        named = self.config.get("eos_token")
        of_config = named["content"] if isinstance(named, dict) else named
        wanted = end_token or (of_config if of_config in self.vocabulary else None)
        self.end_token = wanted or next((end for end in ENDS if end in self.vocabulary), None)
        if self.end_token is not None and self.end_token not in self.vocabulary:
            raise ConfigError(
                f"data.args.end_token: got {self.end_token!r}, which {path} does not have, expected one of its "
                f"{self.vocab_size:,} tokens, such as {', '.join(map(repr, _some(self.text, self.vocabulary)))}"
            )
        self.end = self.vocabulary[self.end_token] if self.end_token is not None else None

    def encode(self, text: str) -> np.ndarray:
        """See Tokenizer. A special token that is written in the text is that token."""
        return np.array(self._inner.encode_batch_fast([text], add_special_tokens=False)[0].ids, np.int64)

    def with_places(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Token numbers of a text, and the character that each begins at, int64 [tokens] each."""
        found = self._inner.encode(text, add_special_tokens=False)
        return np.array(found.ids, np.int64), np.array([first for first, _ in found.offsets], np.int64)

    @property
    def of_library(self) -> Any:
        """A tokenizer of the library."""
        return library().Tokenizer.from_str(self.text)

    def decode(self, tokens: Sequence[int]) -> str:
        """See Tokenizer."""
        return self._inner.decode([int(token) for token in tokens], skip_special_tokens=True)

    def token_bytes(self) -> np.ndarray:
        """See Tokenizer. Exact of those that keep every byte, as byte-level ones do."""
        return self._bytes.copy()

    @cached_property
    def _bytes(self) -> np.ndarray:
        told = json.loads(self.text)
        parts = {part.get("type") for part in _parts(told.get("decoder"))}
        added = {one["content"]: bool(one.get("special")) for one in told.get("added_tokens") or ()}
        of_bytes = dict.fromkeys(byte_characters(), 1) if "ByteLevel" in parts else {}
        found = np.zeros(self.vocab_size, np.int64)
        for token, number in self.vocabulary.items():
            if token in added:
                found[number] = 0 if added[token] else len(token.encode())
            elif "ByteFallback" in parts and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                found[number] = 1
            else:
                found[number] = sum(of_bytes.get(c) or len(c.encode()) for c in token.replace("\u2581", " "))
        return found

    @cached_property
    def _hash(self) -> str:
        return hashlib.sha256(f"{self.end}\0{self.text}".encode()).hexdigest()

    def identity(self) -> str:
        """See Tokenizer."""
        return self._hash

    def definition(self) -> tuple[str, dict[str, Any]]:
        """See Tokenizer."""
        return self.text, self.config | ({"eos_token": self.end_token} if self.end_token is not None else {})


def trained(texts: Iterable[str], vocab_size: int) -> str:
    """A byte-level BPE, as the text of a tokenizer.json: GPT-2's kind, with one special token, which ends a document.

    Args:
        texts: to learn from.
        vocab_size: at most; fewer where the text has no more pairs.
    """
    of = library()
    made = of.Tokenizer(of.models.BPE())
    made.pre_tokenizer = of.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = of.decoders.ByteLevel()
    trainer = of.trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=of.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[END],
        show_progress=False,
    )
    made.train_from_iterator(iter(texts), trainer=trainer)
    return made.to_str(pretty=True)


def _config(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{PATH}: got {path}, which cannot be read: {error}; expected JSON, or no such file"
        ) from None
    return found if isinstance(found, dict) else {}


def _template(path: Path) -> dict[str, str]:
    """Of chats, where it has a file of its own."""
    try:
        return {"chat_template": path.read_text(encoding="utf-8")}
    except (OSError, UnicodeDecodeError):
        return {}


def _parts(decoder: Any) -> Iterator[dict[str, Any]]:
    """A part of a tokenizer, and what it is made of."""
    if isinstance(decoder, dict):
        yield decoder
        for part in decoder.get("decoders") or ():
            yield from _parts(part)


def _some(text: str, vocabulary: dict[str, int]) -> list[str]:
    """A few of its tokens: special ones, if it has any."""
    special = [one["content"] for one in json.loads(text).get("added_tokens") or () if one.get("special")]
    return (special or sorted(vocabulary))[:5]
