"""Which samples make up a step: a pure function of (seed, epoch, step), never of rank, world size or workers."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np

from dist_train.config.tree import group_of

if TYPE_CHECKING:
    from dist_train.config.tree import Config, TrainConfig
    from dist_train.ranks.dist import World

# Up to here an epoch's order is a permutation held in memory (8 MiB); above, it is computed index by index.
PERMUTATION_LIMIT = 1 << 20
# Samples of a rank that are looked up at once, if its share of a step is smaller: one by one costs more than a step.
BLOCK = 4096
EVALUATED, EVALUATED_BYTES = 2048, 32 << 20
ROUNDS = 8  # 6 leave a bias that a chi-square test sees in small ranges


def global_indices(
    n: int, seed: int, epoch: int, step: int, global_batch_size: int, drop_last: bool = False
) -> np.ndarray:
    """The samples of a step in the order of the epoch, int64 [batch].

    The last batch of an epoch is smaller where `global_batch_size` does not divide `n`.
    Time and memory do not depend on `n` above PERMUTATION_LIMIT, nor on `step`.

    Args:
        n: samples in the data set, at most 2**62.
        seed: the run's seed.
        epoch: counts from 0.
        step: the step within the epoch, 0 <= step < steps_per_epoch(...).
        global_batch_size: samples of a step over all ranks.
        drop_last: leave out a smaller last batch.

    Raises:
        IndexError: the epoch has no such step.
    """
    steps = steps_per_epoch(n, global_batch_size, drop_last)
    if not 0 <= step < steps:
        raise IndexError(f"step {step} of an epoch with {steps} steps")
    start = step * global_batch_size
    stop = min(n, start + global_batch_size)
    return _samples(np.arange(start, stop), n, seed, epoch)


def steps_per_epoch(n: int, global_batch_size: int, drop_last: bool = False) -> int:
    """Optimizer steps of one pass over `n` samples."""
    return n // global_batch_size if drop_last else -(-n // global_batch_size)


def share(count: int, rank: int, world_size: int, group: int = 1) -> slice:
    """The part of `count` things that a rank takes: contiguous, of sizes that differ by one at most, maybe empty.

    Args:
        count: of the things.
        rank: of so many.
        world_size: ranks.
        group: so many things stay together: shares are of whole groups, of which the last may be smaller.
    """
    groups = -(-count // group)
    first, past = rank * groups // world_size * group, (rank + 1) * groups // world_size * group
    return slice(first, min(past, count))


def pieces(count: int, world_size: int, micro_batch_size: int | None, group: int = 1) -> int:
    """Micro-batches of a step with `count` samples: the fewest that keep to the limit, as many on every rank.

    Args:
        count: samples of the step.
        world_size: number of ranks.
        micro_batch_size: the limit; a multiple of `group`.
        group: see `share`.
    """
    if micro_batch_size is None:
        return 1
    groups = -(-count // group)
    largest = -(-groups // world_size)  # in groups
    return max(1, -(-largest // (micro_batch_size // group)))


def largest_piece(count: int, world_size: int, micro_batch_size: int | None, group: int = 1) -> int:
    """Samples of the largest micro-batch of a rank, of a step with `count` samples; see `pieces`."""
    groups = -(-count // group)
    largest = -(-groups // world_size)
    return min(count, -(-largest // pieces(count, world_size, micro_batch_size, group)) * group)


def sizes(count: int, world_size: int, micro_batch_size: int | None) -> set[int]:
    """Samples that a micro-batch has on any rank, of a step with `count` samples."""
    micro_batches = pieces(count, world_size, micro_batch_size)
    shares = {(rank + 1) * count // world_size - rank * count // world_size for rank in range(world_size)}
    return {len(range(n)[share(n, i, micro_batches)]) for n in shares for i in range(micro_batches)}


def evaluated_at_once(cfg: "TrainConfig", world_size: int, sample_bytes: int) -> int:
    """Samples of an evaluation's batch on a rank.

    Args:
        cfg: of the run. Without eval_batch_size, as many as a micro-batch of training has, which fits in memory with
            its gradients; more, up to EVALUATED, where inputs and outputs stay within EVALUATED_BYTES.
        world_size: number of ranks.
        sample_bytes: of a sample's input and outputs.
    """
    if cfg.eval_batch_size is not None:
        return cfg.eval_batch_size
    trained = largest_piece(cfg.global_batch_size, world_size, cfg.micro_batch_size)
    return max(trained, min(EVALUATED, EVALUATED_BYTES // max(1, sample_bytes)))


def falls_on(step: int, every_steps: int | None, every_epochs: int | None, steps_per_epoch: int) -> bool:
    """Whether something is due after this many steps of the run, which comes every so many of them, or epochs."""
    if every_steps and step % every_steps == 0:
        return True
    return bool(every_epochs) and step % (every_epochs * steps_per_epoch) == 0


def chosen(n: int, count: int) -> np.ndarray:
    """So many different numbers below n, int64, the same ones in every run.

    They are drawn, because every n-th sample of a list that goes round its classes would be of the same class.
    """
    return np.random.Generator(np.random.Philox(0)).permutation(n)[:count]


@lru_cache(maxsize=2)
def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order of a whole epoch, int64 [n], read-only."""
    order = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch]))).permutation(n)
    order.setflags(write=False)
    return order


