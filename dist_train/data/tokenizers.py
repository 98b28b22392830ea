"""From text to token numbers and back: by bytes, by characters, and what a run has kept of any tokenizer."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dist_train.data.chat import Chat
from dist_train.data.tokenizer_base import CONFIG, END, FILE, KIND, Tokenizer, byte_characters
from dist_train.data.tokenizer_file import FromFile
from dist_train.errors import ConfigError


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
    if kind == Chat.name:
        return Chat(FromFile(folder))
    return FromFile(folder)


def _bpe(vocabulary: Mapping[str, int], before: Any, after: Any, added: list[dict[str, Any]]) -> str:
    """A tokenizer.json that merges nothing."""
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
    model |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    told = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None}
    told |= {"pre_tokenizer": before, "post_processor": None, "decoder": after}
    return json.dumps(told | {"model": model | {"vocab": vocabulary, "merges": []}}, indent=1)
