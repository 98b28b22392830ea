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

from dist_train.tools.agreement import Trajectory, beyond, difference, limit

from zygote import Ended, Run, Zygote

HERE = Path(__file__).parent / "users"
USERS = sorted(path.stem for path in HERE.glob("*.yaml"))
STEPS, SAVED_EVERY = 25, 4
SMALL = {
    "train": {"device": "cpu", "threads": 1},
    "track": {"every_steps": 1},
    "checkpoint": {"every_steps": SAVED_EVERY},
}
# Imported before the fork: what these users' runs need beside others'.
LIBRARIES = ("dist_train.backends.accelerate", "dist_train.backends.deepspeed", "accelerate", "deepspeed", "peft")
LIBRARIES += ("torchvision.models", "transformers.models.bert.modeling_bert")


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


def started(user: str, place: Place, folder: Path, killed_at: int | None = None, **sections: dict) -> Run:
    """A user's run in a folder, which begins there or goes on.

    Args:
        user: whose.
        place: where it trains.
        folder: of the run.
        killed_at: the step before which all of its ranks are killed.
        **sections: more keys of the config.
    """
    keys = {name: SMALL.get(name, {}) | sections.get(name, {}) for name in SMALL | sections}
    keys |= {"backend": place.keys, "run": {"dir": str(folder)}}
    argv = ["--config", f"{user}.yaml"]
    for path, value in ((f"--{section}.{key}", value) for section, of in keys.items() for key, value in of.items()):
        argv += [path, value if isinstance(value, str) else json.dumps(value)]
    script = None
    if user == "own_loop":  # she starts it herself
        argv, script = [json.dumps(keys)], str(HERE / "own_loop.py")
    plant = None if killed_at is None else {0: ("at_phase", "data", killed_at, "kill")}
    return Run(argv, place.ranks, plant, kill_all=True, cwd=str(HERE), script=script, launched=place != ALONE)


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


@pytest.fixture(scope="module")
def reference(users: Zygote, tmp_path_factory: pytest.TempPathFactory):
    """A function from a user to what she gets on one process without micro-batches, and the weights at its start."""

    @cache
    def of(user: str) -> tuple[Trajectory, dict[str, np.ndarray]]:
        folder = tmp_path_factory.mktemp(user) / "run"
        whole = {"micro_batch_size": None, "hooks": ["user_hooks:Start"]}
        users.run(started(user, ALONE, folder, train=SMALL["train"] | whole))[0].check()
        start = numbers(folder / "start.pt")
        return trajectory(folder, start), start

    return of


def off(folder: Path, of: tuple[Trajectory, dict[str, np.ndarray]]) -> str:
    """What of a run is further off its reference than rounding goes; empty if nothing is."""
    expected, start = of
    run = trajectory(folder, start)
    assert run.evaluation.keys() == expected.evaluation.keys() and "eval/loss" in run.evaluation
    for name, value in run.evaluation.items():
        if not abs(value - expected.evaluation[name]) <= 1e-5 * abs(expected.evaluation[name]):
            return f"{name}: got {value}, expected {expected.evaluation[name]}"
    return beyond(difference(run, expected), limit("float32"))


def killed_and_resumed(users: Zygote, user: str, first: Place, second: Place, folder: Path) -> Ended:
    """A run that is killed with a signal under the one, and goes on under the other."""
    (killed,) = users.run(started(user, first, folder, killed_at=KILLED_AT))
    assert killed.codes[0] == -signal.SIGKILL and 0 not in killed.codes, killed
    (ended,) = users.run(started(user, second, folder))
    assert f"step-{SAVED:08d}: step {SAVED}, written by {first.keys['name']}" in ended.check().out[0]
    return ended


# -- killed, and gone on elsewhere: the trajectory of both parts -------------------------------------------------------

KILLED_AT, SAVED = 15, 12
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
