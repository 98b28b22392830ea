"""What a run could be laid out as: backends, meshes and micro-batch sizes; what each needs, and which is the best."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import yaml

from dist_train.backends import BACKENDS, chosen, mesh
from dist_train.backends.rules import STAGES
from dist_train.config import strict_yaml
from dist_train.config.tree import BackendConfig, Config
from dist_train.config.values import unknown
from dist_train.doctor.estimate import Estimate
from dist_train.errors import ConfigError

FULL = 0.8  # of the memory: what is fragmented, and what libraries take for themselves, is not in an estimate
ZERO = "deepspeed"


@dataclass(frozen=True)
class Candidate:
    """A way to lay a run out.

    Args:
        config: of the run, as it would then be.
        name: for people.
        options: that make it so.
    """

    config: Config
    name: str
    options: str


@dataclass(frozen=True)
class Machine:
    """What it runs on.

    Args:
        ranks: all of them.
        of_node: ranks of a node.
        memory: bytes that a rank has.
        of_host: that is the host's, where the data set lies as well, and the model is built.
        inside: bytes a second that a rank sends inside a node.
        between: between nodes.
    """

    ranks: int
    of_node: int
    memory: int
    of_host: bool
    inside: float
    between: float

    def needed(self, found: Estimate) -> int:
        """Bytes of a rank's memory."""
        return max(found.peak.total, found.start) + found.data if self.of_host else found.peak.total

    def fits(self, found: Estimate) -> bool:
        """Whether there is room."""
        return self.needed(found) <= FULL * self.memory

    def seconds(self, found: Estimate) -> float:
        """That sending takes in a step, where nothing else is waited for."""
        return sum(count / (self.between if to.between else self.inside) for to, count in found.sent.items())


def best(found: Sequence[Estimate], machine: Machine) -> int | None:
    """Of those that fit, the number of the one that sends for the shortest time; of those alike, of the one with the
    fewest micro-batches, and then the least memory. None where none fits."""

    def order(number: int) -> tuple[float, int, int]:
        one = found[number]
        return float(f"{machine.seconds(one):.3g}"), one.micro_batches, machine.needed(one)

    return min((i for i, one in enumerate(found) if machine.fits(one)), key=order, default=None)


def listed(config: Config, texts: str, sizes: Sequence[int], ranks: int, of_node: int) -> list[Candidate]:
    """Every layout with every micro-batch size. Raises ConfigError for one that cannot be meant.

    Args:
        config: of the run.
        texts: of `--meshes`; empty for the usual ones.
        sizes: of micro-batches; none for that of the config.
        ranks: all of them.
        of_node: ranks of a node.
    """
    backends = list(_given(config, texts)) if texts else list(_usual(config, ranks, of_node))
    found = []
    for backend in backends:
        for size in sizes or [config.train.micro_batch_size]:
            made = replace(config, backend=backend, train=replace(config.train, micro_batch_size=size))
            options = f"--backend.name {backend.name}"
            if backend.name == ZERO:
                options += f" --backend.zero_stage {backend.zero_stage or 0}"
            if backend.mesh:
                options += f" --backend.mesh '{mesh.shown(backend.mesh)}'"
            options += f" --train.micro_batch_size {size}" if size is not None else ""
            found.append(Candidate(made, name_of(backend), options))
    return found


def name_of(backend: BackendConfig) -> str:
    """Of a layout, for people."""
    if backend.name == ZERO:
        return f"{ZERO}:{backend.zero_stage or 0}"
    return f"{backend.name} {mesh.shown(backend.mesh)}" if backend.mesh else backend.name


def _given(config: Config, texts: str) -> Iterator[BackendConfig]:
    """Names of backends, and meshes of fsdp2, as YAML has them in a list."""
    try:
        entries = strict_yaml.parse(f"[{texts.removeprefix('[').removesuffix(']')}]")
    except (yaml.YAMLError, ValueError):
        entries = [None]
    names = [*BACKENDS, *(f"{ZERO}:{stage}" for stage in STAGES)]
    for entry in entries:
        if isinstance(entry, dict) and all(isinstance(size, int) for size in entry.values()):
            for name in entry:
                if name not in mesh.DIMENSIONS:
                    raise ConfigError(unknown("--meshes", str(name), mesh.DIMENSIONS, "dimension"))
            yield replace(config.backend, name="fsdp2", zero_stage=None, mesh=entry)
        elif isinstance(entry, str):
            if entry not in names:
                raise ConfigError(unknown("--meshes", entry, names, "backend"))
            yield _of(config, entry)
        else:
            raise ConfigError(
                f"--meshes: got {texts!r}, expected backends and meshes with commas between them; for example "
                f"--meshes 'ddp, {{shard: 8}}, {{replicate: 2, shard: 4}}, deepspeed:3'"
            )


def _of(config: Config, name: str) -> BackendConfig:
    name, _, stage = name.partition(":")
    given = int(stage) if stage else config.backend.zero_stage if name == ZERO else None
    return replace(config.backend, name=name, zero_stage=given, mesh=config.backend.mesh if name == "fsdp2" else {})


def _usual(config: Config, ranks: int, of_node: int) -> Iterator[BackendConfig]:
    """What the config has; beside it a copy on each rank, shards over all ranks, and a copy on each node."""
    found = [_of(config, chosen(config.backend.name, "torchrun" if ranks > 1 else "none"))]
    if ranks > 1:
        found += [_of(config, "ddp"), replace(_of(config, "fsdp2"), mesh={})]
    if 1 < of_node < ranks:
        found.append(replace(_of(config, "fsdp2"), mesh={"replicate": ranks // of_node, "shard": of_node}))
    for i, backend in enumerate(found):
        if backend not in found[:i]:
            yield backend
