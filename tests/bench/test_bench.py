"""The bench: its command, what it is measured beside, and that it sees what is slow."""

import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from dist_train import backends
from dist_train.bench import lead, plot, ranks, table
from dist_train.bench.references import references
from dist_train.bench.slices import BARE, CEILING, OURS, TUTORIAL, WARM_STEPS, Slice
from dist_train.bench.table import Run
from dist_train.bench.turns import Held
from dist_train.config.load import load
from dist_train.config.tree import BackendConfig, Config
from dist_train.data.sets import Data, FromFiles
from dist_train.errors import ConfigError
from dist_train.loop import optim
from dist_train.loop.meter import Control
from dist_train.loop.train import train
from dist_train.loop.work import Work
from dist_train.ranks import dist
from dist_train.ranks.dist import World
from dist_train.ranks.launcher import Launcher
from dist_train.ranks.phases import NAMES
from dist_train.run import assemble
from dist_train.tools import bench
from dist_train.tools.trajectory import Recorder

from workers import run_ranks

STEPS, REPEATS = 3, 2
SMALL = ["--data.name=synthetic", "--data.args.n=128", "--data.args.n_test=8", "--data.args.shape=[1,6,6]"]
SMALL += ["--model.hidden=[8]", "--train.device=cpu", "--train.threads=1"]
SLEEP_S = 0.01


class Slow(Dataset):
    """Takes its time for every sample."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        time.sleep(SLEEP_S)
        return torch.full((4,), i / 16), i % 2


def slow(root: str, download: bool) -> Data:
    return Data(FromFiles(Slow()), FromFiles(Slow()), input_shape=(4,), classes=("a", "b"))


def command(*options: str, file: Path) -> tuple[subprocess.CompletedProcess, dict]:
    """The real command, which finds the data set of this file; and its JSON."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])}
    words = [sys.executable, "-m", "dist_train", "bench", *options, "--train.device=cpu", "--json", str(file)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=240, check=False, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    return done, json.loads(file.read_text(encoding="utf-8"))


def test_the_table_and_its_json_say_what_the_slices_do(tmp_path: Path):
    own = ["--backends=single,ddp,deepspeed:1", "--optim.name=Adafactor", "--batch-sizes=8", "--starts=0"]
    own += [f"--steps={STEPS}", f"--repeats={REPEATS}", "--plot", str(tmp_path / "bench.png")]
    done, tree = command(*SMALL, *own, "--checkpoint.every_steps=5", file=tmp_path / "bench.json")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    runs = {(run["cell"], run["ranks"], run["name"]): run for run in tree["runs"]}
    single, two = (("single", 1, name) for name in (OURS, CEILING, BARE, TUTORIAL)), ("ddp", 2)
    names = [*single, *((*two, name) for name in (OURS, CEILING, BARE))]
    assert list(runs) == [*names, ("deepspeed:1", 2, OURS)]
    for name in names:
        slices = runs[name]["slices"]
        assert [len(by_rank) for by_rank in slices] == [name[1]] * REPEATS
        for one in itertools.chain(*slices):
            assert (one["steps"], len(one["step_ms"])) == (STEPS, STEPS)
            assert sum(one["step_ms"]) == pytest.approx(one["seconds"] * 1e3, rel=0.2)
            within = sum(one["phases"].values())
            assert within == pytest.approx(one["seconds"] if name[2] == OURS else 0, rel=0.2)

    def rates(cell: str, size: int, name: str) -> list[float]:
        slices = runs[cell, size, name]["slices"]
        return [8 * STEPS / max(one["seconds"] for one in by_rank) for by_rank in slices]

    said = {(ratio["of"], ratio["to"]): ratio for ratio in tree["ratios"]}
    for of, to, a, b in [
        ("single x1", "ceiling x1", names[0], names[1]),
        ("single x1", "bare single x1", names[0], names[2]),
        ("single x1", "tutorial", names[0], names[3]),
        ("ddp x2", "ceiling x2", names[4], names[5]),
        ("ddp x2", "bare ddp x2", names[4], names[6]),
    ]:
        by_round = [x / y for x, y in zip(rates(*a), rates(*b), strict=True)]
        assert said.pop((of, to))["by_round"] == pytest.approx(by_round)
        assert f"{of} / {to}" in done.stdout
    assert not said
    rows = {(row["run"], row["ranks"]): row for row in tree["rows"]}
    assert rows["single x1", 1]["samples_per_s"] == pytest.approx(statistics.median(rates(*names[0])))
    scaling = statistics.median(a / b / 2 for a, b in zip(rates(*names[4]), rates(*names[0]), strict=True))
    assert rows["ddp x2", 2]["scaling"] == pytest.approx(scaling)
    assert sum(rows["ddp x2", 2]["shares"].values()) == pytest.approx(1, abs=0.2)  # medians of each
    assert rows["ddp x2", 2]["start_s"] > 0 and rows["ddp x2", 2]["peak_mib"] > 50
    assert "got Adafactor" in rows["deepspeed:1 x2", 2]["why"]
    assert [line for line in done.stdout.splitlines() if "not run: optim.name" in line]
    assert tree["machine"]["before"]["cores"] > 0 and tree["versions"]["torch"] == torch.__version__.partition("+")[0]


def test_a_slow_feed_is_seen(tmp_path: Path):
    own = [f"--data.name={__name__}:slow", "--model.hidden=[4]", "--backends=single", "--batch-sizes=4", "--repeats=2"]
    own += ["--starts=0", "--steps=3", "--train.threads=1"]
    _, tree = command(*own, file=tmp_path / "bench.json")
    ours, ceiling, _ = tree["rows"]  # no tutorial, as there are no pictures
    assert ours["shares"]["data"] > 0.5 and ours["to_ceiling"] < 0.5
    assert ours["step_ms_p50"] > 4 * SLEEP_S * 1e3 > ceiling["step_ms_p50"]


def test_a_reference_starts_alone():
    config = lead.Cell("single", 1, bench.for_bench(load([*SMALL, "--backend.name=single"]), 1)).with_batch(8, 1)
    with ranks.of(config, TUTORIAL, 1) as processes:
        processes.end()
    (ready,) = processes.ready
    assert 0 < ready.step_s < processes.start_s and ready.peak_bytes > 50 << 20 and ready.threads >= 1


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--world-sizes=2,x"], "--world-sizes: got 'x'"),
        (["--batch-sizes=0"], "--batch-sizes: got '0'"),
        (["--repeats=0"], "--repeats: got '0'"),
        (["--starts=-1"], "--starts: got '-1'"),
        (["--starts=0"], "--starts: got 0 without --steps"),
        (["--steps=x"], "--steps: got 'x'"),
        (["--backends=single,dpp"], "--backends: got unknown backend 'dpp'"),
        (["--plot"], "bench: got --plot without a value"),
        (["--plot=/proc/nowhere/bench.png"], "--plot: got /proc/nowhere/bench.png, which cannot be written"),
        (["--json=/proc"], "--json: got /proc, which is a folder, expected a file"),
        (["--optim.lrr=1"], "optim: got unknown key 'lrr'"),
        (["--optim.name=SDG"], "optim.name: got unknown optimizer 'SDG'"),
    ],
)
def test_a_bad_option_is_one_line(options: list[str], line: str):
    with pytest.raises(ConfigError) as refused:
        bench.run(options, Launcher())
    assert len(refused.value.lines) == 1 and refused.value.lines[0].startswith(line)


