"""What was measured, and what it says: rates, ratios within each round, shares of a step."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dist_train.bench.slices import BARE, CEILING, OURS, TUTORIAL, Slice

HEAD = (
    f"{'batch':>6} {'run':<18} {'ranks':>5} {'samples/s':>9} {'spread':>6} {'/ceiling':>8} {'p50 ms':>7} "
    f"{'p95 ms':>7} {'start s':>7} {'data':>5} {'comp.':>5} {'red.':>5} {'rest':>5} {'MiB':>6} {'scaling':>7}"
)


@dataclass
class Run:
    """A row of the table.

    Args:
        cell: the backend, with DeepSpeed's stage.
        name: ours, or a reference.
        ranks: how many.
        batch_size: samples of a step over all ranks.
        starts_s: of each start, from the command until the first step.
        peak_bytes: of each start, the most of a rank.
        slices: by round, by rank.
        why: it did not run.
        failed: by an error.
    """

    cell: str
    name: str
    ranks: int
    batch_size: int
    starts_s: list[float] = field(default_factory=list)
    peak_bytes: list[int] = field(default_factory=list)
    slices: list[list[Slice]] = field(default_factory=list)
    why: str = ""
    failed: bool = False

    @property
    def label(self) -> str:
        """What the table calls it."""
        return {OURS: self.cell, BARE: f"  bare {self.cell}"}.get(self.name, f"  {self.name}")

    @property
    def title(self) -> str:
        """A name of its own."""
        if self.name == TUTORIAL:
            return self.name
        return f"{self.label.strip()} x{self.ranks}"

    def rates(self) -> list[float]:
        """Samples a second over all ranks, of each round."""
        return [self.batch_size * ranks[0].steps / max(s.seconds for s in ranks) for ranks in self.slices]

    def step_us(self) -> list[float]:
        """Microseconds a step, of each round."""
        return [max(s.seconds for s in ranks) / ranks[0].steps * 1e6 for ranks in self.slices]

    def cpu_us(self) -> list[float]:
        """Microseconds of CPU time a step on a rank, of each round."""
        return [statistics.mean(s.cpu_s for s in ranks) / ranks[0].steps * 1e6 for ranks in self.slices]

    def step_ms(self) -> list[float]:
        """Of every step, on rank 0."""
        return [step for ranks in self.slices for step in ranks[0].step_ms]


@dataclass(frozen=True)
class Ratio:
    """Two runs in the same rounds.

    Args:
        of: a run of ours.
        to: what it is held against.
        by_round: its samples/s divided by those of the other.
        extra_us: its microseconds a step, less those of the other; of each round.
        by_cpu_time: the same ratio where only CPU time counts, which other programs change less; of each round.
        extra_cpu_us: microseconds of CPU time a step on a rank, less those of the other; of each round.
    """

    of: Run
    to: Run
    by_round: list[float]
    extra_us: list[float]
    by_cpu_time: list[float]
    extra_cpu_us: list[float]

    def line(self) -> str:
        """For people."""
        low, middle, high = quartiles(self.by_round)
        what = f"{self.of.title} / {self.to.title}"
        extra, cpu = statistics.median(self.extra_us), statistics.median(self.extra_cpu_us)
        return (
            f"batch {self.of.batch_size:>5}  {what:<38} {middle:5.2f} ({low:.2f}-{high:.2f}) {extra:+9,.1f} us; "
            f"by CPU time {statistics.median(self.by_cpu_time):5.2f} {cpu:+9,.1f} us"
        )

    def tree(self) -> dict[str, Any]:
        """For JSON."""
        low, middle, high = quartiles(self.by_round)
        runs = {"of": self.of.title, "to": self.to.title, "batch_size": self.of.batch_size}
        return runs | {
            "median": middle,
            "quartiles": [low, high],
            "by_round": self.by_round,
            "median_by_cpu_time": statistics.median(self.by_cpu_time),
            "extra_us_a_step": statistics.median(self.extra_us),
            "extra_cpu_us_a_step": statistics.median(self.extra_cpu_us),
        }


def ratio(of: Run, to: Run) -> Ratio:
    """Of two runs that took turns."""

    def both(get: Any) -> list[tuple[float, float]]:
        return list(zip(get(of), get(to), strict=True))

    return Ratio(
        of, to,
        [a / b for a, b in both(Run.rates)],
        [a - b for a, b in both(Run.step_us)],
        [b / a for a, b in both(Run.cpu_us)],
        [a - b for a, b in both(Run.cpu_us)],
    )  # fmt: skip


def ratios(runs: Sequence[Run]) -> list[Ratio]:
    """Each run of ours to its references."""
    ran = [run for run in runs if run.slices]
    return [
        ratio(of, to)
        for of in ran
        if of.name == OURS
        for to in ran
        if to.name != OURS and (to.cell, to.ranks, to.batch_size) == (of.cell, of.ranks, of.batch_size)
    ]


def shares(of: Run, ceiling: Run) -> dict[str, float]:
    """Where a step's time goes, medians over the rounds. On several ranks, reduction is what forward, backward and
    optimizer take longer than on the ceiling, which exchanges nothing: waiting, and the library's own work, included.
    """
    rows = []
    for ranks, local in zip(of.slices, ceiling.slices, strict=True):
        seconds = {phase: statistics.mean(s.phases[phase] for s in ranks) for phase in ranks[0].phases}
        whole = statistics.mean(s.seconds for s in ranks)
        computing = seconds["forward"] + seconds["backward"] + seconds["optimizer"]
        alone = statistics.mean(s.seconds for s in local)
        reduction = max(0.0, computing - alone) if of.cell != "single" else 0.0
        data = seconds["data"]
        rows.append(
            (data / whole, (computing - reduction) / whole, reduction / whole, (whole - data - computing) / whole)
        )
    medians = map(statistics.median, zip(*rows, strict=True))
    return dict(zip(("data", "compute", "reduction", "rest"), medians, strict=True))


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """25%, 50% and 75%."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def percentile_95(values: Sequence[float]) -> float:
    """95% of the values are below."""
    return statistics.quantiles(values, n=20, method="inclusive")[18] if len(values) > 1 else values[0]


