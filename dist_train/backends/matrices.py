"""Optimizers that compute with whole matrices: how these lie on the ranks, and the way to one of them and back.

Each matrix has one rank that computes with it. Where ranks hold parts, these go there, and parts of the result come
back; where every rank holds all, only the results are exchanged. Of a part that several ranks hold a copy of, one copy
goes, from a rank that is near, and the result comes back to all.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import nn

from dist_train.backends.shards import local_of
from dist_train.ranks import dist
from dist_train.ranks.dist import World


@dataclass(frozen=True)
class Part:
    """Elements of a matrix, in the order of rows: so many that follow each other, again and again a row further on.

    Args:
        start: the first of them.
        width: that follow each other.
        rows: how often; 0 where there are none.
    """

    start: int
    width: int
    rows: int = 1

    @property
    def count(self) -> int:
        """Of elements."""
        return self.width * self.rows

    def of(self, matrix: torch.Tensor) -> torch.Tensor:
        """A view [rows, width] of a matrix [rows, columns] that is contiguous."""
        begin = matrix.storage_offset() + self.start
        return matrix.as_strided((self.rows, self.width), (matrix.shape[1], 1), begin)


NONE = Part(0, 0, 0)


@dataclass(frozen=True)
class Held:
    """What a rank's tensor holds of a matrix.

    Args:
        shape: rows and columns of the matrix.
        part: that is here.
        offset: where it lies in the rank's tensor.
    """

    shape: tuple[int, int]
    part: Part
    offset: int = 0


@dataclass(frozen=True, eq=False)
class Matrix:
    """A matrix, and who holds what of it.

    Args:
        shape: rows and columns.
        offset: where this rank's part begins in the tensor that holds it.
        parts: of every rank. Of two of them, either both are the same, or they have no element in common.
    """

    shape: tuple[int, int]
    offset: int
    parts: tuple[Part, ...]

    @property
    def is_everywhere(self) -> bool:
        """Whether every rank holds all of it."""
        return all(part.count == math.prod(self.shape) for part in self.parts)

    def senders(self, to: int) -> dict[Part, int]:
        """Its parts, and the rank that each comes from, on its way to a rank: the nearest that has it."""
        found: dict[Part, int] = {}
        for rank in sorted(range(len(self.parts)), key=lambda rank: (abs(rank - to), rank)):
            if self.parts[rank].count:
                found.setdefault(self.parts[rank], rank)
        return found


Work = tuple[Matrix, torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]


class SeesMatrices(torch.optim.Optimizer, ABC):
    """An optimizer that computes with whole matrices. Alone it holds them; else a backend says how they lie."""

    layout: Mapping[torch.Tensor, Sequence[Matrix]] = {}
    exchange: "Alone | Exchange"

    @abstractmethod
    def sees(self, group: Mapping[str, Any]) -> bool:
        """Whether the parameters of a group are matrices to it."""

    def parts(self, parameter: torch.Tensor) -> Sequence[tuple[Matrix, int]]:
        """The matrices of which a tensor that it was given holds something on some rank, and how much of each here."""
        known = self.layout.get(parameter)
        if known is None:
            return [(Matrix(rows_of(parameter.shape), 0, (Part(0, parameter.numel()),)), parameter.numel())]
        return [(matrix, matrix.parts[self.exchange.rank].count) for matrix in known]


def lay_out(
    optimizer: torch.optim.Optimizer, world: World, held: Mapping[torch.Tensor, Sequence[Held]] | None = None
) -> None:
    """Tells an optimizer that computes with matrices how they lie; for another one nothing. Collective.

    Args:
        optimizer: of this backend.
        world: this rank's place.
        held: by the tensors that the optimizer updates, the matrices in each, the same ones on every rank; None if it
            was given the parameters themselves, whole or sharded.
    """
    if not isinstance(optimizer, SeesMatrices):
        return
    if held is None:
        seen = [p for group in optimizer.param_groups if optimizer.sees(group) for p in group["params"]]
        held = {p: [_of_parameter(p)] for p in seen}
    every = [of for several in held.values() for of in several]
    if not every:
        return
    parts = iter(zip(*_parts(every), strict=True))
    optimizer.layout = {t: [Matrix(of.shape, of.offset, next(parts)) for of in held[t]] for t in held}
    optimizer.exchange = Exchange(world) if world.size > 1 else Alone()


def rows_of(shape: Sequence[int]) -> tuple[int, int]:
    """A weight as a matrix: a kernel of a convolution has a row for each output."""
    return shape[0], math.prod(shape[1:])


def _of_parameter(parameter: nn.Parameter) -> Held:
    local, (rows, columns) = local_of(parameter), rows_of(parameter.shape)
    if local.shape == parameter.shape:
        return Held((rows, columns), Part(0, local.numel()))
    if not local.numel():
        return Held((rows, columns), NONE)
    (chunk,) = parameter.__create_chunk_list__()  # of a DTensor
    inner = math.prod(parameter.shape[2:])
    assert tuple(chunk.sizes[2:]) == tuple(parameter.shape[2:]), f"got {chunk.sizes}, expected rows or columns"
    first = chunk.offsets[1] * inner if len(chunk.offsets) > 1 else 0
    start, width = chunk.offsets[0] * columns + first, local.numel() // chunk.sizes[0]
    if width == columns:
        return Held((rows, columns), Part(start, local.numel()))  # rows that follow each other
    return Held((rows, columns), Part(start, width, chunk.sizes[0]))


def _parts(every: Sequence[Held]) -> Iterator[list[Part]]:
    """Each rank's parts of the matrices. Collective."""
    mine = [number for of in every for number in (of.part.start, of.part.width, of.part.rows)]
    for numbers in dist.gather_numbers([float(number) for number in mine]):
        found = [int(number) for number in numbers]
        yield [Part(*of) for of in zip(found[::3], found[1::3], found[2::3], strict=True)]