def test_a_launcher_and_a_missing_library_are_refused(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match="bench: got torchrun, expected to be started alone"):
        bench.run([], Launcher("torchrun", 0, 2, 0, 2))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match="--plot: got no matplotlib.*dist-train.report."):
        bench.run(["--plot=x.png"], Launcher())


# -- the processes ----------------------------------------------------------------------------------------------------


def fake(tmp_path: Path, *lines: str) -> ranks.Ranks:
    """A process that says something else than a rank."""
    program = tmp_path / "program.py"
    program.write_text("\n".join(lines), encoding="utf-8")
    return ranks.Ranks([str(program)], "ours", 1, bench.for_bench(Config(), 1), by_torchrun=False)


@pytest.mark.parametrize(
    ("lines", "said", "refused"),
    [
        (["print('odd'); raise SystemExit(3)"], "odd", False),
        (["import sys; print('dist_train: data.root: got x', file=sys.stderr); sys.exit(2)"], "data.root: got x", True),
        (["raise SystemExit(4)"], "exit code 4", False),
        (
            [
                *("import os, sys", "from multiprocessing.connection import Client"),
                *("Client(sys.argv[1] + '/leader.sock', family='AF_UNIX').send(0)", "raise RuntimeError('half way')"),
            ],
            "RuntimeError: half way",
            False,
        ),
    ],
)
def test_a_rank_that_ends_says_why(tmp_path: Path, lines: list[str], said: str, refused: bool):
    with pytest.raises(ranks.NotRun) as error, fake(tmp_path, *lines):
        pass
    assert (str(error.value), error.value.refused) == (said, refused)


def test_a_rank_that_is_silent_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ranks, "START_S", 0.1)
    silent = fake(tmp_path, "import time", "time.sleep(600)")
    with pytest.raises(ranks.NotRun, match="did not answer in time"), silent:
        pass
    assert silent.process is not None and silent.process.returncode is not None


