"""Averaged weights (an exponential moving average): each rank keeps those of its own shards, in the same layout."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch

from dist_train.backends.base import Backend, Reader
from dist_train.backends.fit import some
from dist_train.backends.shards import Shards
from dist_train.config.tree import OptimConfig

PREFIX = "ema."


class Average:
    """The average that optim.ema asks for; does nothing where it is null. All methods are collective.

    An update is one foreach operation over the shards: it reads and writes each averaged weight once, and reads each
    weight once. Buffers are not averaged: with the averaged weights, the model computes with its buffers as they are.

    Args:
        config: of the optimizer.
        backend: has prepared the model.
    """

    def __init__(self, config: OptimConfig, backend: Backend):
        self.config, self.backend = config, backend
        self.live = [] if config.ema is None else backend.trained()
        self.kept: list[torch.Tensor] | None = None  # before its start

    def begin(self, done: int) -> None:
        """Starts with the weights as they are, if it is time, after `done` steps of the run."""
        if self.config.ema is not None and self.kept is None and done >= self.config.ema_start:
            self.kept = [tensor.clone() for tensor in self.live]

    def after_step(self, done: int) -> None:
        """Takes in the weights after the step with which `done` are done. A step that was left out changes nothing."""
        if self.kept is None:
            self.begin(done)
        elif self.backend.taken and self.kept:
            torch._foreach_lerp_(self.kept, self.live, 1 - self.config.ema)

    @contextmanager
    def used(self) -> Iterator[None]:
        """Has the model compute with the averaged weights, where there are any and optim.ema_eval says so; then with
        its own again, to the bit."""
        if self.kept is None or not self.config.ema_eval:
            yield
            return
        self._exchange()
        yield
        self._exchange()

    def _exchange(self) -> None:
        """Each takes the other's values: what has been captured or compiled knows the weights by their memory."""
        for kept, live in zip(self.kept, self.live, strict=True):
            before = live.clone()
            live.copy_(kept)
            kept.copy_(before)
        self.backend.refresh()

    def state(self) -> dict[str, Shards]:
        """What this rank holds of the averages, as `ema.NAME`, by the model's own names."""
        named = {} if self.kept is None else self.backend.named(self.kept)
        return {PREFIX + name: shards for name, shards in named.items()}

    def load(self, saved: Collection[str], read: Reader, done: int) -> list[str]:
        """Goes on from a checkpoint, whose weights are loaded.

        Args:
            saved: names of all that it holds.
            read: fills the shards that it is given, by name.
            done: steps of the run.

        Returns:
            Lines for people, where the checkpoint and the config do not both have averages.
        """
        there = {path for path in saved if path.startswith(PREFIX)}
        if self.config.ema is None or done < self.config.ema_start:
            why = "optim.ema is null" if self.config.ema is None else f"optim.ema_start is {self.config.ema_start}"
            return [f"optim.ema: the checkpoint's averaged weights are not used, as {why}"] if there else []
        self.begin(done)
        mine = self.state()
        if not there:
            return [f"optim.ema: the checkpoint has no averaged weights, so they start at the weights of step {done}"]
        read({path: shards for path, shards in mine.items() if path in there})
        unused = {PREFIX + name for name in self.backend.findings.unused}  # which no step changes
        new = tuple(path.removeprefix(PREFIX) for path in mine if path not in there | unused)
        begins = f"optim.ema: the checkpoint has no averages of {some(new)}, which start at the weights of step {done}"
        return [begins] if new else []
