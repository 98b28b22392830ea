"""Who of several ranks is wrong, by the digests that each of them has."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from dist_train.backends.fit import some

Rows = Mapping[str, int]  # digests by name
Places = Sequence[str]  # host and device of each rank


@dataclass(frozen=True)
class Finding:
    """What an audit has found.

    Args:
        ranks: the one that is wrong; several where one of them is.
        line: for people.
    """

    ranks: tuple[int, ...]
    line: str


class Alarm(Protocol):
    """Who is told of audits."""

    def __call__(self, step: int, found: Sequence[Finding]) -> None:
        """What the audit of a step has found, or nothing. Collective."""


def of_copies(places: Places, copies: Mapping[int, tuple[int, Rows]]) -> list[Finding]:
    """Of ranks whose copies of the same weights are not all the same: those whose copy is not that of most.

    Args:
        places: of all ranks.
        copies: of the ranks that have copies, a digest of all and those of each.
    """
    totals, rows = ({rank: of[i] for rank, of in copies.items()} for i in (0, 1))
    most, count = Counter(totals.values()).most_common(1)[0]
    if 2 * count <= len(totals):
        ranks = tuple(totals)
        line = f"the weights of {_named(places, ranks)} differ, and no copy is that of most: {_in(*rows.values())}"
        return [Finding(ranks, line)]
    good, found = next(rows[rank] for rank, total in totals.items() if total == most), []
    for rank in [rank for rank, total in totals.items() if total != most]:
        line = f"the weights of {_named(places, (rank,))} differ from those of most ranks: {_in(rows[rank], good)}"
        found.append(Finding((rank,), line))
    return found


def of_shares(places: Places, shares: Mapping[tuple[int, int, int], Sequence[Rows]]) -> list[Finding]:
    """Of ranks that computed a gradient which another one found to be another.

    Args:
        places: of all ranks.
        shares: the digests that three ranks have of a gradient: the one that trains with it, the one that found
            another, and the third; which of two ranks is the first again, and of one rank as well.
    """
    found: dict[tuple[int, ...], Finding] = {}
    for ranks, rows in shares.items():
        wrong, why = _judged(ranks, *rows)
        line = f"the gradient that {_named(places, wrong)} computed {why}: {_in(*rows[:2])}"
        found.setdefault(wrong, Finding(wrong, line))
    return list(found.values())


def _judged(ranks: tuple[int, int, int], own: Rows, other: Rows, last: Rows) -> tuple[tuple[int, ...], str]:
    """Who is wrong, and why."""
    first, second, third = ranks
    if first == second:
        return (first,), "was another when it was computed again"
    if last == other:
        again = f"rank {first} itself, when it computed it again," if third == first else f"rank {third}"
        return (first,), f"is wrong, as rank {second} and {again} agree on another"
    if last == own and third != first:
        return (second,), f"is wrong, as rank {first} and rank {third} agree on another"
    if third == first:
        return tuple(sorted((first, second))), "differs: one of them is wrong, and there is no third rank to say which"
    return (
        tuple(sorted(ranks)),
        "differs between all of them: several are wrong, or the computation does not repeat its last bits, as with "
        "torch.use_deterministic_algorithms it does",
    )


def _named(places: Places, ranks: Sequence[int]) -> str:
    return " and ".join(f"rank {rank} ({places[rank]})" for rank in ranks)


def _in(*rows: Rows) -> str:
    """The tensors in which results differ."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    others = tuple(name for name in names if len({row.get(name) for row in rows}) > 1)
    return f"{len(others)} of {len(names)} tensors, {some(others)}"
