"""All trackers of a run as one: on rank 0, and nothing on the others."""

import contextlib
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from dist_train.backends import chosen
from dist_train.config.tree import Config, to_tree
from dist_train.loop.meter import Metrics, Result, duration
from dist_train.ranks import ending
from dist_train.ranks.dist import World
from dist_train.ranks.speech import marked
from dist_train.track import summary
from dist_train.track.base import Course, Summary, Tracker, numbers
from dist_train.track.console import Lines, shows_bar
from dist_train.track.jsonl import Jsonl
from dist_train.track.wandb import WandB, run_id
from dist_train.track.words import spoken
from dist_train.whole import write_text


class Trackers:
    """All that the config asks for, as one. One that fails is told of in a line, and the run goes on without it.

    Args:
        config: the run.
        world: this rank's place.
        folder: of the run.
        course: what the run has to go.
        kept_id: of the run at W&B, in the checkpoint that it goes on from.
        images: see TensorBoard.
    """

    def __init__(
        self, config: Config, world: World, folder: Path, course: Course, kept_id: str | None,
        images: Callable[[], torch.Tensor | None],
    ):  # fmt: skip
        self.config, self.world, self.folder, self.course = config, world, folder, course
        self.backend = chosen(config.backend.name, world.launcher)
        self.trackers: list[Tracker] = []
        self.code = ending.FAILED
        self.newest: dict[str, float] = {}  # value of each metric, on every rank
        self.wandb_id: str | None = None
        if not world.is_main:
            return
        cfg, tree = config.track, to_tree(config)
        self.wandb_id = run_id(cfg, folder, kept_id, course.before)
        place = {"size": world.size, "backend": self.backend, "launcher": world.launcher}
        bar = shows_bar(cfg.progress)

        def open_bar() -> Tracker:
            from dist_train.track.bar import Bar

            return Bar(course, world.device, self._marked)

        def open_tensorboard() -> Tracker:
            from dist_train.track.tensorboard import TensorBoard

            return TensorBoard(tree, folder, course, images)

        def open_wandb() -> Tracker:
            assert self.wandb_id is not None
            return WandB(cfg, tree | {"world": place}, folder, course, self.wandb_id, self.say, captures=not bar)

        for name, wanted, opens in (
            ("the console", True, open_bar if bar else lambda: Lines(self._marked)),
            ("metrics.jsonl", True, lambda: Jsonl(folder, course)),
            ("track.tensorboard", cfg.tensorboard, open_tensorboard),
            ("track.wandb", cfg.wandb, open_wandb),
        ):
            if wanted:
                self.trackers += filter(None, [self._tried(name, opens)])

    def say(self, text: str) -> None:
        """Lines for people."""
        for tracker in self.trackers:
            if tracker.name == "the console":
                self._tried(tracker.name, tracker.say, text)

    def log(self, metrics: Metrics, line: str | None) -> None:
        """See Tracker."""
        self.newest |= {name: value for name, value in numbers(metrics).items() if "/" in name}
        self._each("log", metrics, line)

    def stopped(self, why: str, step: int) -> None:
        """summary.json of a run that was asked to end, and what to do next."""
        self._summary({"status": "preempted", "steps": step, "by": why})
        self.code = ending.STOPPED
        self.say(f"stopped by {why} after step {step}, and saved; --run.dir {self.folder} goes on from there")

    def finish(self, result: Result, stalls_s: list[float], early: str | None = None) -> None:
        """summary.json, and a last line that says where the results are.

        Args:
            result: of the run.
            stalls_s: seconds that training waited for each checkpoint.
            early: why it ended before its last step; None where it did not.
        """
        if not self.world.is_main:
            return
        unit = self.course.unit
        what = summary.finished(self.config, self.world, self.backend, result, stalls_s, unit)
        what |= summary.best(self.folder / Jsonl.name, self.course)
        self._summary(what | ({"ended_early": early} if early is not None else {}))
        self.code = ending.OK
        if early is not None:
            self.say(f"ended early: {early}")
        if self.config.compile.mode != "off" and (result.recompilations or not result.graphs):
            self.say(
                f"compile: {result.graphs} graphs, {result.recompilations} after the first epoch and evaluation. "
                f"TORCH_LOGS=recompiles shows why; python -m dist_train explain shows where the graph breaks"
            )
        if stalls_s:
            median_ms = statistics.median(stalls_s) * 1e3
            self.say(f"{len(stalls_s)} checkpoints, for each of which training waited {median_ms:.0f} ms")
        found = {name.removeprefix("eval/"): value for name, value in result.evaluation.items()}
        in_order = sorted(found, key=lambda name: name.endswith("loss"))  # which says least by itself
        self.say(
            f"finished: {''.join(f'{spoken(name, found[name])}, ' for name in in_order)}"
            f"{result.steps} steps in {duration(result.train_s)}, {what[f'{unit}_per_s']:,.0f} {unit}/s\n"
            f"results in {self.folder}"
        )

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._each("close", self.code)

    def _summary(self, what: Summary) -> None:
        if self.world.is_main:  # the file is what a finished run is known by: without it the run has failed
            write_text(self.folder / "summary.json", json.dumps(what, indent=2) + "\n")
        self._each("finish", what)

    def _each(self, method: str, *arguments: Any) -> None:
        for tracker in list(self.trackers):
            self._tried(tracker.name, getattr(tracker, method), *arguments)

    def _tried(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """What the function returns. If it fails, its tracker is out."""
        try:
            return function(*arguments)
        except Exception as error:
            self.trackers = [tracker for tracker in self.trackers if tracker.name != name]
            what = " ".join(f"{type(error).__name__} {error}".split())
            with contextlib.suppress(OSError):
                sys.stderr.write(self._marked(f"{name}: {what}; training goes on without it") + "\n")
            return None

    def _marked(self, text: str) -> str:
        return marked(text, self.world.rank, self.world.size)
