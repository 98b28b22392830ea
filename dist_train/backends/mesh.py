"""The mesh of ranks under fsdp2: groups that each have a copy of the model, ranks that share out a copy, and ranks that
split each layer. Pure, and before torch is imported."""

import itertools
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from dist_train.config.tree import Config
from dist_train.config.values import unknown
from dist_train.ranks.launcher import Launcher

DIMENSIONS = ("replicate", "shard", "tensor")  # the outermost first: ranks of the last one follow each other
REST = -1


@dataclass(frozen=True)
class Mesh:
    """How many ranks each dimension has. Rank (r * shard + s) * tensor + t is at (r, s, t)."""

    replicate: int = 1
    shard: int = 1
    tensor: int = 1

    @property
    def sizes(self) -> tuple[int, int, int]:
        """In the order of DIMENSIONS."""
        return self.replicate, self.shard, self.tensor

    def place(self, rank: int) -> tuple[int, int, int]:
        """Where a rank is, in the order of DIMENSIONS."""
        rest, tensor = divmod(rank, self.tensor)
        replicate, shard = divmod(rest, self.shard)
        return replicate, shard, tensor

    def alike(self, rank: int, dimensions: Collection[str]) -> tuple[int, ...]:
        """The ranks that differ from this one in these dimensions alone, itself among them: of what is not split there,
        they hold the same."""
        place = self.place(rank)
        free = (
            range(n) if name in dimensions else (at,) for name, n, at in zip(DIMENSIONS, self.sizes, place, strict=True)
        )
        _, shard, tensor = self.sizes
        return tuple((r * shard + s) * tensor + t for r, s, t in itertools.product(*free))

    def __str__(self) -> str:
        """For people: the dimensions of several ranks."""
        several = [f"{name} {size}" for name, size in zip(DIMENSIONS, self.sizes, strict=True) if size > 1]
        return " x ".join(several) or f"{DIMENSIONS[1]} 1"


def of(config: Config, ranks: int) -> Mesh:
    """The mesh of a config that passed `problems`, on so many ranks."""
    given = config.backend.mesh or {"shard": REST}
    sizes = {name: given.get(name, 1) for name in DIMENSIONS}
    left = ranks // math.prod(size for size in sizes.values() if size != REST)
    return Mesh(**{name: left if size == REST else size for name, size in sizes.items()})


def problems(config: Config, backend: str, launcher: Launcher) -> Iterator[str]:
    """A line for every mistake: got, expected, and what to do."""
    given, ranks, local = config.backend.mesh, launcher.world_size, launcher.local_world_size
    if not given:
        return
    path, text = "backend.mesh", shown(given)
    if backend != "fsdp2":
        yield (
            f"{path}: got {text}, but backend {backend} does not have it; leave it out, or write --backend.name fsdp2"
        )
        return
    others = [name for name in given if name not in DIMENSIONS]
    for name in others:
        yield unknown(path, str(name), DIMENSIONS)
    if others:
        return
    bad = {name: size for name, size in given.items() if type(size) is not int or (size != REST and size < 1)}
    for name, size in bad.items():
        yield f"{path}.{name}: got {size!r}, expected a whole number of 1 or more, or -1 for what is left"
    rests = [name for name, size in given.items() if size == REST]
    if len(rests) > 1:
        yield f"{path}: got -1 for {' and '.join(rests)}, expected it once at most: it is what the others leave"
    if bad or len(rests) > 1:
        return
    fixed = math.prod(size for size in given.values() if size != REST)
    if ranks % fixed or (not rests and fixed != ranks):
        fits = "; ".join(_fitting(given, ranks))
        yield f"{path}: got {text} on {ranks} ranks, expected sizes with that product, such as {fits}"
        return
    tensor = of(config, ranks).tensor
    if local % tensor:
        divisors = ", ".join(str(n) for n in range(1, local + 1) if not local % n)
        yield (
            f"{path}.tensor: got {tensor} with {local} ranks on a node, expected ranks of one node, which have the "
            f"fastest links, so one of {divisors}"
        )
    yield from _unordered(config, of(config, ranks), text)


def _unordered(config: Config, mesh: Mesh, text: str) -> Iterator[str]:
    """Where gradients cannot be added up in an order that is the same for any mesh."""
    if config.backend.reduce != "ordered":
        return
    got = f"backend.reduce: got ordered with backend.mesh {text}"
    if mesh.tensor > 1:
        instead = shown({"replicate": mesh.replicate, "shard": mesh.shard * mesh.tensor})
        yield (
            f"{got}, but sums within a layer depend on how many ranks split it; write --backend.mesh '{instead}', or "
            f"leave backend.reduce out"
        )
    elif mesh.shard == 1 and mesh.replicate > 1:
        yield f"{got}, which shares out no weights, so that torch adds up by itself; write --backend.name ddp"


def _fitting(given: dict[str, int], ranks: int) -> Iterator[str]:
    """Meshes that fit: one dimension changed, the others as they are; else shards alone."""
    found = False
    for name in given:
        rest = math.prod(size for other, size in given.items() if other != name and size != REST)
        if ranks % rest == 0 and REST not in given.values():
            found = True
            yield shown(given | {name: ranks // rest})
    if not found:
        yield shown({"shard": ranks})


def shown(given: Mapping[str, int]) -> str:
    """A mesh as a config has it."""
    return "{" + ", ".join(f"{name}: {size}" for name, size in given.items()) + "}"
