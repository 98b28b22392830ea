"""Ours against Lightning's Trainer, Fabric and Accelerate on the same work, one process on the CPU.

pip install lightning==2.6.* accelerate==1.15.*   (for this benchmark alone; no part of the package needs them)
python benchmarks/peers.py [--batch-size 64] [--repeats 16] [--steps N] [--config FILE.yaml ...the config's options]

Each is in a process of its own, and all take turns in short slices. Two ways of each peer:
written: as its users write it: DataLoader over a TensorDataset of floats, shuffled; torch's AdamW; with the Trainer's
         own logging, progress bar and checkpoints.
best:    batches of floats that lie in memory, the fused optimizer that we take, and all of the Trainer's extras off.
"""

import dataclasses
import itertools
import os
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

from dist_train.bench import machine, ranks, table
from dist_train.bench.lead import SLICE_S, Cell, shuffled, steps_of
from dist_train.bench.ranks import Ranks
from dist_train.bench.slices import CEILING, CONFIG, OURS, RUN_IN_STEPS, SOCKET, TUTORIAL, WARM_STEPS, Slice
from dist_train.bench.table import Run
from dist_train.config.load import load
from dist_train.config.tree import BackendConfig, Config
from dist_train.ranks.launcher import Launcher
from dist_train.tools.bench import for_bench
from dist_train.tools.options import split

PEERS = [f"{peer} {way}" for peer in ("lightning", "fabric", "accelerate") for way in ("written", "best")]
OPTIONS = {"--batch-size": ("64", "64"), "--repeats": ("16", "16"), "--steps": ("0", "100")}


def main(argv: list[str]) -> None:
    """Leads, and prints the ratios."""
    options, rest = split(argv, OPTIONS, "peers")
    batch_size, repeats, steps = (int(options[name]) for name in OPTIONS)
    config = alone(rest)
    print(
        f"{config.data.name}, {config.optim.name}, batch {batch_size}; {machine.describe(machine.facts())}", flush=True
    )
    runs, _ = in_turns(config, batch_size, repeats, steps, (OURS, CEILING, TUTORIAL), PEERS, __file__)
    print(f"{'':<20} {'samples/s':>10} {'/ceiling':>9} {'ours / it':>10} {'quartiles':>12} {'by CPU time':>12}")
    for name, run in runs.items():
        to_ceiling = statistics.median(table.ratio(run, runs[CEILING]).by_round)
        ours = table.ratio(runs[OURS], run)
        low, middle, high = table.quartiles(ours.by_round)
        quartiles = f"{low:.2f}-{high:.2f}"
        print(
            f"{name:<20} {statistics.median(run.rates()):>10,.0f} {to_ceiling:>9.2f} {middle:>10.2f} {quartiles:>12} "
            f"{statistics.median(ours.by_cpu_time):>12.2f}"
        )


def alone(argv: list[str]) -> Config:
    """The config of a benchmark of one process on the CPU."""
    config = for_bench(load(["--train.device", "cpu", *argv]), 1)
    return dataclasses.replace(config, backend=BackendConfig("single"))


def in_turns(
    config: Config, batch_size: int, repeats: int, steps: int, own: Iterable[str], peers: Iterable[str], script: str
) -> tuple[dict[str, Run], dict[str, Ranks]]:
    """Measures ours and peers, who take turns in short slices.

    Args:
        config: of all.
        batch_size: samples of a step.
        repeats: turns of each.
        steps: of a turn; 0 for as many as make a slice.
        own: what one process of ours runs, ourselves among it.
        peers: who have a process each.
        script: whose arguments are a folder and a peer's name.

    Returns:
        What was measured, and the processes, which have ended, both by name.
    """
    cell = Cell("single", 1, config)
    if not steps:
        with ranks.of(cell.with_batch(batch_size, WARM_STEPS), OURS, 1) as processes:
            processes.end()
        steps = max(3, round(SLICE_S / processes.ready[0].step_s))
    config = cell.with_batch(batch_size, steps_of(steps, repeats))
    with ExitStack() as stack:
        first = stack.enter_context(ranks.of(config, OURS, 1))
        first.warm()
        places = dict.fromkeys(own, first)
        for peer in peers:
            places[peer] = stack.enter_context(Ranks([script], peer, 1, config, by_torchrun=False))
        runs = {name: Run("ours" if name == OURS else name, name, 1, batch_size) for name in places}
        for turn in range(repeats):
            for name in shuffled(list(places), turn):
                runs[name].slices.append(places[name].turn(name, steps))
        for processes in set(places.values()):
            processes.end()
    return runs, places


# -- a peer ------------------------------------------------------------------------------------------------------------


