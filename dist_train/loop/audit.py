"""Audits: a defence against a device that computes wrongly without a word, and against memory that changes.

At an audited step each rank's share is computed again by the rank after it, from the same weights, and the digests of
the two gradients are compared: that of the rank's own is taken from the gradient that it trains with, before the ranks
exchange theirs. Where they differ, the rank after that computes the share a third time, and two of three are right.
Of ranks that split layers between them, the one after is that with the same part of the layers, of the next data rank.
"""

import platform
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from dist_train.backends.base import Copies
from dist_train.backends.fit import some
from dist_train.backends.probe import Findings
from dist_train.config.tree import Config
from dist_train.data.batch import Batch, mapped
from dist_train.errors import ConfigError
from dist_train.loop.digests import Sheet
from dist_train.loop.units import Units, loss_sum
from dist_train.loop.verdicts import Finding, of_copies, of_shares
from dist_train.loop.work import Work
from dist_train.models.draws import Draws
from dist_train.models.exchanges import Tape, taped
from dist_train.models.running import running
from dist_train.ranks import dist
from dist_train.ranks.processor import hardware

NEXT, ARBITER = 1, 2  # how many data ranks after the share's own


@dataclass(frozen=True)
class Taken:
    """A step whose shares can be computed again.

    Args:
        done: steps before it.
        units: of the whole step.
        buffers: as they were before it.
        received: what layers exchanged in it.
    """

    done: int
    units: Units
    buffers: list[torch.Tensor]
    received: list[torch.Tensor]


class Audit:
    """The audits of a run. Collective, from the first.

    Args:
        work: what the loop works with. Without its `alarm` nothing is audited, whatever the config says.

    Raises:
        ConfigError: the ranks' hardware or threads differ, so that their last bits do.
    """

    def __init__(self, work: Work):
        self.work, self.alarm = work, work.alarm
        self.every = work.config.train.audit_every_steps if work.alarm else None
        if self.every:
            self.model, self.size = work.precision.called(work.model), work.world.data_size
            self.draws: dict[int, Draws] = {}
            self.alike: list[list[tuple[int, ...]]] | None = None  # the ranks that have copies of the same
            host, device = platform.node(), work.world.device
            self.places = dist.gather(f"host {host}, {device} ({dist.device_name(device)})")
            check_alike(self.every, dist.gather(hardware(device)))

    def watched(self, batches: Iterable[Batch], units: Units) -> Iterable[Batch]:
        """This rank's micro-batches of the step that comes next. Where it is audited, that is done when the last one
        has had its backward, before the weights change."""
        done = self.work.meter.result.steps
        return self._audited(batches, units, done) if self.every and not (done + 1) % self.every else batches

    def _audited(self, batches: Iterable[Batch], units: Units, done: int) -> Iterator[Batch]:
        backend = self.work.backend
        own, tape, before = Sheet(), Tape(), backend.buffers.copies()
        copies = [(of.ranks, Sheet(of.tensors)) for of in self._copies()]
        with backend.local(own.see), taped(tape):
            yield from map(_placed_anew, batches)
        self.work.meter.phases("audit")
        _add_sent(own, tape)
        step = Taken(done, units, before, tape.received)
        assert self.alarm is not None
        self.alarm(done + 1, self._compare(step, copies, own))

    def _copies(self) -> list[Copies]:
        """What several ranks hold copies of: the averages of weights among it, of which nothing else tells."""
        work, found = self.work, list(self.work.backend.copies())
        if work.backend.updates_all:
            averages = {path: part for path, shards in work.average.state().items() for _, part in shards.boxes}
            found.append(Copies(tuple(range(work.world.size)), averages))
        return found

    def _compare(self, step: Taken, copies: list[tuple[tuple[int, ...], Sheet]], own: Sheet) -> list[Finding]:
        """Compares the ranks' copies and shares. Collective."""
        other, device = self._again(NEXT, step), self.work.world.device
        sheets = [own, other, *(sheet for _, sheet in copies)]
        firsts, seconds, *kept = zip(
            *dist.stack_all(torch.stack([sheet.total(device) for sheet in sheets])).tolist(), strict=True
        )
        if self.alike is None:  # it stays as it is
            every = dist.gather([ranks for ranks, _ in copies])
            self.alike = [list(dict.fromkeys(groups)) for groups in zip(*every, strict=True)]
        differing = [
            (i, ranks)
            for i, (totals, groups) in enumerate(zip(kept, self.alike, strict=True))
            for ranks in groups
            if len({totals[rank] for rank in ranks}) > 1
        ]
        if differing:  # gradients differ then, for that
            rows = dist.gather([sheet.rows() for _, sheet in copies])
            return [
                of
                for i, ranks in differing
                for of in of_copies(self.places, {rank: (kept[i][rank], rows[rank][i]) for rank in ranks})
            ]
        bad = [rank for rank in range(self.work.world.size) if firsts[rank] != seconds[self._after(rank, NEXT)]]
        if not bad:
            return []
        rows = dist.gather((own.rows(), other.rows(), self._again(ARBITER, step).rows()))
        shares = {}
        for rank in bad:
            by = rank, self._after(rank, NEXT), self._after(rank, ARBITER)
            shares[by] = tuple(rows[each][i] for i, each in enumerate(by))
        return of_shares(self.places, shares)

    def _after(self, rank: int, count: int) -> int:
        """The rank so many data ranks after another, with the same part of each layer."""
        return (rank + count * self.work.world.tensor) % self.work.world.size

    def _again(self, after: int, step: Taken) -> Sheet:
        """Computes the share of the data rank so many before this one, and leaves no trace of it. Collective, as all
        ranks compute one, and the layers of some backends are gathered."""
        work, backend = self.work, self.work.backend
        rank = (work.world.data_rank - after) % self.size
        epoch, within = divmod(step.done, work.plan.steps_per_epoch)
        plan, sheet, tape = replace(work.plan, rank=rank), Sheet(), Tape(step.received)
        last, now = plan.micro_batches(within), 0
        draws = self._draws(rank)

        def see(name: str, parameter: torch.Tensor, gradient: torch.Tensor) -> None:
            sheet.add(name, gradient)
            if now == last or backend.ordered:  # of which each micro-batch's is added by itself
                parameter.grad = None  # at once, so that all together take no memory

        device, buffers = work.world.device, backend.buffers.copies()
        backend.buffers.put(step.buffers)
        with torch.random.fork_rng([device] if device.type == "cuda" else []), backend.apart(see), taped(tape):
            for now, batch in enumerate(map(_placed_anew, work.feed.share(plan, epoch, within)), 1):  # noqa: B007
                with running(batch), draws.of(batch.ids, step.done):
                    backend.differentiate(loss_sum(work.task, self.model, batch) / step.units)
        backend.buffers.put(buffers)
        _add_sent(sheet, tape)
        return sheet

    def _draws(self, rank: int) -> Draws:
        """Those of another rank."""
        if rank not in self.draws:
            cfg, work = self.work.config.train, self.work
            self.draws[rank] = Draws(cfg.seed, rank, work.model, cfg.draws, work.world.device)
        return self.draws[rank]


