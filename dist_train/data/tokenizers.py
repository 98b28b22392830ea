"""From text to token numbers and back."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from dist_train.errors import ConfigError


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
