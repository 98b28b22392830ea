"""compile.scope: step is the ordinary loop, with nothing left to the host: the same bits, and no wait between lines.

What CUDA does is replayed here without it: a tape of the operations of one step, run again on the same tensors. What
the host decides at each step, a tape repeats as it was, as a graph would. With a CUDA device the same tests run there.
"""

import dataclasses
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_train import backends
from dist_train.config.load import load
from dist_train.config.tree import CompileConfig, Config, ModelConfig, OptimConfig
from dist_train.errors import ConfigError
from dist_train.loop import captured, optim
from dist_train.loop.captured import Captured, Graphs, NoGraphs
from dist_train.loop.meter import Control, Meter, Result
from dist_train.loop.train import train
from dist_train.loop.work import Work
from dist_train.ranks.dist import World
from dist_train.ranks.launcher import Launcher
from dist_train.run import assemble
from dist_train.run.check import check
from dist_train.tools.agreement import Trajectory, difference
from dist_train.tools.trajectory import Recorder, measured

from parity_cells import ALONE, config
from resume_cells import run_series, saving

NO_CUDA = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device: only there are graphs captured"
)
STEP = CompileConfig(scope="step")
NOTHING = nullcontext()


class Tape(TorchDispatchMode):
    """Records operations, to do them again on the tensors that they had."""

    # What a capture does not allow: the host would read a value, or give one.
    WAITS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default}
    GIVES = {torch.ops.aten.lift_fresh.default}

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable, tuple, dict, Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in self.WAITS | self.GIVES:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def play(self) -> None:
        """All of it again."""
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            if not any(r.alias_info for r in func._schema.returns):  # neither a view nor in place
                for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor):
                        old.copy_(new)


