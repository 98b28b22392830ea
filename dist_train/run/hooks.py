"""Hooks: a user's own code at the steps of a run, with state of its own in the checkpoints."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from dist_train.backends.shards import Shards, shards_of
from dist_train.checkpoint.resume import Found
from dist_train.config.own_code import blamed
from dist_train.errors import ConfigError
from dist_train.loop.meter import Meter
from dist_train.ranks import dist
from dist_train.run.running import Run

Value = torch.Tensor | Shards | int | float | bool
NUMBERS = {bool: torch.bool, int: torch.int64, float: torch.float64}
OF_THE_RUN = "run"  # no hook's name
STOPPED = f"hook.{OF_THE_RUN}.stopped"  # why the run ends at the step of a checkpoint, in UTF-8


class Hook:
    """What is called at the steps of a run, on all ranks. Each method does nothing until it is overridden.

    Attributes:
        name: of its state in checkpoints, `hook.NAME.KEY`; empty is the name of its class.
        every_steps: `after_step` is called after every so many steps.
        stops: `after_step` may call `run.stop`, maybe not on all ranks. Then the ranks agree each time, which takes a
            small exchange among the hosts.
    """

    name: str = ""
    every_steps: int = 1
    stops: bool = False

    def start(self, run: Run) -> None:
        """Before the first step; model and optimizer are prepared. Where the run resumes, `load` comes next."""

    def after_step(self, run: Run) -> None:
        """After an optimizer step, and the evaluation that was due, and before a checkpoint."""

    def after_evaluation(self, run: Run, metrics: Mapping[str, float]) -> None:
        """After an evaluation; with its metrics, the same on all ranks. Before `after_step`."""

    def end(self, run: Run) -> None:
        """When the run has finished, or was asked to end and is saved."""

    def state(self) -> Mapping[str, Value]:
        """What a checkpoint keeps of it: numbers and tensors by name, those of rank 0. Of a DTensor each rank saves its
        shard, so that it resumes at another world size. Asked for after `start`."""
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        """Takes what `state` gave, of a run that resumes. A DTensor that `state` gives now is filled in place."""


class Hooks:
    """All hooks of a run as one. Methods are collective.

    Args:
        hooks: at least one, by name.
        run: prepared.
    """

    def __init__(self, hooks: Mapping[str, Hook], run: Run):
        self.hooks, self.run = hooks, run
        self.by_step = [h for h in hooks.values() if type(h).after_step is not Hook.after_step]

    def start(self) -> list[str]:
        """Calls each, and gives it its state where the run resumes.

        Returns:
            Lines about state that only the checkpoint or only the run has.
        """
        for hook in self.hooks.values():
            hook.start(self.run)
        lines = self._load(self.run.found) if self.run.found else []
        self._agree()
        return lines

    def after_step(self, meter: Meter) -> None:
        """After every step."""
        run, step = self.run, meter.result.steps
        if meter.evaluated_step == step:
            for hook in self.hooks.values():
                hook.after_evaluation(run, dict(meter.result.evaluation))
            self._agree()
        for hook in self.by_step:
            if step % hook.every_steps == 0:
                before = run.stopped
                hook.after_step(run)
                if hook.stops:
                    self._agree()
                elif run.stopped != before:
                    raise ConfigError(
                        f"train.hooks: got run.stop() in after_step of {type(hook).__name__}, expected its attribute "
                        f"stops to be True, so that the ranks agree on it; write stops = True in the class"
                    )

    def end(self) -> None:
        """At the end of the run."""
        for hook in self.hooks.values():
            hook.end(self.run)

    def _agree(self) -> None:
        """What one rank wants, all do."""
        self.run.stopped = next((why for why in dist.gather(self.run.stopped) if why is not None), None)

    def state(self) -> dict[str, Shards]:
        """What this rank gives to a checkpoint."""
        found: dict[str, Shards] = {}
        for name, hook in self.hooks.items():
            for key, value in hook.state().items():
                found |= self._kept(f"hook.{name}.{key}", value)
        if self.run.stopped is not None:
            text = torch.frombuffer(bytearray(self.run.stopped, "utf-8"), dtype=torch.uint8)
            found |= self._kept(STOPPED, text)
        return found

    def _kept(self, path: str, value: Value) -> dict[str, Shards]:
        """What this rank gives of a value: its shards, or all of it on rank 0. Raises ConfigError."""
        if isinstance(value, Shards):
            return {path: value}
        if not is_sharded(value) and not self.run.world.is_main:
            return {}
        if isinstance(value, torch.Tensor):
            return {path: shards_of(value)}
        if type(value) not in NUMBERS:
            raise ConfigError(
                f"train.hooks: got {type(value).__name__} as the state {path}, expected a number or a tensor, as a "
                f"checkpoint executes nothing when it is read; make it one, such as torch.tensor([...])"
            )
        return {path: shards_of(torch.tensor(value, dtype=NUMBERS[type(value)]))}

    def _load(self, found: Found) -> list[str]:
        from dist_train.checkpoint import storage

        saved, lines = storage.tensors(found.folder), []
        for name, hook in self.hooks.items():
            prefix, now = f"hook.{name}.", hook.state()
            paths = [path for path in saved if path.startswith(prefix)]
            values, fill = {}, {}
            for path in paths:
                key = path.removeprefix(prefix)
                value: Any = now.get(key)
                if not is_sharded(value):
                    value = torch.zeros(saved[path].size, dtype=saved[path].properties.dtype)
                values[key], fill[path] = value, value if isinstance(value, Shards) else shards_of(value)
            if paths:
                storage.read(found.folder, fill)
                with blamed("train.hooks", _path(hook), "given the state of a checkpoint"):
                    hook.load({key: _as_given(value, now.get(key)) for key, value in values.items()})
            elif now:
                lines.append(f"hook {name} starts anew: the checkpoint has no state of it")
        if STOPPED in saved:
            text = torch.zeros(saved[STOPPED].size, dtype=torch.uint8)
            storage.read(found.folder, {STOPPED: shards_of(text)})
            self.run.stopped = bytes(text.tolist()).decode()
        others = {path.split(".")[1] for path in saved if path.startswith("hook.")} - {*self.hooks, OF_THE_RUN}
        return [*lines, *(f"the checkpoint's state of hook {name} is not used" for name in sorted(others))]


def is_sharded(value: Any) -> bool:
    """Whether each rank holds a part of it."""
    return isinstance(value, Shards) or (
        isinstance(value, torch.Tensor) and type(value) not in (torch.Tensor, nn.Parameter, nn.Buffer)
    )


def named(hooks: Iterable[Hook]) -> dict[str, Hook]:
    """The hooks by the names of their state. Raises ConfigError."""
    found: dict[str, Hook] = {}
    for hook in hooks:
        if not isinstance(hook, Hook):
            raise ConfigError(
                f"train.hooks: got {type(hook).__name__}, expected a class that is derived from dist_train.Hook"
            )
        name = hook.name or type(hook).__name__
        if name in found or name == OF_THE_RUN or "." in name:
            got = "twice" if name in found else "as a hook's"
            raise ConfigError(
                f"train.hooks: got the name {name!r} {got}, expected one of its own without a dot, under which a "
                f"checkpoint keeps its state; set the attribute name of {type(hook).__name__}"
            )
        if hook.every_steps < 1:
            raise ConfigError(f"train.hooks: got every_steps {hook.every_steps} of {name}, expected at least 1")
        found[name] = hook
    return found


def _path(hook: Hook) -> str:
    return f"{type(hook).__module__}:{type(hook).__qualname__}"


def _as_given(value: Any, now: Any) -> Any:
    """A number where a number was given."""
    is_number = isinstance(value, torch.Tensor) and not value.dim() and not isinstance(now, torch.Tensor)
    return value.item() if is_number else value
