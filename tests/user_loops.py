"""Loops that a user writes on dist_train.session, as scripts: python user_loops.py NAME FOLDER [JSON]."""

import contextlib
import json
import os
import signal
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import dist_train

DATA = {"name": "synthetic", "args": {"n": 60, "n_test": 13, "shape": [1, 4, 4], "classes": 4}}
# 15 steps; shares of 5 and 7 samples and micro-batches of at most 2.
SETTINGS = {
    "train": {"global_batch_size": 12, "micro_batch_size": 2, "epochs": 3, "precision": "float64", "device": "cpu"},
    "checkpoint": {"every_steps": 4},
    "track": {"every_steps": 1},
}
NOISE = torch.randn(60, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def settings(folder: str, more: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    every = SETTINGS | {"run": {"dir": folder}}
    return every | {section: every.get(section, {}) | keys for section, keys in more.items()}


def whole(folder: str, **more: dict[str, Any]) -> dist_train.Outcome:
    """The package's own loop."""
    return dist_train.fit(settings(folder, more), data=DATA, model={"hidden": [9]})


def own(
    folder: str, act_at: int | None = None, act: str = "", unscaled: bool = False, **more: dict[str, Any]
) -> dist_train.Outcome:
    """The same work in a loop of the user's own. At a step something happens to it."""
    with dist_train.session(settings(folder, more), data=DATA, model={"hidden": [9]}) as run:
        for step in run.steps():
            for images, labels in step:
                loss = F.cross_entropy(run.model(images), labels, reduction="mean" if unscaled else "sum")
                step.backward(loss)
            step.update()
            if run.step == act_at and act != "leave":
                os.kill(os.getpid(), getattr(signal, act))
            if run.step == act_at and act == "leave":
                break
    assert run.outcome is not None
    return run.outcome


class Gan(nn.Module):
    """Two networks for pictures of 16 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 16))
        self.discriminator = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 1))


def judged(outputs: torch.Tensor, real: float) -> torch.Tensor:
    return F.binary_cross_entropy_with_logits(outputs, torch.full_like(outputs, real), reduction="sum")


def gan(folder: str, mixed: bool = False, kill_at: int | None = None, **more: dict[str, Any]) -> dist_train.Outcome:
    optimizers = {"discriminator": {"lr": 4e-3}, "generator": {"name": "SGD", "lr": 0.1}}
    given = settings(folder, more)
    with dist_train.session(given, data=DATA, model=Gan, task="none", optimizers=optimizers) as run:
        generator, discriminator = run.models["generator"], run.models["discriminator"]
        for step in run.steps():
            for batch in step:
                images, _ = batch
                made = generator(NOISE[batch.ids]).detach()
                loss = judged(discriminator(images.flatten(1)), 1.0) + judged(discriminator(made), 0.0)
                step.backward(loss, "discriminator")
            if not mixed:
                step.update("discriminator")
            for batch in step:
                step.backward(judged(discriminator(generator(NOISE[batch.ids])), 1.0), "generator")
            step.update("generator")
            if run.step == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
    assert run.outcome is not None
    return run.outcome


def contrastive(folder: str, worse_after: int = 99, **more: dict[str, Any]) -> dist_train.Outcome:
    """Each sample's output is told from all others of the global batch. Its evaluation is no better after a step."""
    with dist_train.session(settings(folder, more), data=DATA, model={"hidden": [9]}, task="none") as run:
        for step in run.steps():
            for batch in step:
                images, _ = batch
                outputs = run.model(images)
                every, first = run.gather(outputs, batch)
                targets = torch.arange(first, first + len(batch))
                likeness = outputs[: len(batch)] @ every.T
                step.backward(F.cross_entropy(likeness, targets, reduction="sum"))
            step.update()
            run.evaluated({"eval/loss": 1.0 / (1 + min(run.step, worse_after))})
    assert run.outcome is not None
    return run.outcome


def fails(folder: str, error: str) -> None:
    """A run on ranks of which the last one has a mistake."""

    class Raising(dist_train.Hook):
        def after_step(self, run: dist_train.Run) -> None:
            if run.step == 2 and run.world.rank == run.world.size - 1:
                if error == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise KeyError("a mistake of mine")

    dist_train.fit(settings(folder, {}), data=DATA, hooks=[Raising()], train={"max_steps": 10**6, "epochs": 10**6})


def refused(folder: str) -> None:
    dist_train.fit(settings(folder, {}), data=DATA, model=nn.Linear(16, 4))


def twice(folder: str) -> list[float]:
    """Runs after one another in the same processes, which join each time."""
    return [whole(f"{folder}/{name}", backend={"name": name}).metrics["eval/loss"] for name in ("ddp", "fsdp2")]


if __name__ == "__main__":
    name, folder, *rest = sys.argv[1:]
    with contextlib.suppress(BrokenPipeError):
        print(globals()[name](folder, **json.loads(rest[0] if rest else "{}")))
