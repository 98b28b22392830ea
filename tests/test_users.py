"""The promise, for ten users' own work: each trains as on one process, on any backend and number of ranks, and goes on
after a kill under another.

What a user brings is in tests/users: a module, and a config beside it. The global batch of 7 divides by no number of
ranks here, and the last step of an epoch has 2 samples, so that one of 3 ranks has none.
"""

from functools import cache
from pathlib import Path

import pytest

from user_runs import ALONE, KINKED, SAVED, USERS, Place, alone, killed_and_resumed, off, started
from zygote import Zygote

BACKENDS = ("ddp", "fsdp2", "deepspeed:2", "deepspeed:3", "accelerate")
PLACES = [Place(backend, ranks) for backend in BACKENDS for ranks in (1, 2, 3)]


@pytest.fixture(scope="module")
def users(with_libraries: Zygote):
    """The process that runs of these users are forked from."""
    return with_libraries


@pytest.fixture(scope="module")
def reference(users: Zygote, tmp_path_factory: pytest.TempPathFactory):
    """A function from a user, and a precision, to what she gets on one process."""
    return cache(lambda user, precision: alone(users, user, tmp_path_factory.mktemp(user) / "run", precision))


# -- killed, and gone on elsewhere: the trajectory of both parts -------------------------------------------------------

CHAINS = {
    "adapters": (Place("deepspeed:3", 1), Place("fsdp2", 2)),
    "contrastive": (Place("ddp", 3), Place("accelerate", 2)),
    "frozen_encoder": (Place("deepspeed:3", 2), Place("ddp", 1)),
    "multi_label": (Place("accelerate", 3), Place("deepspeed:2", 1)),
    "own_loop": (ALONE, Place("fsdp2", 2)),
    "regression": (Place("deepspeed:2", 3), Place("accelerate", 1)),
    "resnet18": (Place("ddp", 2), ALONE),
    "segmentation": (Place("fsdp2", 1), Place("ddp", 2)),
    "sequences": (Place("accelerate", 1), Place("deepspeed:3", 3)),
    "vision_transformer": (Place("deepspeed:2", 2), Place("fsdp2", 3)),
}


def test_these_are_all_users_and_places():
    assert list(CHAINS) == USERS and len(USERS) == 10
    assert {place for chain in CHAINS.values() for place in chain} == {ALONE, *PLACES}


@pytest.mark.parametrize("user", USERS)
def test_a_run_that_is_killed_goes_on_elsewhere(user: str, users: Zygote, reference, tmp_path: Path):
    """Where rounding would have to be measured first, in float64."""
    precision = "float64" if user in KINKED else "float32"
    killed_and_resumed(users, user, *CHAINS[user], tmp_path / "run", train={"precision": precision})
    assert not off(tmp_path / "run", reference(user, precision))


@pytest.mark.full
@pytest.mark.parametrize("user", USERS)
def test_and_the_other_way_round(user: str, users: Zygote, reference, tmp_path: Path):
    killed_and_resumed(users, user, *reversed(CHAINS[user]), tmp_path / "run")
    assert not off(tmp_path / "run", reference(user, "float32"))


@pytest.mark.full
@pytest.mark.parametrize("place", [ALONE, *PLACES], ids=str)
@pytest.mark.parametrize("user", USERS)
def test_a_user_s_run_is_the_same_everywhere(user: str, place: Place, users: Zygote, reference, tmp_path: Path):
    users.run(started(user, place, tmp_path / "run"))[0].check()
    assert not off(tmp_path / "run", reference(user, "float32"))


@pytest.mark.full
@pytest.mark.parametrize("user", USERS)
def test_in_float64_nothing_but_the_last_digits_differs(user: str, users: Zygote, reference, tmp_path: Path):
    for place in (Place("ddp", 3), Place("fsdp2", 2), Place("fsdp2", 3), Place("accelerate", 2)):
        users.run(started(user, place, tmp_path / str(place), train={"precision": "float64"}))[0].check()
        assert not off(tmp_path / str(place), reference(user, "float64")), place


# -- ranks that are left -----------------------------------------------------------------------------------------------

# The last step of an epoch has 3 samples, so that most ranks have none.
MANY = {"data": {"args": {"n": 39, "n_test": 13}}, "train": {"global_batch_size": 9}}
PAIRS = (("fsdp2", "ddp"), ("fsdp2", "fsdp2"), ("deepspeed:2", "deepspeed:3"), ("deepspeed:3", "accelerate"))


@pytest.mark.parametrize(
    ("first", "second"), [("ddp", "fsdp2"), *(pytest.param(*pair, marks=pytest.mark.full) for pair in PAIRS)]
)
def test_eight_ranks_go_on_as_the_seven_that_are_left(first: str, second: str, users: Zygote, tmp_path: Path):
    killed_and_resumed(users, "regression", Place(first, 8), Place(second, 7), tmp_path / "run", **MANY)
    assert not off(tmp_path / "run", alone(users, "regression", tmp_path / "alone", **MANY))


# -- planted faults ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("user", "place", "plant", "said"),
    [
        ("sequences", Place("ddp", 2), ("units_by_rank",), "loss of step 1 "),
        ("sequences", Place("ddp", 2), ("metrics_by_rank",), "loss of the evaluation "),
        (
            "vision_transformer",
            Place("fsdp2", 2),
            ("other_backend", "fsdp2", "optim_cells:AnothersShard"),
            "loss of the evaluation ",
        ),
        ("vision_transformer", ALONE, ("fact_to_another", "classes", "layers"), "buffers: got {'encoder.layers."),
    ],
    ids=["units by rank", "metrics by rank", "another's shard", "a fact to another argument"],
)
def test_a_planted_fault_is_seen(
    user: str, place: Place, plant: tuple, said: str, users: Zygote, reference, tmp_path: Path
):
    users.run(started(user, place, tmp_path / "run", plant=plant))[0].check()
    assert off(tmp_path / "run", reference(user, "float32")).startswith(said)


def test_a_group_s_learning_rate_that_is_lost_at_a_resume_is_seen(users: Zygote, reference, tmp_path: Path):
    lost = ("other_backend", "single", "optim_cells:RatesLost")
    killed_and_resumed(users, "vision_transformer", ALONE, ALONE, tmp_path / "run", lost)
    assert off(tmp_path / "run", reference("vision_transformer", "float32")).startswith(f"loss of step {SAVED + 2} ")
