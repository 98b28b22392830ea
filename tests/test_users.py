"""The promise, for ten users' own work: each trains as on one process, on any backend and number of ranks, and goes on
after a kill under another.

What a user brings is in tests/users: a module, and a config beside it. The global batch of 7 divides by no number of
ranks here, and the last step of an epoch has 2 samples, so that one of 3 ranks has none.
"""

import json
import signal
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from dist_train.tools.agreement import FLOOR, Trajectory, beyond, difference, limit

from zygote import Ended, Run, Zygote

HERE = Path(__file__).parent / "users"
USERS = sorted(path.stem for path in HERE.glob("*.yaml"))
STEPS, SAVED_EVERY, KILLED_AT = 20, 6, 15
SAVED = KILLED_AT // SAVED_EVERY * SAVED_EVERY  # in the middle of an epoch
SMALL = {
    "train": {"device": "cpu", "threads": 1},
    "track": {"every_steps": 1},
    "checkpoint": {"every_steps": SAVED_EVERY},
}
# Imported before the fork: what these users' runs need beside others'.
LIBRARIES = ("dist_train.backends.accelerate", "dist_train.backends.deepspeed", "accelerate", "deepspeed", "peft")
LIBRARIES += (
    "deepspeed.runtime.zero.muon.original_muon",
    "torchvision.models",
    "transformers.models.bert.modeling_bert",
)
LIBRARIES += tuple(
    f"dist_train.tasks.{name}" for name in ("classification", "multi_label", "regression", "segmentation")
)


@dataclass(frozen=True)
class Place:
    """A backend, on how many ranks; DeepSpeed's with its stage."""

    backend: str
    ranks: int

    @property
    def keys(self) -> dict[str, str | int]:
        name, _, stage = self.backend.partition(":") if self.backend.startswith("deepspeed") else (self.backend, "", "")
        return {"name": name} | ({"zero_stage": int(stage)} if stage else {})

    def __str__(self) -> str:
        return f"{self.backend} on {self.ranks}"


ALONE = Place("single", 1)
BACKENDS = ("ddp", "fsdp2", "deepspeed:2", "deepspeed:3", "accelerate")
PLACES = [Place(backend, ranks) for backend in BACKENDS for ranks in (1, 2, 3)]


def started(
    user: str, place: Place, folder: Path, killed_at: int | None = None, plant: tuple = (), **sections: dict
) -> Run:
    """A user's run in a folder, which begins there or goes on.

    Args:
        user: whose.
        place: where it trains.
        folder: of the run.
        killed_at: the step before which rank 0 is killed, and then the others.
        plant: what is planted in each rank else.
        **sections: more keys of the config.
    """
    keys = {name: SMALL.get(name, {}) | sections.get(name, {}) for name in SMALL | sections}
    keys |= {"backend": place.keys, "run": {"dir": str(folder)}}
    argv, script = ["--config", f"{user}.yaml"], None
    for path, value in ((f"--{section}.{key}", value) for section, of in keys.items() for key, value in of.items()):
        argv += [path, value if isinstance(value, str) else json.dumps(value)]
    if user == "own_loop":  # she starts it herself
        argv, script = [json.dumps(keys)], str(HERE / "own_loop.py")
    plants = dict.fromkeys(range(place.ranks), plant) if plant else {}
    if killed_at is not None:
        plants[0] = ("at_phase", "data", killed_at, "kill")
    places = {"cwd": str(HERE), "script": script, "launched": place != ALONE}
    return Run(argv, place.ranks, plants, kill_all=True, timeout_s=120, **places)


