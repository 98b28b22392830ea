"""The words of the table that says how layers are split over the tensor ranks of a mesh. Imports no torch."""

import re
from dataclasses import dataclass
from typing import Literal, get_args

from dist_train.config.values import unknown
from dist_train.errors import ConfigError

Kind = Literal["columns", "rows", "sequence", "gather", "cut"]
KINDS = get_args(Kind)
FORM = re.compile(r"(columns|rows)( by [1-9][0-9]*)?( gathered)?|(sequence|gather|cut)")


@dataclass(frozen=True)
class Word:
    """What is done with a layer.

    Args:
        kind: columns: each rank computes a part of the numbers that it gives; of an embedding, too.
            rows: each rank takes a part of the numbers that it gets, and the results are added up; of an embedding, it
            looks up a part of the tokens.
            sequence: each rank computes a part of the tokens, as of a norm.
            gather: it gets all tokens, where the ranks have a part each before it.
            cut: of the tokens that it gives, each rank goes on with a part.
        piece: of columns and rows, how many numbers stay together, such as those of a head.
        gathered: of columns and rows, each rank gets all that it gives.
    """

    kind: Kind
    piece: int = 1
    gathered: bool = False

    @property
    def splits(self) -> bool:
        """Whether each rank has a part of the weight."""
        return self.kind in ("columns", "rows")


def word_of(path: str, text: object) -> Word:
    """What a word of the table says. Raises ConfigError.

    Args:
        path: of the word in the config.
        text: `columns`, `rows`, each also with `by 64` and `gathered`, `sequence`, `gather` or `cut`.
    """
    if not isinstance(text, str):
        raise ConfigError(f"{path}: got {text!r}, expected one of {', '.join(KINDS)}")
    words = text.split()
    found = FORM.fullmatch(" ".join(words))
    if found is None:
        if not words or words[0] not in KINDS:
            raise ConfigError(unknown(path, text, KINDS, "word"))
        raise ConfigError(
            f"{path}: got {text!r}, expected {words[0]} alone"
            + (", or with a number that stays together (by 64), or gathered" if words[0] in KINDS[:2] else "")
        )
    split, piece, gathered, other = found.groups()
    return Word(split or other, int(piece.split()[1]) if piece else 1, gathered is not None)
