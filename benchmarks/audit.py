"""torchrun --nproc_per_node=2 benchmarks/audit.py [--rounds 12] [--steps 20] [--every 1,5,20] [--backend ddp]

What audits (train.audit_every_steps) cost: the steps of a run that is audited at every N-th of them, by those of the
same run without audits. The sides take turns within one set of processes, each rank with one thread. A ratio is of the
CPU times of all ranks in a round; the median over the rounds, and the quartiles.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import draws
import torch
import torch.nn.functional as F
from torch import nn

from dist_train import backends
from dist_train.config.load import load
from dist_train.data.batch import Batch
from dist_train.data.sets import Columns, Data
from dist_train.loop import optim
from dist_train.loop.meter import Control, Recorder
from dist_train.loop.train import Eager
from dist_train.loop.verdicts import Finding
from dist_train.loop.work import Work
from dist_train.ranks import dist, launcher
from dist_train.ranks.dist import World
from dist_train.run import assemble
from dist_train.tasks.base import Task

MODELS = {
    "ResNet, batch 16": ("--data.name", "audit:pictures", "--model.name", "audit:ResNet", "--global", "16"),
    "decoder, batch 12": ("--data.name", "audit:tokens", "--model.name", "audit:Decoder", "--task.name", "audit:Words")
    + ("--global", "12"),
    "the default MLP, batch 64": ("--data.name", "digits", "--global", "64"),
}
N = 1024


def pictures(root: str, download: bool) -> Data:
    """32 by 32, of ten classes."""
    drawn = torch.randn(N, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return Data(Columns((drawn, torch.arange(N) % 10)), None, classes=tuple("abcdefghij"))


def tokens(root: str, download: bool) -> Data:
    """64 tokens and those that come next."""
    every = torch.randint(65, (N, 65), generator=torch.Generator().manual_seed(0))
    return Data(Columns((every[:, :-1].contiguous(), every[:, 1:].contiguous())), None)


class ResNet(draws.ResNet):
    """See draws."""


class Decoder(draws.Decoder):
    """See draws."""


class Words(Task):
    """The mean over tokens."""

    units_per_sample = 64

    def sums(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """See Task."""
        inputs, targets = batch
        return {"loss": F.cross_entropy(model(inputs), targets, reduction="sum")}


def stepper(argv: list[str], world: World) -> Callable[[int], None]:
    """Takes so many steps of a run. Raises where an audit finds something."""
    config = load(argv)
    parts = assemble.build(config, world.device)
    backend = backends.create(config, world, parts.findings)
    model, optimizer = backend.prepare(parts.model, optim.factory(config.optim, parts.model, parts.unfused(config)))

    def alarm(step: int, found: Sequence[Finding]) -> None:
        assert not found, f"step {step}: {found}"

    of = config, world, backend, model, optimizer, parts.task, parts.feed, parts.evaluation(config, world), Recorder()
    work = Work(*of, Control(), after_step=lambda meter: None, alarm=alarm)
    steps, meter, plan = Eager(work, work.meter), work.meter, work.plan

    def go(count: int) -> None:
        for _ in range(count):
            epoch, step = divmod(meter.result.steps, plan.steps_per_epoch)
            if not step:
                steps.begin(epoch, 0)
            units, norm = steps.take(plan.batch_size(step), 1e-4, False)
            meter.step(plan.batch_size(step), units, 1e-4, norm)

    return go


def main() -> None:
    """Measures on all ranks, and prints a table on rank 0."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=20, help="of a side in a round")
    parser.add_argument("--every", default="1,5,20")
    parser.add_argument("--backend", default="ddp")
    options = parser.parse_args()
    every = [None, *map(int, options.every.split(","))]
    torch.set_num_threads(1)
    with dist.joined(launcher.detect(), torch.device("cpu")) as world:
        if world.is_main:
            print(f"{options.backend}, {world.size} ranks\n| | N | ratio | quartiles |\n|---|---|---|---|", flush=True)
        for name, argv in MODELS.items():
            common = [word.replace("--global", "--train.global_batch_size") for word in argv]
            common += ["--train.epochs", "1000000", "--train.device", "cpu", "--train.threads", "1"]
            common += ["--track.every_steps", "1000000", "--backend.name", options.backend]
            sides = {n: stepper([*common, "--train.audit_every_steps", str(n or "null")], world) for n in every}
            rounds = [_round(sides, options.steps, turn) for turn in range(options.rounds + 1)][1:]
            for n in every[1:]:
                low, median, high = statistics.quantiles([took[n] / took[None] for took in rounds], n=4)
                if world.is_main:
                    print(f"| {name} | {n} | {median:.2f} | {low:.2f}-{high:.2f} |", flush=True)


def _round(sides: dict[int | None, Callable[[int], None]], steps: int, turn: int) -> dict[int | None, float]:
    """CPU seconds of all ranks for each side, which begin by turns."""
    took, order = {}, list(sides)
    for n in order[turn % len(order) :] + order[: turn % len(order)]:
        dist.gather_numbers([0.0])
        start = time.process_time()
        sides[n](steps)
        took[n] = sum(row[0] for row in dist.gather_numbers([time.process_time() - start]))
    return took


if __name__ == "__main__":
    main()
