"""Hooks that a user brings, in a module of their own."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import dist_train


class Ledger(dist_train.Hook):
    """Counts the steps and evaluations that it saw, and writes what it was called with on each rank."""

    def __init__(self, every_steps: int = 1):
        self.every_steps, self.calls, self.steps = every_steps, [], 0

    def start(self, run: dist_train.Run) -> None:
        self.calls.append(["start", run.step])

    def after_step(self, run: dist_train.Run) -> None:
        self.steps += 1
        self.calls.append(["after_step", run.step])
        if run.step == 6:
            run.log({"train/seen": torch.tensor(self.steps)})

    def after_evaluation(self, run: dist_train.Run, metrics: Mapping[str, float]) -> None:
        assert metrics["eval/loss"] == run.metrics["eval/loss"]
        self.calls.append(["after_evaluation", run.step])

    def end(self, run: dist_train.Run) -> None:
        self.calls.append(["end", run.step])
        told = {"calls": self.calls, "steps": self.steps, "stopped": run.stopped, "epoch": run.epoch}
        Path(run.folder / f"ledger{run.world.rank}.json").write_text(json.dumps(told))

    def state(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load(self, state: Mapping[str, Any]) -> None:
        assert type(state["steps"]) is int
        self.calls.append(["load", state["steps"]])
        self.steps = state["steps"]


class Average(dist_train.Hook):
    """A running mean of the weights, of each rank's own shard; at the end all of it, by rank 0."""

    name = "average"

    def start(self, run: dist_train.Run) -> None:
        self.weights = {name: p.detach().clone() for name, p in self._of(run)}

    @staticmethod
    def _of(run: dist_train.Run) -> list[tuple[str, torch.Tensor]]:
        return [(name.removeprefix("module."), p) for name, p in run.model.named_parameters()]

    def after_step(self, run: dist_train.Run) -> None:
        with torch.no_grad():
            for name, p in self._of(run):
                self.weights[name].lerp_(p, 0.1)

    def end(self, run: dist_train.Run) -> None:
        whole = {n: w.full_tensor() if hasattr(w, "full_tensor") else w for n, w in self.weights.items()}
        if run.world.is_main:
            torch.save(whole, run.folder / "average.pt")

    def state(self) -> dict[str, torch.Tensor]:
        return self.weights

    def load(self, state: Mapping[str, Any]) -> None:
        for name, value in state.items():
            if value is not self.weights[name]:  # a shard was filled in place
                self.weights[name].copy_(value)


class Forgetful(Average):
    """Takes nothing from a checkpoint."""

    def load(self, state: Mapping[str, Any]) -> None:
        self.weights = {name: torch.zeros_like(value) for name, value in self.weights.items()}


class Stopping(dist_train.Hook):
    """The last rank alone wants to stop."""

    stops = True

    def __init__(self, step: int):
        self.step = step

    def after_step(self, run: dist_train.Run) -> None:
        if run.step == self.step and run.world.rank == run.world.size - 1:
            run.stop("enough is enough")


class Undeclared(Stopping):
    stops = False


class Raising(dist_train.Hook):
    def after_step(self, run: dist_train.Run) -> None:
        if run.step == 3 and run.world.rank == run.world.size - 1:
            raise ValueError("a mistake of mine")


class Unfit(dist_train.Hook):
    """State that no checkpoint holds."""

    def state(self) -> dict[str, Any]:
        return {"words": "text"}


class NoHook:
    def after_step(self, run: Any) -> None: ...


class Showing(dist_train.Hook):
    """Adds to the report while the run goes on."""

    def __init__(self, wrong: bool = False):
        self.wrong = wrong

    def after_evaluation(self, run: dist_train.Run, metrics: Mapping[str, float]) -> None:
        run.show(dist_train.Table("Steps", ["rank", "step"], [[run.world.rank, run.step]]))
        if self.wrong:
            run.show("a text")  # type: ignore[arg-type]


class Start(dist_train.Hook):
    """Keeps the weights that a run on one process starts from."""

    def start(self, run: dist_train.Run) -> None:
        weights = {name: p.detach().clone() for name, p in run.model.named_parameters(remove_duplicate=False)}
        torch.save(weights, run.folder / "start.pt")
