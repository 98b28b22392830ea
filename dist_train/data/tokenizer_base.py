"""What a tokenizer is, and what is common to all of them."""

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

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


def byte_characters() -> list[str]:
    """The character that stands for each byte in the vocabularies of byte-level tokenizers: itself, where it can be
    seen. Source: GPT-2's encoder.py."""
    seen = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in seen else next(others)) for byte in range(256)]