@pytest.fixture
def taped(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    """The tapes that stand for graphs. As recording does a step, and capturing does not, the first replay is that."""
    tapes: list[Tape] = []

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        with Tape() as tape:
            function()
        tapes.append(tape)
        todo: Iterator[Callable[[], None]] = iter([lambda: None])
        return lambda: next(todo, tape.play)()

    monkeypatch.setattr(NoGraphs, "capture", capture)
    return tapes


def with_(cell: Config, **sections: dict) -> Config:
    """The config with keys of sections changed."""
    changed = {name: dataclasses.replace(getattr(cell, name), **keys) for name, keys in sections.items()}
    return dataclasses.replace(cell, **changed)


class Normed(nn.Sequential):
    """What a layer keeps besides weights, and draws."""

    def __init__(self, input_shape, classes):
        super().__init__(nn.Flatten(), nn.Linear(36, 20), nn.BatchNorm1d(20), nn.Dropout(0.3), nn.Linear(20, classes))


class Asks(nn.Linear):
    """Waits for the device in its forward."""

    def __init__(self, input_shape, classes):
        super().__init__(36, classes)

    def forward(self, x):
        out = super().forward(x.flatten(1))
        return out * 2 if out.max().item() > 1e9 else out


BASE = config()
NESTEROV = OptimConfig(name="SGD", lr=0.003, momentum=0.9, weight_decay=0.01, args={"nesterov": True})
GROUPS = [{"match": "*.bias", "lr": 0.001, "weight_decay": 0.0}, {"match": "layers.1.*", "lr": 0.006}]
GROUPED = OptimConfig(name="AdamW", lr=0.003, groups=GROUPS, schedule="linear", warmup_steps=5, ema=0.9, ema_start=4)
AMSGRAD = OptimConfig(name="Adam", lr=1e-3, args={"amsgrad": True}, schedule="cosine", warmup_steps=5)
CELLS = {
    "SGD": BASE,
    "AdamW": config(optimizer="AdamW"),
    "schedule, pieces, clipping": config(optimizer="linear", micro_batch_size=20, clips=True),
    "nesterov": dataclasses.replace(BASE, optim=NESTEROV),
    "amsgrad, cosine": dataclasses.replace(config(clips=True), optim=AMSGRAD),
    "groups, averages": dataclasses.replace(with_(BASE, train={"eval_every_steps": 5}), optim=GROUPED),
    "steps": with_(BASE, optim={"schedule": "step", "step_size": 5, "gamma": 0.5}),
    "dropout": with_(config(optimizer="AdamW", micro_batch_size=30), model={"dropout": 0.5}),
    "what layers keep": dataclasses.replace(BASE, model=ModelConfig(f"{__name__}:Normed")),
    "drop_last": with_(BASE, train={"drop_last": True}),
    "one batch an epoch": with_(BASE, train={"global_batch_size": 131}),
    "mse": with_(BASE, data={"one_hot": True}, task={"loss": "mse"}),
    "bfloat16": config(precision="bfloat16"),
}


def in_steps(cell: Config) -> Config:
    return dataclasses.replace(cell, compile=STEP)


def same_bits(a: Trajectory, b: Trajectory) -> bool:
    same = a.losses == b.losses and a.grad_norms == b.grad_norms and a.evaluation == b.evaluation
    return same and all((a.weights[name] == b.weights[name]).all() for name in b.weights)


def run(cell: Config) -> Trajectory:
    return measured(cell, ALONE)[0]


@pytest.mark.parametrize("name", CELLS)
def test_the_same_bits_as_the_ordinary_loop(name: str):
    assert same_bits(run(in_steps(CELLS[name])), run(CELLS[name]))


@pytest.mark.parametrize("name", CELLS)
def test_the_host_decides_nothing(name: str, taped: list[Tape]):
    assert same_bits(run(in_steps(CELLS[name])), run(CELLS[name]))
    assert len(taped) == (1 if name in ("drop_last", "one batch an epoch") else 2)  # else the last batch is smaller


def on_cuda(cell: Config) -> tuple[Trajectory, Result]:
    world = World(0, 1, 0, 1, torch.device("cuda", 0), "none")
    return measured(with_(cell, train={"device": "cuda"}), world)


@NO_CUDA
@pytest.mark.parametrize(
    ("name", "mode"), [*((name, "off") for name in CELLS), ("schedule, pieces, clipping", "default")]
)
def test_a_graph_is_the_ordinary_loop(name: str, mode: str):
    """A learning rate is rounded to float32 there."""
    cell = dataclasses.replace(CELLS[name], compile=CompileConfig(mode, "step"))
    got, result = on_cuda(cell)
    assert difference(got, on_cuda(CELLS[name])[0]).worst < (1e-2 if name == "bfloat16" else 1e-5)
    assert result.prepare_s > 0


# -- planted faults ----------------------------------------------------------------------------------------------------


def rates_late(self: Captured, epoch: int, first: int) -> None:
    BEGIN(self, epoch, first)
    self.rates.copy_(self.rates.roll(1))


def order_of_the_first_epoch(self: Captured, epoch: int, first: int) -> None:
    BEGIN(self, 0, first)


def not_moved(self: Captured, count: int, measure: bool) -> None:
    one_step(self, count, measure)
    self.step.sub_(1)


def losses_in_one_place(self: Captured, count: int, measure: bool) -> None:
    one_step(self, count, measure)
    self.place.zero_()


def rate_of_the_host(self: Captured, count: int, measure: bool) -> None:
    self.backend.optimizer.param_groups[0]["lr"] = float(self.rates[int(self.step)])
    one_step(self, count, measure)


def gradients_kept(self: Captured, count: int) -> None:
    self._gradients(count)


BEGIN, one_step = Captured.begin, Captured._step
FAULTS = {
    "rates_late": ("begin", "schedule, pieces, clipping"),
    "order_of_the_first_epoch": ("begin", "SGD"),
    "not_moved": ("_step", "SGD"),
    "losses_in_one_place": ("_step", "SGD"),
    "gradients_kept": ("_warm_up", "what layers keep"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen(fault: str, taped: list[Tape], monkeypatch: pytest.MonkeyPatch):
    where, name = FAULTS[fault]
    cell = with_(CELLS[name], track={"every_steps": 5})  # several losses wait in their places
    expected = losses(cell)
    assert losses(in_steps(cell)) == expected
    monkeypatch.setattr(Captured, where, globals()[fault])
    assert losses(in_steps(cell)) != expected


def losses(cell: Config) -> list[float]:
    """Those of the lines, and the loss at the end."""
    recorder, result = trained(cell, lambda meter: None)
    return [line["train/loss"] for line in recorder.steps] + [result.evaluation["eval/loss"]]


def test_what_the_host_decides_a_tape_repeats(taped: list[Tape], monkeypatch: pytest.MonkeyPatch):
    """The learning rate as a number of the host, read outside of the device: the capture itself does not allow it."""
    monkeypatch.setattr(Captured, "_step", rate_of_the_host)
    with pytest.raises(RuntimeError, match="not permitted"):
        run(in_steps(CELLS["schedule, pieces, clipping"]))
    monkeypatch.setattr(Tape, "WAITS", set())
    name = "schedule, pieces, clipping"
    assert not same_bits(run(in_steps(CELLS[name])), run(CELLS[name]))


# -- waiting -----------------------------------------------------------------------------------------------------------


class Waits(TorchDispatchMode):
    """Counts the values that the host reads."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in Tape.WAITS
        return func(*args, **(kwargs or {}))


def trained(
    cell: Config,
    after_step: Callable[[Meter], None],
    world: World = ALONE,
    around: AbstractContextManager = NOTHING,
    control: Control | None = None,
) -> tuple[Recorder, Result]:
    parts = assemble.build(cell, world.device)
    backend = backends.create(cell, world, parts.findings)
    model, optimizer = backend.prepare(parts.model, optim.factory(cell.optim))
    recorder = Recorder()
    of = cell, world, backend, model, optimizer, parts.task, parts.feed, parts.evaluation(cell, world), recorder
    with around:
        return recorder, train(Work(*of, control or Control(), after_step))


def waits_by_step(cell: Config) -> list[int]:
    """How often the host read a value in each step."""
    waits, counts = Waits(), [0]
    trained(with_(cell, track={"every_steps": 4}), lambda meter: counts.append(waits.count), around=waits)
    return [after - before for before, after in zip(counts, counts[1:], strict=False)]


@pytest.mark.parametrize("of", [lambda cell: cell, in_steps], ids=["model", "step"])
def test_nothing_waits_between_lines(of: Callable[[Config], Config]):
    counts = waits_by_step(of(config(optimizer="AdamW", micro_batch_size=20)))
    assert len(counts) == 24
    assert [step for step, count in enumerate(counts, 1) if count] == [4, 8, 12, 16, 20, 24]


def test_a_wait_is_seen():
    asking = dataclasses.replace(BASE, model=ModelConfig(f"{__name__}:Asks"))
    assert all(waits_by_step(asking))


@NO_CUDA
@pytest.mark.parametrize("of", [lambda cell: cell, in_steps], ids=["model", "step"])
def test_nothing_waits_for_cuda_between_lines(of: Callable[[Config], Config]):
    cell = with_(of(config(optimizer="AdamW", clips=True)), track={"every_steps": 12}, train={"device": "cuda"})
    watched = []

    def after_step(meter: Meter) -> None:
        done = meter.result.steps
        watch = done > 6 and not meter.due(done + 1)  # both kinds of steps are captured in the first two epochs
        torch.cuda.set_sync_debug_mode("error" if watch else "default")
        watched.append(watch)

    try:
        trained(cell, after_step, World(0, 1, 0, 1, torch.device("cuda", 0), "none"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sum(watched) > 12


# -- in a run ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["schedule, pieces, clipping", "dropout"])
def test_cut_off_in_the_middle_of_an_epoch(name: str, tmp_path: Path, taped: list[Tape]):
    cell = in_steps(CELLS[name])
    of = lambda folder, cut: (saving(cell, tmp_path / folder), cut)  # noqa: E731
    alone, _, resumed = run_series([of("alone", None), of("cut", 7), of("cut", None)])
    assert all((resumed.weights[name] == value).all() for name, value in alone.weights.items())
    assert resumed.metrics == alone.metrics


def test_it_resumes_what_the_ordinary_loop_saved(tmp_path: Path):
    runs = [(saving(CELLS["AdamW"], tmp_path / "alone"), None), (saving(CELLS["AdamW"], tmp_path / "cut"), 7)]
    alone, _, resumed = run_series([*runs, (saving(in_steps(CELLS["AdamW"]), tmp_path / "cut"), None)])
    assert all((resumed.weights[name] == value).all() for name, value in alone.weights.items())


def test_what_is_done_once_is_timed_apart(monkeypatch: pytest.MonkeyPatch):
    """Neither a step's time nor the training's."""
    monkeypatch.setattr(captured, "WARM_UPS", 100)
    result = measured(in_steps(BASE), ALONE)[1]
    assert result.prepare_s > max(result.first_step_s, result.train_s / 24)
    assert result.train_s >= sum(result.step_ms) / 1e3


def test_it_stops_when_asked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("dist_train.loop.meter.AGREE_EVERY_S", 0.0)
    control, agreed = Control(), []

    def after_step(meter: Meter) -> None:
        agreed.append(meter.requests.stop_agreed)
        if meter.result.steps == 10:
            meter.requests.stopping = float(signal.SIGTERM)

    trained(in_steps(BASE), after_step, control=control)
    assert agreed[9:12] == [None, "SIGTERM on rank 0", "SIGTERM on rank 0"]


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "launcher", "line"),
    [
        (
            [],
            Launcher("torchrun", world_size=2, local_world_size=2),
            "compile.scope: got step with backend ddp, expected single",
        ),
        (["--compile.mode=reduce-overhead"], Launcher(), "compile.mode: got reduce-overhead with compile.scope step"),
        (["--train.nonfinite=skip"], Launcher(), "train.nonfinite: got skip with compile.scope step"),
        (["--train.precision=float16"], Launcher(), "train.precision: got float16 with compile.scope step"),
        (["--train.precision=float64"], Launcher(), "train.precision: got float64 with compile.scope step"),
        (["--optim.name=RMSprop"], Launcher(), "optim.name: got RMSprop with compile.scope step, expected one of SGD"),
        (["--optim.args.foreach=true"], Launcher(), "optim.args.foreach: got True, but compile.scope step decides it"),
    ],
    ids=lambda value: " ".join(value) or "ddp" if isinstance(value, list) else "",
)
def test_what_cannot_be_captured_is_refused(options: list[str], launcher: Launcher, line: str):
    with pytest.raises(ConfigError) as error:
        check(load(["--compile.scope=step", *options]), launcher)
    assert [got for got in error.value.lines if got.startswith(line)] == list(error.value.lines)


def test_data_in_files_is_refused():
    cell = dataclasses.replace(BASE, data=dataclasses.replace(BASE.data, name="user_data:squares", args={}))
    with pytest.raises(ConfigError, match="compile.scope: got step, but the training samples are read from files"):
        assemble.build(in_steps(cell), ALONE.device)


def test_a_failed_capture_is_one_line(monkeypatch: pytest.MonkeyPatch):
    """As torch fails: once in the middle, and again at the end."""

    @contextmanager
    def graph(*_: object) -> Iterator[None]:
        try:
            yield
        finally:
            raise RuntimeError("capture was invalidated\nand more")

    for name in ("Stream", "graph_pool_handle", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "graph", graph)

    def asks() -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    with pytest.raises(
        ConfigError, match="captured as a CUDA graph: operation not permitted when stream is capturing;"
    ):
        Graphs(torch.device("cuda", 0)).capture(asks)