class Alone:
    """Every matrix is whole in this process."""

    rank, size = 0, 1

    def mapped(self, work: Sequence[Work]) -> list[torch.Tensor]:
        """See Exchange."""
        return [function(part.view(matrix.shape)).reshape(-1) for matrix, part, function in work]


class Exchange:
    """Computes with matrices that ranks hold parts of, or hold all of, each on one rank.

    Args:
        world: this rank's place.
    """

    def __init__(self, world: World):
        self.rank, self.size, self.device = world.rank, world.size, world.device
        self.routes: dict[tuple[Matrix, int], dict[Part, int]] = {}

    def mapped(self, work: Sequence[Work]) -> list[torch.Tensor]:
        """The function of each whole matrix, as this rank's part of the result. Collective.

        Args:
            work: the same matrices on every rank, in the same order, each with this rank's part of it [count], of one
                type, and the function of the whole of it, from [rows, columns] to the same.
        """
        if not work:
            return []
        matrices, parts, functions = zip(*work, strict=True)
        owners = self._owners(matrices)
        mine = [i for i, owner in enumerate(owners) if owner == self.rank]
        whole = all(matrix.is_everywhere for matrix in matrices)
        if whole and len(work) == 1:
            return Alone().mapped(work)  # nothing to share out
        if whole:
            found = {i: functions[i](parts[i].view(matrices[i].shape)) for i in mine}
            return self._shown(found, matrices, owners, parts[0])
        found = self._gathered(matrices, owners, parts, mine)
        found = {i: functions[i](matrix) for i, matrix in found.items()}
        return self._returned(found, matrices, owners, parts)

    def _owners(self, matrices: Sequence[Matrix]) -> list[int]:
        """The rank that computes with each: the largest first, rank by rank."""
        order = sorted(range(len(matrices)), key=lambda i: -_cost(matrices[i].shape))
        owners = [0] * len(order)
        for place, i in enumerate(order):
            owners[i] = place % self.size
        return owners

    def _route(self, matrix: Matrix, owner: int) -> dict[Part, int]:
        """The senders of a matrix on its way to its owner, which stay the same."""
        if (matrix, owner) not in self.routes:
            self.routes[matrix, owner] = matrix.senders(owner)
        return self.routes[matrix, owner]

    def _gathered(
        self, matrices: Sequence[Matrix], owners: Sequence[int], parts: Sequence[torch.Tensor], mine: Sequence[int]
    ) -> dict[int, torch.Tensor]:
        """Those that this rank computes with, of all ranks' parts."""
        senders = [self._route(matrix, owner) for matrix, owner in zip(matrices, owners, strict=True)]
        sends = [i for i, of in enumerate(senders) if of.get(matrices[i].parts[self.rank]) == self.rank]
        sent = [[parts[i] for i in sends if owners[i] == rank] for rank in range(self.size)]
        coming = [
            [(i, part) for i in mine for part, sender in senders[i].items() if sender == rank]
            for rank in range(self.size)
        ]
        received = self._all_to_all(sent, [sum(part.count for _, part in of) for of in coming], parts[0])
        found = {i: received[0].new_empty(matrices[i].shape) for i in mine}
        for several, chunk in zip(coming, received, strict=True):
            for (i, part), values in zip(several, chunk.split([part.count for _, part in several]), strict=True):
                part.of(found[i]).copy_(values.view(part.rows, part.width))
        return found

    def _returned(
        self, found: Mapping[int, torch.Tensor], matrices: Sequence[Matrix], owners: Sequence[int],
        parts: Sequence[torch.Tensor],
    ) -> list[torch.Tensor]:  # fmt: skip
        """Every rank's parts of the results, from the ranks that computed them."""
        results_of = {i: result.contiguous() for i, result in found.items()}
        sent = [
            [matrices[i].parts[rank].of(result).reshape(-1) for i, result in results_of.items()]
            for rank in range(self.size)
        ]
        of_owner = [[i for i, owner in enumerate(owners) if owner == rank] for rank in range(self.size)]
        counts = [[len(parts[i]) for i in several] for several in of_owner]
        received = self._all_to_all(sent, [sum(of) for of in counts], parts[0])
        results: dict[int, torch.Tensor] = {}
        for several, chunk, sizes in zip(of_owner, received, counts, strict=True):
            results |= dict(zip(several, chunk.split(sizes), strict=True))
        return [results[i].to(parts[i].device) for i in range(len(parts))]

    def _all_to_all(
        self, sent: Sequence[Sequence[torch.Tensor]], counts: Sequence[int], like: torch.Tensor
    ) -> Sequence[torch.Tensor]:
        """What every rank sends here, by rank: so many elements. The tensors for each rank are sent as one."""
        empty = like.new_empty(0)
        outgoing = torch.cat([empty, *(tensor for several in sent for tensor in several)]).to(self.device)
        incoming = outgoing.new_empty(sum(counts))
        sizes = [sum(len(tensor) for tensor in several) for several in sent]
        torch_dist.all_to_all_single(incoming, outgoing, list(counts), sizes)
        return incoming.split(list(counts))

    def _shown(
        self, found: Mapping[int, torch.Tensor], matrices: Sequence[Matrix], owners: Sequence[int], like: torch.Tensor
    ) -> list[torch.Tensor]:
        """All results on every rank."""
        of_owner = [[i for i, owner in enumerate(owners) if owner == rank] for rank in range(self.size)]
        counts = [[math.prod(matrices[i].shape) for i in several] for several in of_owner]
        longest = max(sum(of) for of in counts)
        mine = like.new_zeros(longest)
        torch.cat([mine[:0], *(result.reshape(-1) for result in found.values())], out=mine[: sum(counts[self.rank])])
        every = like.new_empty(self.size * longest)
        torch_dist.all_gather(list(every.split(longest)), mine)
        results = {}
        for several, chunk, sizes in zip(of_owner, every.split(longest), counts, strict=True):
            results |= dict(zip(several, chunk[: sum(sizes)].split(sizes), strict=True))
        return [results[i] for i in range(len(matrices))]


def _cost(shape: tuple[int, int]) -> int:
    """Of products of the matrix with itself: about its elements times its smaller side."""
    return math.prod(shape) * min(shape)
