"""python benchmarks/gpu.py [--json FILE]

What each change from the tutorial's loop to a replayed graph gains, on one GPU: samples/s with the same model,
optimizer and batch size, interleaved in one run, and the share of the bare replays that the loop reaches; how often the
loop waits for the device between two lines of metrics; how long the recipe for speed takes, and how good it is.
It also runs on a CPU, where there are no graphs: --steps 50 --rounds 1 --seeds 1 shows that it works.
"""

import argparse
import dataclasses
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from dist_train import backends
from dist_train.backends.base import Backend
from dist_train.bench.references import Pictures
from dist_train.bench.turns import synchronize
from dist_train.config.load import load
from dist_train.config.tree import CompileConfig, Config
from dist_train.data import feed
from dist_train.data.order import Plan
from dist_train.loop import optim
from dist_train.loop.captured import Captured
from dist_train.loop.meter import Control, Meter, Recorder, Result
from dist_train.loop.train import train
from dist_train.loop.work import Work, total_steps
from dist_train.ranks import dist
from dist_train.ranks.dist import World
from dist_train.run import assemble
from dist_train.run.assemble import Parts

EVERY_STEPS = 50  # between two lines of metrics: the default
TUTORIAL, BARE, GRAPH = "tutorial's loop", "bare replay of the graph", "whole step as a graph"


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A config whose model and data are on the device."""

    config: Config
    world: World
    parts: Parts
    backend: Backend
    model: nn.Module
    optimizer: torch.optim.Optimizer

    @classmethod
    def of(cls, config: Config, world: World) -> "Prepared":
        """Builds them, from the seed."""
        parts = assemble.build(config, world.device)
        backend = backends.create(config, world, parts.findings)
        prepared = backend.prepare(parts.model, optim.factory(config.optim, parts.model))
        return cls(config, world, parts, backend, *prepared)

    def train(self, after_step: Callable[[Meter], None] = lambda meter: None) -> tuple[Recorder, Result]:
        """The product's own loop, from the weights as they are."""
        lines = Recorder()
        return lines, train(self.work(lines, Control(), after_step))

    def work(self, lines: Recorder, control: Control, after_step: Callable[[Meter], None] = lambda meter: None) -> Work:
        """What the loop works with."""
        of = self.config, self.world, self.backend, self.model, self.optimizer, self.parts.task, self.parts.feed
        return Work(*of, self.parts.evaluation(self.config, self.world), lines, control, after_step)


def tutorial(prepared: Prepared, steps: int) -> float:
    """Samples/s of the loop of PyTorch's quickstart, with our optimizer."""
    of, device = prepared, prepared.world.device
    batch = of.config.train.global_batch_size
    loader = DataLoader(Pictures(of.parts.data.train), batch_size=batch, shuffle=True, drop_last=True)
    loss_fn = nn.CrossEntropyLoss()

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            yield from loader

    of.model.train()
    for step, (x, y) in enumerate(batches()):
        if step == 3:
            synchronize(device)
            start = time.perf_counter()
        if step == steps + 3:
            synchronize(device)
            return steps * batch / (time.perf_counter() - start)
        x, y = x.to(device), y.to(device)
        with of.parts.precision.autocast():
            loss = loss_fn(of.model(x), y)
        loss.backward()
        of.optimizer.step()
        of.optimizer.zero_grad()
        if step % 100 == 0:
            loss.item()
    raise AssertionError