def _samples(positions: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """The samples at `positions` of an epoch's order, int64 of the same shape, the caller's own."""
    if n <= PERMUTATION_LIMIT:
        return permutation(n, seed, epoch)[positions]
    return shuffled(positions.ravel(), n, seed, epoch).reshape(positions.shape)


def shuffled(positions: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """The samples at `positions` of an epoch's order, int64, without building the order."""
    keys = np.random.SeedSequence([seed, epoch]).generate_state(ROUNDS, np.uint64)
    return permuted(positions, np.array([n]), half_of(np.array([n])), keys[:, None])


def half_of(n: np.ndarray) -> np.ndarray:
    """Half the bits that numbers below `n` need, rounded up, at least 1: uint64 of the same shape [...]."""
    return np.array([max(1, -(-(int(one) - 1).bit_length() // 2)) for one in n], np.uint64)


def keys_of(rows: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Keys of `permuted`, uint64 [ROUNDS, count], for order `numbers` of row `rows`, int64 [count] each, from 0 on."""
    state = mix(mix(rows.astype(np.uint64) + np.uint64(1)) + numbers.astype(np.uint64))
    return mix(state + np.arange(1, ROUNDS + 1, dtype=np.uint64)[:, None] * np.uint64(0x9E3779B97F4A7C15))


def permuted(positions: np.ndarray, n: np.ndarray, half: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Where keyed bijections on [0, n) take `positions`, int64 [count].

    A Feistel network is a keyed bijection on [0, 2**(2 * half)), the least such range that holds n. A value that
    falls outside [0, n) is put in again until it falls inside (cycle walking; fewer than 4 rounds on average),
    which keeps it a bijection on [0, n). Source: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002.

    Args:
        positions: int64 [count].
        n: int64 [count], or [1] where all have the same; at most 2**62.
        half: what `half_of` gives for it.
        keys: uint64 [ROUNDS, count] or [ROUNDS, 1].
    """
    n, mask = n.astype(np.uint64), (np.uint64(1) << half) - np.uint64(1)
    values = positions.astype(np.uint64)
    left = np.arange(len(values))  # those that are outside as yet
    while len(left):
        below, bits, low, own = (of if of.shape[-1] == 1 else of[..., left] for of in (n, half, mask, keys))
        one, other = values[left] >> bits, values[left] & low
        for key in own:
            one, other = other, one ^ (mix(other + key) & low)
        values[left] = (one << bits) | other
        left = left[values[left] >= below]
    return values.astype(np.int64)


def mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: every output bit depends on every input bit. Source: Vigna, splitmix64.c, 2015."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True)
class Plan:
    """The steps of a run over `n` samples, and a rank's part of each: of whole groups of `group` samples.

    A rank's groups follow each other; or, if they are `dealt`, each is a micro-batch, and the ranks take them by turns.
    """

    n: int
    seed: int
    global_batch_size: int
    micro_batch_size: int | None
    drop_last: bool
    rank: int
    world_size: int
    group: int = 1
    dealt: bool = False

    @classmethod
    def of(cls, n: int, config: "Config", world: "World") -> "Plan":
        """The plan of a run's config for one data rank."""
        cfg, place = config.train, (world.data_rank, world.data_size)
        of = n, cfg.seed, cfg.global_batch_size, cfg.micro_batch_size, cfg.drop_last
        dealt = config.backend.reduce == "ordered"
        return cls(*of, *place, (cfg.micro_batch_size if dealt else group_of(config.model)) or 1, dealt)

    @cached_property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        return steps_per_epoch(self.n, self.global_batch_size, self.drop_last)

    @cached_property
    def whole_steps(self) -> int:
        """Of these, those with a batch that is not smaller."""
        return self.n // self.global_batch_size

    @cached_property
    def _whole_micro_batches(self) -> int:
        return self.pieces(self.global_batch_size)

    def pieces(self, count: int) -> int:
        """Micro-batches of a step with `count` samples over all ranks, on every rank."""
        return pieces(count, self.world_size, self.micro_batch_size, self.group)

    def batch_size(self, step: int) -> int:
        """Samples of a step of an epoch over all ranks."""
        return self.global_batch_size if step < self.whole_steps else self.n - step * self.global_batch_size

    def micro_batches(self, step: int) -> int:
        """Micro-batches of a step of an epoch, on every rank."""
        if step < self.whole_steps:
            return self._whole_micro_batches
        return self.pieces(self.batch_size(step))

    def sizes(self, first_step: int = 0) -> Iterator[tuple[int, int]]:
        """Samples over all ranks, and micro-batches, of each step of an epoch from `first_step` on."""
        return ((self.batch_size(step), self.micro_batches(step)) for step in range(first_step, self.steps_per_epoch))

    def indices(self, epoch: int, first_step: int = 0, before: int = 0) -> Iterator[np.ndarray]:
        """This rank's micro-batches from a step to the end of an epoch: int64 arrays, empty ones included.

        A step costs no more at any number of samples above PERMUTATION_LIMIT, or of ranks: only this rank's share of it
        is looked up.

        Args:
            epoch: counts from 0.
            first_step: of the epoch.
            before: so many samples more at the beginning of each micro-batch that is not empty: those that come before
                it in the global batch, whose first sample comes after its last.
        """
        places, cuts = self._places(self.global_batch_size, before)
        at_once = max(1, BLOCK // max(1, len(places)))
        for first in range(first_step, self.whole_steps, at_once):
            last = min(first + at_once, self.whole_steps)
            for row in self._block(epoch, first, last, places):
                for cut in cuts:
                    yield row[cut]
        ragged = self.n - self.whole_steps * self.global_batch_size
        if ragged and first_step <= self.whole_steps < self.steps_per_epoch:
            places, cuts = self._places(ragged, before)
            (row,) = self._block(epoch, self.whole_steps, self.whole_steps + 1, places)
            for cut in cuts:
                yield row[cut]

    def _places(self, count: int, before: int) -> tuple[np.ndarray, list[slice]]:
        """Of a batch of `count` samples the places that this rank looks up, those before its micro-batches among them;
        and where each micro-batch is in these."""
        parts = [
            np.arange(mine.start - before if mine.stop > mine.start else mine.stop, mine.stop)
            for mine in self._micro_batches(count)
        ]
        ends = np.cumsum([len(part) for part in parts]).tolist()
        return np.concatenate(parts) % count, [
            slice(end - len(part), end) for end, part in zip(ends, parts, strict=True)
        ]

    def _micro_batches(self, count: int) -> list[slice]:
        """The places of this rank's micro-batches in a batch of `count` samples."""
        number = self.pieces(count)
        if self.dealt:
            firsts = [(i * self.world_size + self.rank) * self.group for i in range(number)]
            return [slice(min(first, count), min(first + self.group, count)) for first in firsts]
        mine = share(count, self.rank, self.world_size, self.group)
        cuts = [share(mine.stop - mine.start, i, number, self.group) for i in range(number)]
        return [slice(mine.start + cut.start, mine.start + cut.stop) for cut in cuts]

    def _block(self, epoch: int, first: int, last: int, places: np.ndarray) -> np.ndarray:
        """The samples at some places of each batch from step `first` up to `last`: int64 [steps, places]."""
        starts = np.arange(first, last)[:, None] * self.global_batch_size
        return _samples(starts + places, self.n, self.seed, epoch)