def test_a_cell_that_fails_does_not_end_the_others(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    class Ours:
        """Ranks that fail in the second round, if they are ddp."""

        def __init__(self, config: Config, name: str, size: int):
            self.config, self.ready, self.start_s, self.turns = config, [Ready()], 1.0, 0

        def __enter__(self) -> "Ours":
            return self

        def __exit__(self, *_) -> None:
            pass

        def warm(self) -> None:
            pass

        end = warm

        def turn(self, name: str, steps: int) -> list[Slice]:
            self.turns += 1
            if self.config.backend.name == "ddp" and self.turns == 3:
                raise ranks.NotRun("[rank 1] broke")
            return [Slice(steps, 1.0, 1.0, [1.0] * steps, dict.fromkeys(NAMES, 0.1))]

    class Ready:
        step_s, peak_bytes, references, device, versions = 1e-3, 2**20, (CEILING,), "none", {}

    monkeypatch.setattr(ranks, "of", Ours)
    code = bench.run([*SMALL, "--batch-sizes=8", "--steps=2", "--repeats=3"], Launcher())
    out = capsys.readouterr().out
    assert [line.split()[2:4] for line in out.splitlines() if "started in" in line] == [
        ["single", "x1"], ["ceiling", "x1"], ["ddp", "x2"],  # alone; the ceiling of two ranks is that of one
        ["single", "x1"], ["ddp", "x2"],  # to take turns
    ]  # fmt: skip
    assert code == 1 and "failed: [rank 1] broke" in out
    assert "single x1 / ceiling x1" in out and "ddp x2 / ceiling x2" not in out


# -- turns -------------------------------------------------------------------------------------------------------------


class Turns:
    """The leader's side of three slices; a while passes between them."""

    device = torch.device("cpu")

    def __init__(self, clock: "Clock"):
        self.clock, self.said, self.left = clock, [], [4, 2, 5, 0]

    def first_step(self) -> None:
        self.said.append("first step")

    def ready(self, ends: list[float], references: dict) -> None:
        self.said.append(len(ends))

    def give(self, measured: Slice) -> None:
        self.said.append(measured)

    def wait(self, others: dict, alive) -> int:
        self.clock.now += 1000
        return self.left.pop(0)


class Clock:
    """A time that passes when it is told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_slice_is_the_steps_that_were_asked_for_and_nothing_between(monkeypatch: pytest.MonkeyPatch):
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    turns = Turns(clock)
    phases, step = Held(turns, {}), 0
    while turns.left:
        step += 1
        phases("data")
        clock.now += 0.5
        phases("forward")
        clock.now += 2
        phases("reduce")
        if step % 4 == 0:
            phases.take()  # as the meter does
        clock.now += 0.25
        phases.progressed(step)
    assert turns.said[:2] == ["first step", WARM_STEPS]
    slices = turns.said[2:]
    assert [one.steps for one in slices] == [4, 2, 5]
    for one in slices:
        assert one.seconds == pytest.approx(2.75 * one.steps)
        assert one.step_ms == pytest.approx([2750.0] * one.steps)
        assert one.phases["data"] == pytest.approx(0.5 * one.steps)
        assert one.phases["forward"] == pytest.approx(2 * one.steps)
        assert sum(one.phases.values()) == pytest.approx(one.seconds)
    assert step == lead.steps_of(4, 1) + lead.steps_of(2, 1) + lead.steps_of(5, 1) - 2 * WARM_STEPS


# -- what it is measured beside ----------------------------------------------------------------------------------------


def after(config: Config, world: World, name: str, steps: int) -> dict[str, np.ndarray]:
    """The weights after some steps of a reference."""
    parts = assemble.build(config, world.device)
    reference = references(config, world, parts)[name]
    for _ in range(steps):
        next(reference)
    model = reference.gi_frame.f_locals["model"]
    return {k: getattr(v, "full_tensor", lambda v=v: v)().detach().numpy() for k, v in model.state_dict().items()}


def after_ours(config: Config, world: World) -> dict[str, np.ndarray]:
    """The weights after all steps of ours."""
    parts = assemble.build(config, world.device)
    backend = backends.create(config, world, parts.findings)
    model, optimizer = backend.prepare(parts.model, optim.factory(config.optim))
    of = config, world, backend, model, optimizer, parts.task, parts.feed, parts.evaluation(config, world)
    train(Work(*of, Recorder(), Control(), lambda meter: None))
    return {name: value.numpy() for name, value in backend.weights().items()}


def both(name: str, backend: str, size: int, steps: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A reference and ours, on a rank of a group."""
    config = dataclasses.replace(load([*SMALL, "--train.global_batch_size=8", f"--train.max_steps={steps}"]))
    config = dataclasses.replace(config, backend=BackendConfig(backend))
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    world = World(rank, size, rank, size, torch.device("cpu"), "torchrun" if size > 1 else "none")
    return after(config, world, name, steps), after_ours(config, world)


def same(reference: dict[str, np.ndarray], ours: dict[str, np.ndarray]) -> None:
    assert [value.shape for value in reference.values()] == [value.shape for value in ours.values()]
    for a, b in zip(reference.values(), ours.values(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reference", [CEILING, BARE])
def test_in_one_process_a_reference_takes_the_same_steps(reference: str):
    same(*both(reference, "single", 1, 12))


@pytest.mark.parametrize("backend", ["ddp", "fsdp2"])
def test_a_bare_script_takes_the_same_steps(backend: str):
    for reference, ours in run_ranks(both, 2, BARE, backend, 2, 6):
        if ours:  # fsdp2 gives them to rank 0 alone
            same(reference, ours)


def test_the_tutorial_reads_each_picture_as_torchvision_does():
    from PIL import Image
    from torchvision.transforms import ToTensor

    from dist_train.bench.references import Pictures

    parts = assemble.build(load(SMALL), torch.device("cpu"))
    image, label = Pictures(parts.data.train)[5]
    raw = parts.data.train.tree[0][5, 0].numpy()
    assert torch.equal(image, ToTensor()(Image.fromarray(raw))) and image.shape == (1, 6, 6)
    assert type(label) is int and label == parts.data.train.tree[1][5]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], [CEILING, BARE, TUTORIAL]),
        (["--data.args.shape=[36]"], [CEILING, BARE]),
        (["--data.args.shape=[2,6,6]"], [CEILING, BARE]),
        (["--data.one_hot=true", "--task.loss=mse"], [CEILING, BARE]),
    ],
)
def test_the_tutorial_is_there_where_it_fits(options: list[str], expected: list[str]):
    config = load([*SMALL, *options, "--backend.name=single"])
    device = torch.device("cpu")
    with dist.joined(Launcher(), device) as world:
        found = references(config, world, assemble.build(config, device))
        assert list(found) == expected
        for reference in found.values():
            next(reference)