def check(config: Config, findings: Findings, own_loop: bool) -> None:
    """Raises ConfigError where a rank cannot compute another's share again.

    Args:
        config: of the run.
        findings: what a first forward and backward of the model showed.
        own_loop: the user's loop takes the steps.
    """
    every, path = config.train.audit_every_steps, "train.audit_every_steps"
    if every is None:
        return
    got = f"{path}: got {every}"
    if own_loop:
        raise ConfigError(f"{got} in a loop of your own, whose steps another rank cannot take again; leave it out")
    if findings.mixes_samples:
        raise ConfigError(
            f"{got} with a task whose loss compares the samples of all ranks with each other (mixes_samples), so that "
            f"no rank's share can be computed alone; leave it out"
        )
    if findings.draws:
        raise ConfigError(
            f"{got}, but the model draws by {some(findings.draws)}, which another rank does not draw again; expected "
            f"dropout and stochastic depth alone, with train.draws keyed; leave it out"
        )
    if findings.written:
        raise ConfigError(
            f"{got}, but the model's forward writes {some(findings.written)}, so that a second one would change the "
            f"weights; leave it out"
        )


def check_alike(every: int, found: Sequence[str]) -> None:
    """Raises ConfigError where ranks would not compute the same bits.

    Args:
        every: of train.audit_every_steps.
        found: hardware of each rank, in words.
    """
    other = next((rank for rank, what in enumerate(found) if what != found[0]), None)
    if other is not None:
        raise ConfigError(
            f"train.audit_every_steps: got {every}, but rank 0 has {found[0]}, and rank {other} has {found[other]}, "
            f"expected alike ranks, as others compute other last bits; leave it out, or set train.threads"
        )


def _placed_anew(batch: Batch) -> Batch:
    """With tensors at the beginning of memory of their own: where a tensor begins decides about the last bits in some
    libraries."""

    def copied(leaf: object) -> object:
        return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf

    return Batch(mapped(batch.tree, copied), batch.ids, batch.size)


def _add_sent(sheet: Sheet, tape: Tape) -> None:
    for i, sent in enumerate(tape.sent):
        sheet.add(f"exchange {i} of batch statistics", sent)
