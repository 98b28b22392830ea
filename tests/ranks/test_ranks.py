"""The harness itself: its failures must show, and leave nothing."""

import os
import time

import pytest
import torch
import torch.distributed as torch_dist

from workers import WORKERS, RankError, run_ranks


def total(values: list[int]) -> tuple[int, float, int]:
    mine = torch.tensor(float(values[torch_dist.get_rank()]))
    torch_dist.all_reduce(mine)
    return torch_dist.get_rank(), float(mine), os.getpid()


def raise_on_rank(rank: int) -> None:
    if torch_dist.get_rank() == rank:
        raise RuntimeError("planted")
    torch_dist.barrier()


def hang_on_rank(rank: int) -> None:
    if torch_dist.get_rank() == rank:
        time.sleep(3600)


def die_on_rank(rank: int) -> None:
    if torch_dist.get_rank() == rank:
        os._exit(7)
    torch_dist.barrier()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_each_rank_answers(world_size: int):
    answers = run_ranks(total, world_size, [1, 2, 3, 4])
    assert [a[:2] for a in answers] == [(r, sum(range(1, world_size + 1))) for r in range(world_size)]


def test_workers_stay_alive():
    assert [a[2] for a in run_ranks(total, 2, [0, 0])] == [a[2] for a in run_ranks(total, 2, [0, 0])]


@pytest.mark.parametrize(
    ("fault", "shown"),
    [(raise_on_rank, "rank 1 of 2 raised(.|\n)*planted"), (die_on_rank, "rank [01]"), (hang_on_rank, "hang_on_rank")],
)
def test_a_failure_shows_and_leaves_nothing(fault, shown: str):
    with pytest.raises(RankError, match=shown):
        run_ranks(fault, 2, 1, timeout_s=3 if fault is hang_on_rank else 60)
    assert not WORKERS[2].processes
    assert run_ranks(total, 2, [1, 1])[0][1] == 2
