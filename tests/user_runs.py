"""Runs of the users in tests/users, and how far they are from one process: for test_users.py."""

import json
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

from dist_train.config.load import load
from dist_train.tools.agreement import FLOOR, Difference, Trajectory, beyond, difference, limit
from dist_train.tools.trajectory import rounding

import parity_cells
from zygote import Ended, Run, Zygote

HERE = Path(__file__).parent / "users"
USERS = sorted(path.stem for path in HERE.glob("*.yaml"))
KINKED = ("resnet18",)  # has ReLUs, of which rounding may turn one on
STEPS, SAVED_EVERY, KILLED_AT = 20, 6, 15
SAVED = KILLED_AT // SAVED_EVERY * SAVED_EVERY  # in the middle of an epoch
SMALL = {
    "train": {"device": "cpu", "threads": 1},
    "track": {"every_steps": 1},
    "checkpoint": {"every_steps": SAVED_EVERY},
}


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
    argv, script = ["--config", str(HERE / f"{user}.yaml")], None
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


@dataclass(frozen=True)
class Reference:
    """What a user gets on one process without micro-batches.

    Args:
        run: it.
        start: the weights that it starts from.
        precision: in which it is computed.
        allowed: how far from it rounding may take another run.
    """

    run: Trajectory
    start: dict[str, np.ndarray]
    precision: str
    allowed: Difference | float


def alone(users: Zygote, user: str, folder: Path, precision: str = "float32", **sections: dict) -> Reference:
    train = sections.pop("train", {}) | {"precision": precision, "micro_batch_size": None}
    keeping = train | {"hooks": ["user_hooks:Start"]}
    users.run(started(user, ALONE, folder, train=keeping, **sections))[0].check()
    start = numbers(folder / "start.pt")
    run, around = trajectory(folder, start), None
    if user in KINKED and precision == "float32":
        with patch.object(sys, "path", [str(HERE), *sys.path]):
            config = load(started(user, ALONE, folder, train=train, **sections).argv)
            around = rounding(config, parity_cells.ALONE, run)
    return Reference(run, start, precision, limit(precision, around))


def off(folder: Path, reference: Reference) -> str:
    """What of a run is further off its reference than rounding goes; empty if nothing is."""
    run, expected = trajectory(folder, reference.start), reference.run
    assert run.evaluation.keys() == expected.evaluation.keys() and "eval/loss" in run.evaluation
    try:
        found = beyond(difference(run, expected), reference.allowed)
    except ValueError as unlike:
        return str(unlike)
    for name in run.evaluation.keys() - {"eval/loss"}:  # which is looked at above
        got, value = run.evaluation[name], expected.evaluation[name]
        if not abs(got - value) <= FLOOR[reference.precision] * abs(value):
            found = found or f"{name}: got {got}, expected {value}"
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
