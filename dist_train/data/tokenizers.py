"""From text to token numbers and back."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dist_train.errors import ConfigError
from dist_train.whole import write_text

FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"
KIND = "dist_train"  # the key of CONFIG that has a tokenizer's name
COMMON = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
END = "<|endoftext|>"


class Tokenizer(ABC):
    """What text is encoded by.

    Attributes:
        name: as in the config, such as bytes; of a file, its name.
        vocab_size: token numbers are below it.
        end: the number of the token that ends a document; None where there is none.
        flags: whether the numbers that `encode` gives have flags in them, see chat.py.
    """

    name: str
    vocab_size: int
    end: int | None = None
    flags: bool = False

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Token numbers of a text, int64 [tokens], without one that ends it. Raises ConfigError for text that it has no
        token for."""

    @abstractmethod
    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token numbers. Bytes that are no UTF-8 become the replacement character."""

    @abstractmethod
    def token_bytes(self) -> np.ndarray:
        """How many bytes of UTF-8 each token stands for, int64 [vocab_size]; 0 of those that are no text, such as the
        one that ends a document. Their sum over a text is its length in bytes."""

    @abstractmethod
    def identity(self) -> str:
        """A hash that differs for another tokenizer. `repr` shows it, so that a data set's fingerprint has it."""

    @abstractmethod
    def definition(self) -> tuple[str, dict[str, Any]]:
        """As Hugging Face's libraries read it: the text of tokenizer.json, and what stands in tokenizer_config.json."""

    def save(self, folder: Path) -> None:
        """Writes both files into a folder, which `load` and transformers' AutoTokenizer read."""
        text, config = self.definition()
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / FILE, text)
        write_text(folder / CONFIG, json.dumps(COMMON | config | {KIND: self.name}, indent=2))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.identity()})"


class Bytes(Tokenizer):
    """One token for each byte of UTF-8: 256, and one that ends a document."""

    name, vocab_size, end = "bytes", 257, 256

    def encode(self, text: str) -> np.ndarray:
        """See Tokenizer."""
        return np.frombuffer(text.encode(), np.uint8).astype(np.int64)

    def decode(self, tokens: Sequence[int]) -> str:
        """See Tokenizer."""
        return bytes(token for token in tokens if token < 256).decode(errors="replace")

    def token_bytes(self) -> np.ndarray:
        """See Tokenizer."""
        return np.array([1] * 256 + [0])

    def identity(self) -> str:
        """See Tokenizer."""
        return "bytes"

    def definition(self) -> tuple[str, dict[str, Any]]:
        """See Tokenizer."""
        vocabulary = {character: number for number, character in enumerate(byte_characters())}
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        added = {"id": self.end, "content": END, "special": True, "normalized": False}
        added |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        return _bpe(vocabulary, level, level, [added]), {"eos_token": END}


class Characters(Tokenizer):
    """One token for each character of a vocabulary, in its order; none that ends a document.

    Args:
        vocabulary: the characters, sorted.
    """

    name = "characters"

    def __init__(self, vocabulary: str):
        self.vocabulary, self.vocab_size = vocabulary, len(vocabulary)
        self._codes = np.frombuffer(vocabulary.encode("utf-32-le"), np.uint32)

    def encode(self, text: str) -> np.ndarray:
        """See Tokenizer."""
        codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        found = np.minimum(np.searchsorted(self._codes, codes), self.vocab_size - 1)
        strange = np.flatnonzero(self._codes[found] != codes)
        if len(strange):
            raise ConfigError(
                f"data.args.tokenizer: got the character {text[strange[0]]!r}, which is not in the files to train on, "
                f"expected one of their {self.vocab_size} characters; take it out, or write --data.args.tokenizer bytes"
            )
        return found.astype(np.int64)

    def decode(self, tokens: Sequence[int]) -> str:
        """See Tokenizer."""
        return "".join(self.vocabulary[token] for token in tokens)

    def token_bytes(self) -> np.ndarray:
        """See Tokenizer."""
        return np.array([len(character.encode()) for character in self.vocabulary])

    def identity(self) -> str:
        """See Tokenizer."""
        return "characters " + hashlib.sha256(self.vocabulary.encode()).hexdigest()

    def definition(self) -> tuple[str, dict[str, Any]]:
        """See Tokenizer."""
        return _bpe({character: i for i, character in enumerate(self.vocabulary)}, None, {"type": "Fuse"}, []), {}


def load(folder: Path) -> Tokenizer:
    """What `save` has written into a folder. Raises ConfigError where it is not there, or not whole."""
    try:
        kind = json.loads((folder / CONFIG).read_text(encoding="utf-8"))[KIND]
        if kind == Bytes.name:
            return Bytes()
        if kind == Characters.name:
            vocabulary = json.loads((folder / FILE).read_text(encoding="utf-8"))["model"]["vocab"]
            return Characters("".join(sorted(vocabulary, key=vocabulary.get)))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"tokenizer: got {folder}, expected {FILE} and {CONFIG} in it, as a run leaves them: {error!r}"
        ) from None
    from dist_train.data.tokenizer_file import FromFile

    if kind == "chat":
        from dist_train.data.chat import Chat

        return Chat(FromFile(folder))
    return FromFile(folder)


def byte_characters() -> list[str]:
    """The character that stands for each byte in the vocabularies of byte-level tokenizers: itself, where it can be
    seen. Source: GPT-2's encoder.py."""
    seen = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in seen else next(others)) for byte in range(256)]


def _bpe(vocabulary: Mapping[str, int], before: Any, after: Any, added: list[dict[str, Any]]) -> str:
    """A tokenizer.json that merges nothing."""
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
    model |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    told = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None}
    told |= {"pre_tokenizer": before, "post_processor": None, "decoder": after}
    return json.dumps(told | {"model": model | {"vocab": vocabulary, "merges": []}}, indent=1)
