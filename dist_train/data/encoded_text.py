"""The text of a config as tokens, from the folder of encoded text; what is not there yet is encoded now."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dist_train.data import corpus, encoding, prose
from dist_train.data.chat import Chat
from dist_train.data.encoding_bar import Bar
from dist_train.data.tokenizer_base import Tokenizer
from dist_train.data.tokenizer_file import FromFile
from dist_train.data.tokenizers import Bytes, Characters
from dist_train.data.tokens import Tokens
from dist_train.errors import ConfigError

ENCODED = "encoded"  # in data.root, where encoded text is kept


def read(
    root: Path,
    files: str | None,
    field: str,
    name: str | None,
    end_token: str | None,
    key: str = "data.args.files",
    chat: bool = False,
) -> tuple[Tokens, Tokenizer]:
    """The text to train on, and what it is encoded by. Raises ConfigError, which names the key of the files.

    With `chat` each document is a list of messages, and the tokenizer that of chats.
    """
    if files is None:
        texts = prose.topics()
        by = _characters(texts) if name == Characters.name else tokenizer_of(root, name, end_token)
        return _in_memory(texts, by), by
    sources = corpus.find(root, files, key)
    if name != Characters.name:
        by = _of_chats(root, name, end_token) if chat else tokenizer_of(root, name, end_token)
        return _of(_Corpus(root, files, field, sources, by.identity(), by))
    return _of(_Corpus(root, files, field, sources, name, None))


def read_test(root: Path, files: str, field: str, by: Tokenizer) -> Tokens:
    """The text to test on, by the tokenizer of the other. Raises ConfigError."""
    sources = corpus.find(root, files, "data.args.test_files")
    return _of(_Corpus(root, files, field, sources, by.identity(), by))[0]


@dataclass(frozen=True)
class _Corpus:
    """Files that are encoded.

    Args:
        root: that their names start from, with the encoded text.
        files: the pattern.
        field: of a line or a row.
        sources: the files.
        kind: of the tokenizer.
        tokenizer: None where it is the characters of these files.
    """

    root: Path
    files: str
    field: str
    sources: Sequence[corpus.Source]
    kind: str
    tokenizer: Tokenizer | None

    @property
    def home(self) -> Path:
        """The folder of the encoded text."""
        told = hashlib.sha256(json.dumps([self.files, self.field, self.kind]).encode()).hexdigest()
        name = "-".join(re.findall(r"\w+", Path(self.files).name))
        return self.root / ENCODED / f"{name or 'text'}-{told[:12]}"


def texts(root: Path, files: str | None, field: str) -> Iterator[str]:
    """The text to train on itself, piece by piece. Raises ConfigError."""
    return iter(prose.topics()) if files is None else _pieces(corpus.find(root, files, "data.args.files"), field)


def _pieces(sources: Sequence[corpus.Source], field: str) -> Iterator[str]:
    spans = [span for unit in corpus.units(sources) for span in unit]
    return (piece.text for piece in corpus.documents(sources, spans, field))


def _of(found: _Corpus) -> tuple[Tokens, Tokenizer]:
    """The encoded text. Where it is not there one process of the node makes it, while the others wait at the lock."""
    home, sources = found.home, found.sources
    known = encoding.encoded(home, sources)
    if known is not None:
        return known
    from filelock import FileLock

    try:
        home.mkdir(parents=True, exist_ok=True)
        with FileLock(home / ".lock"):
            known = encoding.encoded(home, sources)
            if known is None:
                by = found.tokenizer or _characters(_pieces(sources, found.field))
                size = sum(source.size for source in sources)
                many = f"{len(sources):,} files" if len(sources) > 1 else sources[0].name
                with Bar(f"{many}, {size / 1e6:,.1f} MB, by {by.name}") as bar:
                    encoding.make(home, sources, found.field, by, bar)
                known = encoding.encoded(home, sources)
    except OSError as error:
        raise ConfigError(
            f"data.root: got {found.root}, where {home} cannot be written ({error.strerror}), expected a folder of "
            f"your own on a disk with space, where encoded text is kept; the text itself may be elsewhere: write "
            f"data.args.files from /"
        ) from error
    assert known is not None
    return known


def tokenizer_of(root: Path, name: str | None, end_token: str | None) -> Tokenizer:
    """Bytes, or that of a file. Raises ConfigError."""
    if name is None or name == Bytes.name:
        return Bytes()
    return FromFile(root / name, end_token)


def _of_chats(root: Path, name: str | None, end_token: str | None) -> Tokenizer:
    assert name is not None  # by the rules
    return Chat(FromFile(root / name, end_token))


def _characters(texts: Iterable[str]) -> Characters:
    return Characters("".join(sorted(set().union(*texts))))


def _in_memory(texts: Sequence[str], tokenizer: Tokenizer) -> Tokens:
    end = [] if tokenizer.end is None else [tokenizer.end]
    rows = [np.concatenate([tokenizer.encode(one), end]) for one in texts]
    starts = np.cumsum([0, *map(len, rows[:-1])], dtype=np.int64)
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    row = np.concatenate(rows).astype(encoding.dtype_of(tokenizer))
    return Tokens([row], starts, f"{digest} {tokenizer.identity()}")