class Held:
    """A loader that holds its loop between two steps until it is its turn."""

    def __init__(self, loader: Iterable, steps_per_epoch: int, turns):
        self.loader, self.steps_per_epoch, self.turns = loader, steps_per_epoch, turns
        self.done, self.until, self.steps, self.begin = 0, 1, 0, None
        self.ends: list[float] = []

    def __len__(self) -> int:
        return self.steps_per_epoch

    def __iter__(self) -> Iterator:
        for batch in self.loader:
            yield batch
            self.done += 1
            self.ends.append(time.perf_counter())
            if self.done >= self.until:
                self._hold()

    def _hold(self) -> None:
        if self.steps:  # run in
            self.until, self.steps = self.done + self.steps, 0
            self.ends.clear()
            self.begin = times()
            return
        if self.begin is not None:
            seconds, cpu_s = (now - then for now, then in zip(times(), self.begin, strict=True))
            self.turns.give(Slice(len(self.ends), seconds, cpu_s, []))
        elif self.done == 1:
            self.turns.first_step()
            self.until = WARM_STEPS
            return
        else:
            self.turns.ready(self.ends)
        self.steps = self.turns.wait({})
        if not self.steps:
            os._exit(0)
        self.until = self.done + RUN_IN_STEPS


def times() -> tuple[float, float]:
    """Now, by the wall and by the process's CPU time."""
    return time.perf_counter(), time.process_time()


def serve(folder: Path, name: str) -> None:
    """A peer's process."""
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    from dist_train.bench.references import lay_out
    from dist_train.bench.turns import Turns
    from dist_train.loop import optim
    from dist_train.ranks import dist
    from dist_train.run import assemble

    config, device = load(["--config", str(folder / CONFIG)]), torch.device("cpu")
    peer, way = name.split()
    dist.set_threads(config.train.threads, 1)
    parts = assemble.build(config, device)
    with dist.joined(Launcher(), device) as world:
        laid = [step[0].tree for step in lay_out(config, world, parts)]
    loader: Iterable = laid
    optimizer_of = optim.factory(config.optim, parts.model)
    if way == "written":
        inputs, targets = (torch.cat(of) for of in zip(*laid, strict=True))
        size = config.train.global_batch_size
        loader = DataLoader(TensorDataset(inputs, targets), batch_size=size, shuffle=True, drop_last=True)
        settings = {"weight_decay": config.optim.weight_decay, "momentum": config.optim.momentum} | config.optim.args
        settings = {key: value for key, value in settings.items() if value is not None}

        def optimizer_of(parameters):
            return getattr(torch.optim, config.optim.name)(parameters, lr=config.optim.lr, **settings)

    loss_of = torch.nn.CrossEntropyLoss(label_smoothing=config.task.args.get("label_smoothing", 0.0))
    turns = Turns(str(folder / SOCKET), 0, device)
    WAYS[peer](parts.model, optimizer_of, loss_of, loader, len(laid), turns, way, folder)


def lightning(model, optimizer_of, loss_of, loader, steps_per_epoch, turns, way, folder) -> None:
    """The Trainer."""
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = model

        def training_step(self, batch, _):
            inputs, targets = batch
            loss = loss_of(self.model(inputs), targets)
            if way == "written":
                self.log("train_loss", loss)
            return loss

        def configure_optimizers(self):
            return optimizer_of(self.model.named_parameters())

    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    extras = {} if way == "written" else dict.fromkeys(off, False)
    trainer = lightning.Trainer(max_epochs=-1, accelerator="cpu", devices=1, default_root_dir=folder, **extras)
    trainer.fit(Module(), Held(loader, steps_per_epoch, turns))


def fabric(model, optimizer_of, loss_of, loader, steps_per_epoch, turns, way, folder) -> None:
    """A loop of one's own with Fabric."""
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    model, optimizer = fabric.setup(model, optimizer_of(model.named_parameters()))
    if way == "written":
        loader = fabric.setup_dataloaders(loader)
    loop(model, optimizer, loss_of, Held(loader, steps_per_epoch, turns), fabric.backward)


def accelerate(model, optimizer_of, loss_of, loader, steps_per_epoch, turns, way, folder) -> None:
    """The plain loop of Accelerate's documentation."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, optimizer_of(model.named_parameters()))
    if way == "written":
        loader = accelerator.prepare(loader)
    loop(model, optimizer, loss_of, Held(loader, steps_per_epoch, turns), accelerator.backward)


def loop(model, optimizer, loss_of, loader, backward) -> None:
    """Epoch after epoch."""
    for _ in itertools.count():
        for inputs, targets in loader:
            optimizer.zero_grad()
            loss = loss_of(model(inputs), targets)
            backward(loss)
            optimizer.step()


WAYS = {"lightning": lightning, "fabric": fabric, "accelerate": accelerate}

if __name__ == "__main__":
    if len(sys.argv) > 2 and sys.argv[2] in PEERS:
        serve(Path(sys.argv[1]), sys.argv[2])
    else:
        main(sys.argv[1:])
