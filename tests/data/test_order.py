"""Which samples make up a step: every sample once an epoch, the same global batches for every world size."""

import dataclasses
import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_train.config.tree import TrainConfig
from dist_train.data import order
from dist_train.data.order import (
    EVALUATED,
    Plan,
    evaluated_at_once,
    global_indices,
    largest_piece,
    pieces,
    share,
    shuffled,
    steps_per_epoch,
)

sizes = st.integers(1, 300)
seeds = st.integers(0, 2**63 - 1)


def plan(
    n: int, batch: int, rank: int, world: int, micro: int | None = None, drop_last: bool = False, group: int = 1
) -> Plan:
    return Plan(n, 3, batch, micro, drop_last, rank, world, group)


@given(n=sizes, seed=seeds, epoch=st.integers(0, 1000), batch=sizes)
def test_every_sample_once_an_epoch(n: int, seed: int, epoch: int, batch: int):
    steps = [global_indices(n, seed, epoch, k, batch) for k in range(steps_per_epoch(n, batch))]
    assert sorted(np.concatenate(steps)) == list(range(n))
    assert all(len(s) == batch for s in steps[:-1]) and 1 <= len(steps[-1]) <= batch


@given(n=sizes, batch=sizes)
def test_drop_last_leaves_out_only_the_smaller_batch(n: int, batch: int):
    steps = [global_indices(n, 0, 0, k, batch, drop_last=True) for k in range(steps_per_epoch(n, batch, True))]
    assert all(len(s) == batch for s in steps) and len(steps) == n // batch
    with pytest.raises(IndexError):
        global_indices(n, 0, 0, len(steps), batch, drop_last=True)


@given(n=st.integers(1, 5000), seed=seeds, epoch=st.integers(0, 1000))
def test_the_computed_order_is_a_permutation_too(n: int, seed: int, epoch: int):
    assert sorted(shuffled(np.arange(n), n, seed, epoch)) == list(range(n))


@given(count=st.integers(0, 500), world=st.integers(1, 70))
def test_shares_are_disjoint_complete_and_even(count: int, world: int):
    shares = [list(range(count))[share(count, rank, world)] for rank in range(world)]
    assert list(itertools.chain(*shares)) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@settings(deadline=None)
@given(n=sizes, batch=sizes, world=st.integers(1, 9), micro=st.none() | st.integers(1, 40), epoch=st.integers(0, 5))
def test_ranks_together_take_the_global_batches(n: int, batch: int, world: int, micro: int | None, epoch: int):
    """At any world size, n < world size included, and in the order that one rank takes them."""
    alone = plan(n, batch, 0, 1)
    ranks = [plan(n, batch, rank, world, micro) for rank in range(world)]
    streams = [p.indices(epoch) for p in ranks]
    for step, whole in enumerate(alone.indices(epoch)):
        counts = {p.micro_batches(step) for p in ranks}
        assert len(counts) == 1  # a collective in every micro-batch
        parts = [[next(stream) for _ in range(*counts)] for stream in streams]
        assert np.concatenate([np.concatenate(p) for p in parts]).tolist() == whole.tolist()
        assert len(whole) == alone.batch_size(step)
        if micro is not None:
            assert max(len(piece) for p in parts for piece in p) <= micro
    assert all(next(stream, None) is None for stream in streams)


@given(n=sizes, batch=sizes, data=st.data())
def test_seek_gives_the_rest_of_the_epoch(n: int, batch: int, data: st.DataObject):
    whole = list(plan(n, batch, 0, 1).indices(4))
    first = data.draw(st.integers(0, len(whole)))
    assert [b.tolist() for b in plan(n, batch, 0, 1).indices(4, first)] == [b.tolist() for b in whole[first:]]