def loop(prepared: Prepared, steps: int) -> float:
    """Samples/s of our loop between two lines of metrics. What comes before was captured and compiled."""
    lines, _ = prepared.train()
    first, last = lines.steps[-1 - steps // EVERY_STEPS], lines.steps[-1]
    samples = (last["step"] - first["step"]) * prepared.config.train.global_batch_size
    return samples / (last["time_s"] - first["time_s"])


def bare(prepared: Prepared, steps: int) -> float:
    """Samples/s of the captured step alone, with nothing around it: what the loop could reach at best."""
    config, world, parts = prepared.config, prepared.world, prepared.parts
    plan = Plan.of(len(parts.feed.split), config, world)
    meter = Meter(
        Recorder(), total_steps(config.train, plan.steps_per_epoch), plan, EVERY_STEPS, world.device, Control()
    )
    captured = Captured(prepared.work(Recorder(), Control()), meter)
    captured.begin(0, 0)
    for _ in range(2):  # the first as it is, the second captured
        captured.take(plan.batch_size(0), 0.0, measure=False)
    replay = captured.replays[plan.batch_size(0), False]
    synchronize(world.device)
    start = time.perf_counter()
    for step in range(steps):
        if step % (plan.steps_per_epoch - 1) == 0:
            captured.at.zero_()
        if step % EVERY_STEPS == 0:
            captured.place.zero_()
        replay()
    synchronize(world.device)
    return steps * config.train.global_batch_size / (time.perf_counter() - start)


@contextmanager
def on_host() -> Iterator[None]:
    """Data stays in the host's memory, as where it does not fit on the device."""
    share, feed.DEVICE_SHARE = feed.DEVICE_SHARE, 0.0
    try:
        yield
    finally:
        feed.DEVICE_SHARE = share


def variants(base: Config, world: World, mode: str) -> dict[str, tuple[Callable[[Prepared, int], float], Prepared]]:
    """By name, what measures it and on what."""
    eager = dataclasses.replace(base, compile=CompileConfig())
    step = dataclasses.replace(base, compile=CompileConfig(mode, "step"))
    with on_host():
        found = {TUTORIAL: (tutorial, Prepared.of(eager, world)), "in memory": (loop, Prepared.of(eager, world))}
    found["on the device"] = loop, Prepared.of(eager, world)
    if mode != "off":
        model = dataclasses.replace(base, compile=CompileConfig(mode))
        found["model compiled"] = loop, Prepared.of(model, world)
    graph = Prepared.of(step, world)
    return found | {GRAPH: (loop, graph), BARE: (bare, graph)}


def throughput(base: Config, world: World, options: argparse.Namespace) -> dict[str, list[float]]:
    """Samples/s of each round, by variant."""
    found = variants(base, world, options.mode)
    rates: dict[str, list[float]] = {name: [] for name in found}
    for number in range(options.rounds):
        for name in [*found] if number % 2 == 0 else [*reversed(found)]:
            measure, prepared = found[name]
            steps = options.steps if name != TUTORIAL else max(1, options.steps // 20)
            rates[name].append(measure(prepared, steps))
    return rates


def waits(base: Config, world: World, mode: str) -> dict[str, float | None]:
    """How often a step waits for the device between two lines of metrics, as torch notes it; None without CUDA."""
    found: dict[str, float | None] = {}
    for scope in ("model", "step"):
        prepared = Prepared.of(dataclasses.replace(base, compile=CompileConfig(mode, scope)), world)
        steps = 0

        def after_step(meter: Meter) -> None:
            nonlocal steps
            done = meter.result.steps
            # By then everything is compiled and captured.
            watch = world.device.type == "cuda" and done >= 4 * EVERY_STEPS and not meter.due(done + 1)
            if world.device.type == "cuda":
                torch.cuda.set_sync_debug_mode("warn" if watch else "default")
            steps += watch

        with warnings.catch_warnings(record=True) as noted:
            warnings.simplefilter("always")
            prepared.train(after_step)
        if world.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
        waited = sum("synchronizing" in str(warning.message) for warning in noted)
        found[scope] = waited / steps if steps else None
    return found


def record(options: argparse.Namespace, world: World) -> dict[str, Any]:
    """The recipe for speed over seeds: seconds of training from the first step to the end, without compiling and
    capturing, which are given apart, and without the evaluation after it."""
    seconds, accuracies, prepared_s = [], [], []
    for seed in range(options.seeds):
        argv = ["--config", options.record, "--train.seed", str(seed), "--train.device", world.device.type]
        config = load([*argv, *(["--data.root", options.root] if options.root else [])])
        if options.mode == "off":
            config = dataclasses.replace(config, compile=dataclasses.replace(config.compile, mode="off"))
        result = Prepared.of(config, world).train()[1]
        seconds.append(result.train_s)
        accuracies.append(100 * result.evaluation["eval/accuracy"])
        prepared_s.append(result.prepare_s)
    spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
    return {
        **{"train_s": seconds, "train_s_median": statistics.median(seconds), "prepare_s": prepared_s},
        **{"accuracy": accuracies, "accuracy_mean": statistics.mean(accuracies), "accuracy_stdev": spread},
    }


def table(rates: dict[str, list[float]]) -> list[str]:
    """Markdown: medians, and medians of the ratios within each round."""
    lines = ["| | samples/s | of the one before | of the tutorial's |", "|---|---|---|---|"]
    before = None
    for name, values in rates.items():
        by = [
            statistics.median(a / b for a, b in zip(values, rates[of], strict=True)) for of in (before, TUTORIAL) if of
        ]
        shown = [f"{ratio:.2f}" for ratio in by] if before else ["", "1.00"]
        lines.append(f"| {name} | {statistics.median(values):,.0f} | {' | '.join(shown)} |")
        before = name
    share = statistics.median(a / b for a, b in zip(rates[GRAPH], rates[BARE], strict=True))
    return [*lines, "", f"The loop reaches {share:.2f} of the bare replays; the goal is at least 0.95."]


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints Markdown, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", help="folder of the data, as data.root")
    parser.add_argument("--data", default="fashion_mnist", help="as data.name")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2000, help=f"that are measured; a multiple of {EVERY_STEPS}")
    parser.add_argument("--seeds", type=int, default=20, help="of the recipe for speed")
    parser.add_argument("--record", default="configs/fashion_mnist_record.yaml", help="the recipe for speed")
    parser.add_argument("--mode", default="default", choices=["off", "default", "max-autotune"], help="as compile.mode")
    parser.add_argument("--precision", action="append", choices=["float32", "tf32", "bfloat16"])
    parser.add_argument("--json", help="also write everything there")
    options = parser.parse_args(argv)
    device = dist.resolve_device("auto", 0)
    world = World(0, 1, 0, 1, device, "none")
    on_cuda = device.type == "cuda"
    steps = 6 * EVERY_STEPS + options.steps  # before the last ones, every kind of step was seen twice
    shown: dict[str, Any] = {"device": dist.device_name(device), "torch": torch.__version__, **vars(options)}
    shown |= {"throughput": {}, "waits": {}}
    print(f"{shown['device']}, torch {shown['torch']}, batch {options.batch}, medians of {options.rounds} rounds")
    for precision in options.precision or ["float32", *(["tf32"] if on_cuda else []), "bfloat16"]:
        base = load(
            [
                *(f"--data.name={options.data}", f"--train.global_batch_size={options.batch}", "--train.epochs=100000"),
                *(f"--train.max_steps={steps}", "--train.eval_every_epochs=null", f"--track.every_steps={EVERY_STEPS}"),
                *(f"--train.precision={precision}", f"--train.device={device.type}"),
                *([f"--data.root={options.root}"] if options.root else []),
            ]
        )
        rates = throughput(base, world, options)
        shown["throughput"][precision] = rates
        shown["waits"][precision] = waits(base, world, options.mode)
        print("\n".join(["", f"## {precision}", "", *table(rates), ""]), flush=True)
        print(f"Waits for the device, a step between two lines: {shown['waits'][precision]}", flush=True)
    if options.seeds:
        found = shown["record"] = record(options, world)
        print("\n".join(["", f"## {options.record}", "", "| | |", "|---|---|"]))
        print(f"| training, median of {options.seeds} seeds | {found['train_s_median']:.3f} s |")
        print(f"| test accuracy, mean | {found['accuracy_mean']:.2f}% ± {found['accuracy_stdev']:.2f} |")
        print(
            f"| compiling and capturing, not in the above; first seed, median | {found['prepare_s'][0]:.1f} s, ", end=""
        )
        print(f"{statistics.median(found['prepare_s']):.1f} s |")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(shown, file, indent=2)
    return shown


if __name__ == "__main__":
    main()