# -- what is said ------------------------------------------------------------------------------------------------------


def slices(*seconds: float, **phases: float) -> list[list[Slice]]:
    """Rounds of two steps on one rank."""
    none = dict.fromkeys(NAMES, 0.0)
    return [[Slice(2, s, s / 2, [s * 500.0] * 2, none | {k: s * v for k, v in phases.items()})] for s in seconds]


def test_ratios_are_of_the_same_round():
    # The machine slows down tenfold; of each round ours takes half as long again as the other.
    ours = Run("single", OURS, 1, 8, slices=slices(1.5, 15.0, 3.0))
    ceiling = Run("single", CEILING, 1, 8, slices=slices(1.0, 10.0, 2.0))
    found = table.ratio(ours, ceiling)
    assert found.by_round == pytest.approx([2 / 3] * 3) and found.by_cpu_time == pytest.approx([2 / 3] * 3)
    assert statistics.median(found.extra_us) == pytest.approx(5e5)
    assert "0.67 (0.67-0.67)" in found.line() and "+500,000.0 us;" in found.line()


def test_reduction_is_what_computing_takes_longer_than_alone():
    ours = Run("ddp", OURS, 2, 8, slices=slices(1.0, 2.0, data=0.1, forward=0.3, backward=0.4, optimizer=0.1))
    ceiling = Run("ddp", CEILING, 2, 8, slices=slices(0.5, 1.0))
    expected = {"data": 0.1, "compute": 0.5, "reduction": 0.3, "rest": 0.1}
    assert table.shares(ours, ceiling) == pytest.approx(expected)
    alone = dataclasses.replace(ours, cell="single", ranks=1)
    assert table.shares(alone, ceiling) == pytest.approx({"data": 0.1, "compute": 0.8, "reduction": 0, "rest": 0.1})


def test_lines_fit_and_a_long_name_does_not_move_columns():
    ours = Run("deepspeed:3", OURS, 16, 65536, [9.9], [2**33], slices(1.0, 1.5, data=0.1))
    others = [Run("deepspeed:3", name, 16, 65536, slices=slices(1.0, 1.1)) for name in (CEILING, BARE)]
    runs = [ours, *others]
    lines = [table.HEAD, *(table.line(table.summary(run, runs), run) for run in runs)]
    assert {len(line) for line in lines} == {len(table.HEAD)} and len(table.HEAD) <= 120
    assert all(len(ratio.line()) <= 120 for ratio in table.ratios(runs))


def test_the_picture_is_drawn_for_what_ran():
    runs = [Run("single", OURS, 1, 8, slices=slices(1.0)), Run("ddp", OURS, 2, 8, why="not here")]
    assert plot.png(runs).startswith(b"\x89PNG")