def test_epochs_and_seeds_differ():
    orders = {tuple(global_indices(50, seed, epoch, 0, 50)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


@pytest.mark.parametrize("step", [0, 10**6, 10**12 // 256 - 1])
def test_seek_in_a_trillion_samples_needs_no_memory(step: int):
    tracemalloc.start()
    try:
        batch = global_indices(10**12, 1, 2, step, 256)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(set(batch.tolist())) == 256 and batch.min() >= 0 and batch.max() < 10**12
    assert peak_bytes < 1 << 20


def test_a_trillion_samples_neighbouring_steps_do_not_overlap():
    rows = [global_indices(10**12, 0, 0, k, 10_000) for k in (0, 1, 10**8 - 1)]
    assert len(set(np.concatenate(rows).tolist())) == 30_000


# -- 10^12 samples and 10^5 ranks --------------------------------------------------------------------------------------

TRILLION, RANKS = 10**12, 10**5
STEP_SAMPLES = 3_200_017  # 32 a rank, and 33 for 17 of them


def test_shares_of_a_hundred_thousand_ranks():
    """Of a whole batch, of the epoch's smaller last one, and of one with fewer samples than ranks."""
    ragged = TRILLION % STEP_SAMPLES
    for count in (STEP_SAMPLES, ragged, 99_999):
        shares = [share(count, rank, RANKS) for rank in range(RANKS)]
        assert shares[0].start == 0 and shares[-1].stop == count
        assert all(a.stop == b.start for a, b in itertools.pairwise(shares))
        assert {s.stop - s.start for s in shares} == {count // RANKS, count // RANKS + 1}


@pytest.mark.parametrize("rank", [0, 1, 49_999, 77_777, RANKS - 1])
@pytest.mark.parametrize("step", [0, 1, 12_345, TRILLION // STEP_SAMPLES - 1, TRILLION // STEP_SAMPLES])
def test_a_rank_of_many_takes_its_share_of_the_global_batch(rank: int, step: int):
    """A seek anywhere in an epoch, the smaller last batch included. The batch's order is computed place by place."""
    mine = next(plan(TRILLION, STEP_SAMPLES, rank, RANKS).indices(4, step))
    batch = min(STEP_SAMPLES, TRILLION - step * STEP_SAMPLES)
    part = share(batch, rank, RANKS)
    places = step * STEP_SAMPLES + np.arange(part.start, part.stop)
    assert mine.tolist() == shuffled(places, TRILLION, 3, 4).tolist()


def test_all_ranks_together_take_a_step_of_a_trillion():
    whole = global_indices(TRILLION, 3, 4, 77, 6_007)
    parts = [next(plan(TRILLION, 6_007, rank, 1000).indices(4, 77)) for rank in range(1000)]
    assert np.concatenate(parts).tolist() == whole.tolist() and len(set(whole.tolist())) == 6_007
    assert {len(part) for part in parts} == {6, 7}


def price(n: int, world: int, step: int) -> tuple[int, int]:
    """Of taking a rank's next two micro-batches of 32: samples looked up, and the most bytes that it needed."""
    looked_up = []

    def counted(positions: np.ndarray, *of) -> np.ndarray:
        looked_up.append(positions.size)
        return shuffle(positions, *of)

    shuffle, order.shuffled = order.shuffled, counted
    tracemalloc.start()
    try:
        stream = plan(n, 32 * world, 0, world).indices(0, step)
        next(stream), next(stream)
        return sum(looked_up), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        order.shuffled = shuffle


def test_the_price_depends_on_neither_samples_nor_ranks_nor_step():
    """Counted in samples that are looked up, a block, and in bytes: cycle walking takes a few rounds more or less."""
    few, bytes_ = price(1 << 21, 2, 0)
    assert few == order.BLOCK
    for n, world, step in [(TRILLION, 2, 0), (TRILLION, RANKS, 0), (TRILLION, RANKS, 300_000), (2**62, RANKS, 10**11)]:
        samples, peak_bytes = price(n, world, step)
        assert samples == few and 0.8 < peak_bytes / bytes_ < 1.25, (n, world, step, peak_bytes, bytes_)


def test_the_order_does_not_change_between_versions():
    """A checkpoint's cursor means the same samples in every later version."""
    assert global_indices(100, 0, 0, 0, 8).tolist() == SMALL
    assert global_indices(10**12, 0, 0, 0, 4).tolist() == LARGE


SMALL = [7, 40, 51, 86, 18, 78, 68, 52]
LARGE = [655737788959, 517875122002, 112425058571, 861729506499]


def chi_square(shuffle, n: int, draws: int = 4000) -> float:
    """How unevenly a shuffle spreads: the larger of two statistics per degree of freedom, near 1 for a fair one.

    One looks at where the samples 0..n-1 land over many epochs, the other at the distance between neighbours.
    """
    places, gaps = np.zeros((n, n)), np.zeros(n)
    for epoch in range(draws):
        rows = shuffle(np.arange(n), n, 11, epoch)
        places[np.arange(n), rows] += 1
        gaps += np.bincount(np.diff(rows) % n, minlength=n)
    by_place = ((places - draws / n) ** 2 / (draws / n)).sum() / (n - 1) ** 2
    by_gap = ((gaps[1:] - draws) ** 2 / draws).sum() / (n - 2)  # n - 1 gaps a draw, over n - 1 values: never 0
    return max(by_place, by_gap)


def rotated(positions: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """A bad shuffle that still is a permutation, and puts each sample everywhere equally often."""
    return (positions + np.random.default_rng([seed, epoch]).integers(n)) % n


def one_round(positions: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Our own shuffle with a single round: half of each number stays as it is."""
    kept, order.ROUNDS = order.ROUNDS, 1
    try:
        return shuffled(positions, n, seed, epoch)
    finally:
        order.ROUNDS = kept


@pytest.mark.parametrize("n", [16, 37, 100])
def test_the_computed_order_is_uniform(n: int):
    assert chi_square(shuffled, n) < 1.6


@pytest.mark.parametrize("bad", [rotated, one_round])
def test_the_uniformity_check_fails_a_bad_shuffle(bad):
    assert chi_square(bad, 37) > 3


def test_pieces_keep_to_the_limit():
    assert [pieces(64, 4, m) for m in (None, 16, 15, 8, 1)] == [1, 1, 2, 2, 16]
    assert pieces(1, 4, 1) == pieces(0, 4, 1) == 1


@given(
    n=sizes,
    batch=st.integers(1, 60),
    world=st.integers(1, 6),
    group=st.integers(1, 9),
    groups=st.integers(1, 4) | st.none(),
)
def test_groups_are_cut_by_nobody(n: int, batch: int, world: int, group: int, groups: int | None):
    """Each micro-batch of each rank is of whole groups of its step, and together they are the step in its order."""
    micro = None if groups is None else groups * group
    of_ranks = [plan(n, batch, rank, world, micro, group=group) for rank in range(world)]
    batches = [iter(each.indices(0)) for each in of_ranks]
    for step in range(of_ranks[0].steps_per_epoch):
        found, count = [], of_ranks[0].batch_size(step)
        for each in batches:
            for mine in itertools.islice(each, of_ranks[0].micro_batches(step)):
                assert not len(mine) or len(found) % group == 0
                assert len(mine) <= min(micro or batch, largest_piece(count, world, micro, group))
                found += list(mine)
        assert found == list(global_indices(n, 3, 0, step, batch))
    assert all(next(each, None) is None for each in batches)


def test_an_evaluation_takes_what_fits_in_memory():
    cfg = TrainConfig(global_batch_size=64)
    small, logits = 4 * (28 * 28 + 10), 8 * 1024 + 4 * 1024 * 50_000  # of a picture; of a window of text
    assert evaluated_at_once(cfg, 4, small) == EVALUATED
    assert evaluated_at_once(cfg, 4, logits) == 16  # the share of a rank
    assert evaluated_at_once(dataclasses.replace(cfg, micro_batch_size=3), 4, logits) == 3
    assert evaluated_at_once(cfg, 1, 1 << 19) == 64
    assert evaluated_at_once(dataclasses.replace(cfg, eval_batch_size=5), 1, logits) == 5
