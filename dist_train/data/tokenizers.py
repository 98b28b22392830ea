"""From text to token numbers and back."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np


class Tokenizer(ABC):
    """What text is encoded by.

    Attributes:
        name: as in the config, such as bytes; of a file, its name.
        vocab_size: token numbers are below it.
        end: the number of the token that ends a document; None where there is none.
    """

    name: str
    vocab_size: int
    end: int | None = None

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