def summary(run: Run, runs: Sequence[Run]) -> dict[str, Any]:
    """The numbers of a row; None for what was not measured."""
    found: dict[str, Any] = {
        "run": run.title, "ranks": run.ranks, "batch_size": run.batch_size, "why": run.why,
        "start_s": statistics.median(run.starts_s) if run.starts_s else None,
        "peak_mib": statistics.median(run.peak_bytes) / 2**20 if run.peak_bytes else None,
    }  # fmt: skip
    if not run.slices:
        return found
    low, middle, high = quartiles(run.rates())
    steps = run.step_ms()
    found |= {
        "samples_per_s": middle, "spread": (high - low) / middle,
        "step_ms_p50": statistics.median(steps), "step_ms_p95": percentile_95(steps),
    }  # fmt: skip
    same = [r for r in runs if r.batch_size == run.batch_size and r.slices]
    ceiling = next((r for r in same if r.name == CEILING and (r.cell, r.ranks) == (run.cell, run.ranks)), None)
    if ceiling is not None and ceiling is not run:
        found["to_ceiling"] = statistics.median(ratio(run, ceiling).by_round)
    single = next((r for r in same if r.name == OURS and r.cell == "single"), None)
    if run.name == OURS:
        if ceiling is not None:
            found["shares"] = shares(run, ceiling)
        if single is not None and len(single.slices) == len(run.slices):
            found["scaling"] = statistics.median(ratio(run, single).by_round) / run.ranks
    return found


def line(row: dict[str, Any], run: Run) -> str:
    """A row for people."""
    head = f"{run.batch_size:>6} {run.label:<18} {run.ranks:>5} "
    if "samples_per_s" not in row:
        return head + (f"{'failed' if run.failed else 'not run'}: {run.why}" if run.why else "not run")

    def show(value: float | None, form: str, width: int) -> str:
        return f"{'-' if value is None else format(value, form):>{width}}"

    parts = row.get("shares", {})
    return (
        head
        + f"{row['samples_per_s']:>9,.0f} {row['spread']:>6.0%} {show(row.get('to_ceiling'), '.2f', 8)} "
        + f"{row['step_ms_p50']:>7.2f} {row['step_ms_p95']:>7.2f} {show(row['start_s'], '.1f', 7)} "
        + "".join(show(parts.get(part), ".0%", 5) + " " for part in ("data", "compute", "reduction", "rest"))
        + f"{show(row['peak_mib'], ',.0f', 6)} {show(row.get('scaling'), '.2f', 7)}"
    )