def trajectory(folder: Path, start: dict[str, np.ndarray]) -> Trajectory:
    """What a finished run has left in its folder."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    summary = json.loads((folder / "summary.json").read_text())
    end = numbers(folder / "weights.pt")
    weights = {name: value for name, value in end.items() if name in start}
    return Trajectory(
        [line["train/loss"] for line in steps],
        [line["train/grad_norm"] for line in steps],
        weights,
        {name: value for name, value in summary.items() if name.startswith("eval/")},
        0.0,
        float(np.linalg.norm([np.linalg.norm(value - start[name]) for name, value in weights.items()])),
        {name: value for name, value in end.items() if name not in start},
    )


def numbers(file: Path) -> dict[str, np.ndarray]:
    return {name: value.double().numpy() for name, value in torch.load(file, weights_only=True).items()}


@pytest.fixture(scope="module")
def users():
    """The process that runs of these users are forked from."""
    process = Zygote(*LIBRARIES)
    yield process
    process.close()


@dataclass(frozen=True)
class Reference:
    """What a user gets on one process without micro-batches, and the weights that the run starts from."""

    run: Trajectory
    start: dict[str, np.ndarray]


def alone(users: Zygote, user: str, folder: Path, **sections: dict) -> Reference:
    whole = {"micro_batch_size": None, "hooks": ["user_hooks:Start"]}
    train = SMALL["train"] | sections.pop("train", {}) | whole
    users.run(started(user, ALONE, folder, train=train, **sections))[0].check()
    start = numbers(folder / "start.pt")
    return Reference(trajectory(folder, start), start)


@pytest.fixture(scope="module")
def reference(users: Zygote, tmp_path_factory: pytest.TempPathFactory):
    """A function from a user to her reference."""
    return cache(lambda user: alone(users, user, tmp_path_factory.mktemp(user) / "run"))


def off(folder: Path, reference: Reference) -> str:
    """What of a run is further off its reference than rounding goes; empty if nothing is."""
    run, expected = trajectory(folder, reference.start), reference.run
    assert run.evaluation.keys() == expected.evaluation.keys() and "eval/loss" in run.evaluation
    try:
        found = beyond(difference(run, expected), limit("float32"))
    except ValueError as unlike:
        return str(unlike)
    for name, value in run.evaluation.items():
        if not abs(value - expected.evaluation[name]) <= FLOOR["float32"] * abs(expected.evaluation[name]):
            return found or f"{name}: got {value}, expected {expected.evaluation[name]}"
    return found


def killed_and_resumed(
    users: Zygote, user: str, first: Place, second: Place, folder: Path, plant: tuple = (), **sections: dict
) -> Ended:
    """A run that is killed with a signal under the one, and goes on under the other, where something is planted."""
    (killed,) = users.run(started(user, first, folder, killed_at=KILLED_AT, **sections))
    assert killed.codes[0] == -signal.SIGKILL and 0 not in killed.codes, killed
    (ended,) = users.run(started(user, second, folder, plant=plant, **sections))
    assert f"step-{SAVED:08d}: step {SAVED}, written by {first.keys['name']}" in ended.check().out[0]
    return ended


# -- killed, and gone on elsewhere: the trajectory of both parts -------------------------------------------------------

CHAINS = {
    "adapters": (Place("deepspeed:3", 1), Place("fsdp2", 2)),
    "contrastive": (Place("ddp", 3), Place("fsdp2", 2)),
    "frozen_encoder": (Place("deepspeed:3", 2), Place("ddp", 1)),
    "multi_label": (Place("accelerate", 3), Place("deepspeed:2", 2)),
    "own_loop": (ALONE, Place("fsdp2", 3)),
    "regression": (Place("deepspeed:2", 3), Place("accelerate", 2)),
    "resnet18": (Place("fsdp2", 1), Place("ddp", 2)),
    "segmentation": (Place("deepspeed:2", 1), Place("ddp", 3)),
    "sequences": (Place("accelerate", 1), Place("deepspeed:3", 3)),
    "vision_transformer": (Place("deepspeed:2", 2), Place("fsdp2", 3)),
}


def test_these_are_all_users_and_places():
    assert list(CHAINS) == USERS and len(USERS) == 10
    assert {place for chain in CHAINS.values() for place in chain} == {ALONE, *PLACES}


@pytest.mark.parametrize("user", USERS)
def test_a_run_that_is_killed_goes_on_elsewhere(user: str, users: Zygote, reference, tmp_path: Path):
    killed_and_resumed(users, user, *CHAINS[user], tmp_path / "run")
    assert not off(tmp_path / "run", reference(user))


@pytest.mark.full
@pytest.mark.parametrize("user", USERS)
def test_and_the_other_way_round(user: str, users: Zygote, reference, tmp_path: Path):
    killed_and_resumed(users, user, *reversed(CHAINS[user]), tmp_path / "run")
    assert not off(tmp_path / "run", reference(user))


@pytest.mark.full
@pytest.mark.parametrize("place", [ALONE, *PLACES], ids=str)
@pytest.mark.parametrize("user", USERS)
def test_a_user_s_run_is_the_same_everywhere(user: str, place: Place, users: Zygote, reference, tmp_path: Path):
    users.run(started(user, place, tmp_path / "run"))[0].check()
    assert not off(tmp_path / "run", reference(user))


# -- ranks that are left -----------------------------------------------------------------------------------------------

# The last step of an epoch has 3 samples, so that most ranks have none.
MANY = {"data": {"args": {"n": 39, "n_test": 13}}, "train": SMALL["train"] | {"global_batch_size": 9}}
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
    assert off(tmp_path / "run", reference(user)).startswith(said)


def test_a_group_s_learning_rate_that_is_lost_at_a_resume_is_seen(users: Zygote, reference, tmp_path: Path):
    lost = ("other_backend", "single", "optim_cells:RatesLost")
    killed_and_resumed(users, "vision_transformer", ALONE, ALONE, tmp_path / "run", lost)
    assert off(tmp_path / "run", reference("vision_transformer")).startswith(f"loss of step {SAVED + 2} ")
