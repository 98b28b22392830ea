"""track.profile: a trace a rank, where the time went and how many FLOPs, and a run that is the same with it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dist_train.backends.precision import Precision
from dist_train.data.sets import Data, InMemory
from dist_train.models.mlp import MLP
from dist_train.run import flops
from dist_train.track import timeline

from checkpoint_runs import DDP, FSDP2, SINGLE, Kind, copy, resumed_from, same, weights
from zygote import Ended, Zygote

STEP_PHASES = ("data", "forward", "backward", "optimizer", "reduce")
PROFILE = ("--track.profile", "{start_step: 4, steps: 3}")
SHORT, SLOW_S = ("--train.max_steps", "7"), 0.1
# Of 16-9-4 on 8 samples: three products a layer, but for the gradient of the inputs.
FLOPS = 6 * 8 * (16 * 9 + 9 * 4) - 2 * 8 * 16 * 9


def events(folder: Path, rank: int = 0) -> list[dict[str, Any]]:
    """The events with a duration of a Chrome trace."""
    trace = json.loads((folder / f"profile/rank{rank}.json").read_text())
    return [event for event in trace["traceEvents"] if event["ph"] == "X"]


def profile_of(folder: Path) -> dict[str, Any] | None:
    return json.loads((folder / "summary.json").read_text()).get("profile")


def most_of(folder: Path) -> str:
    """What took the largest share of time."""
    share = profile_of(folder)["share"]
    return max(share, key=share.get)


def said(ended: Ended, start: str) -> list[str]:
    lines = [line.removeprefix("[rank 0] ") for line in ended.out[0].splitlines()]
    return [line for line in lines if line.startswith(start)]


@pytest.mark.parametrize("kind", [SINGLE, DDP, FSDP2], ids=lambda kind: kind.backend)
def test_a_profiled_run_is_the_same_run_with_a_trace(kind: Kind, zygote: Zygote, references, tmp_path: Path):
    ended = zygote.run(kind.run(tmp_path, *PROFILE))[0].check()
    assert same(weights(tmp_path), references(kind).weights) and not any(ended.err)
    for rank in range(kind.ranks):
        found = events(tmp_path, rank)
        ranges = [e for e in found if e["cat"] == "user_annotation" and e["name"] in STEP_PHASES]
        assert [e["name"] for e in sorted(ranges, key=lambda e: e["ts"])] == 3 * list(STEP_PHASES)
        assert {"aten::addmm", "aten::mm"} <= {e["name"] for e in found}
        assert (kind is SINGLE) != any(e["name"].startswith("gloo:") for e in found)
    assert [path.name for path in sorted((tmp_path / "profile").iterdir())] == [
        f"rank{rank}.json" for rank in range(kind.ranks)
    ]
    profile = profile_of(tmp_path)
    assert profile["flops_per_step"] == FLOPS and profile["tflops"] > 0
    assert sum(profile["share"].values()) == pytest.approx(1) and min(profile["share"].values()) >= 0
    assert list(profile["share"]) == ["data", "forward", "backward", "reduction", "optimizer", "other"]
    assert len(said(ended, "profiled steps 4 to 6;")) == len(said(ended, "time: data ")) == 1
    (rate,) = said(ended, "6.")
    assert rate.startswith("6.336 kFLOP a step, ") and "(steps 7 to 9, without the profiler)" in rate
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    (line,) = [line for line in lines if "profile/tflops" in line]
    assert line["step"] == 9 and line["profile/share/data"] == profile["share"]["data"]


def test_a_slow_phase_is_seen(zygote: Zygote, tmp_path: Path):
    before = {"data": "forward", "backward": "optimizer", "other": "data"}  # a step sleeps at the end of the phase
    zygote.run(*[
        SINGLE.run(tmp_path / phase, *PROFILE, *SHORT, plant={0: ("patient_steps", SLOW_S, then)})
        for phase, then in before.items()
    ])  # fmt: skip
    for phase in before:
        assert most_of(tmp_path / phase) == phase


@pytest.mark.parametrize("kind", [DDP, FSDP2], ids=lambda kind: kind.backend)
def test_the_wait_for_a_slow_rank_is_reduction(kind: Kind, zygote: Zygote, tmp_path: Path):
    ended = zygote.run(kind.run(tmp_path, *PROFILE, *SHORT, plant={1: ("patient_steps", SLOW_S, "forward")}))[0].check()
    profile = profile_of(tmp_path)
    assert most_of(tmp_path) == "reduction" and profile["collectives_in_flight"] >= profile["share"]["reduction"]
    assert said(ended, "reduction is what the rank only waited for: collectives were under way for ")


def test_a_stop_within_the_steps_writes_what_there_is(zygote: Zygote, references, tmp_path: Path):
    argv = ("--track.profile", "{start_step: 3, steps: 8}")
    ended = zygote.run(DDP.run(tmp_path, *argv, plant={0: ("eager", "forward", 4, "SIGTERM"), 1: ("eager",)}))[0]
    assert ended.codes == [75, 75], ended
    stopped = json.loads((tmp_path / "summary.json").read_text())["steps"]
    assert 5 <= stopped < 10
    for rank in (0, 1):
        assert len([e for e in events(tmp_path, rank) if e["name"] == "optimizer"]) == stopped - 2
    assert said(ended, f"profiled steps 3 to {stopped}, {stopped - 2} of the 8 asked for; ")
    assert f"(steps 3 to {stopped}, which the profiler slows)" in ended.out[0]
    ended = zygote.run(DDP.run(tmp_path, *argv))[0].check()
    assert said(ended, f"profiled steps {stopped + 1} to 10, ") and profile_of(tmp_path)
    assert same(weights(tmp_path), references(DDP).weights)


def test_a_run_that_goes_on_after_the_steps_keeps_what_it_knew(zygote: Zygote, cut, tmp_path: Path):
    folder = copy(cut(SINGLE), tmp_path)
    ended = zygote.run(SINGLE.run(folder, *PROFILE))[0].check()
    assert resumed_from(ended) == 9 and not said(ended, "profiled") and not (folder / "profile").exists()
    stops = {0: ("eager", "optimizer", 9, "SIGTERM")}
    assert zygote.run(SINGLE.run(tmp_path / "b", *PROFILE, plant=stops))[0].codes == [75]
    zygote.run(SINGLE.run(tmp_path / "b"))[0].check()
    assert profile_of(tmp_path / "b")["flops_per_step"] == FLOPS


def test_steps_that_the_run_does_not_have(zygote: Zygote, tmp_path: Path):
    late, over = (("--track.profile.start_step", first) for first in ("11", "13"))
    one, two = zygote.run(SINGLE.run(tmp_path / "a", *late), SINGLE.run(tmp_path / "b", *over))
    assert said(one.check(), "profiled steps 11 to 12, 2 of the 5 asked for; ") and profile_of(tmp_path / "a")
    assert said(two.check(), "track.profile: the run ended with step 12, before step 13: no trace")
    assert profile_of(tmp_path / "b") is None


def test_from_the_first_step_on(zygote: Zygote, references, tmp_path: Path):
    zygote.run(SINGLE.run(tmp_path, "--track.profile", "{start_step: 1, steps: 2}"))[0].check()
    assert len([e for e in events(tmp_path) if e["name"] == "optimizer"]) == 2
    assert same(weights(tmp_path), references(SINGLE).weights)


def test_a_model_that_looks_at_values_is_profiled_without_flops(zygote: Zygote, references, tmp_path: Path):
    ended = zygote.run(SINGLE.run(tmp_path, *PROFILE, plant={0: ("looks_at_values",)}))[0].check()
    (line,) = said(ended, "track.profile: FLOPs are not counted")
    assert "DataDependentOutputException" in line and not any(ended.err)
    assert "flops_per_step" not in profile_of(tmp_path) and profile_of(tmp_path)["share"]
    assert same(weights(tmp_path), references(SINGLE).weights)


# -- FLOPs and peaks ---------------------------------------------------------------------------------------------------


class Twice(nn.Module):
    """Convolution and attention, a tied weight, a tensor that is no parameter, and buffers that training changes."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.out = nn.Linear(6, 6)
        self.again = self.out
        self.scale = torch.ones(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(x)).mean((2, 3)) * self.scale
        return self.again(self.out(x))


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float64"])
def test_flops_are_those_of_products_and_convolutions(precision: str):
    how, model = Precision(precision, torch.device("cpu")), Twice()
    before, drawn = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    conv, linear = 2 * 5 * 6 * 9 * 4 * 4, 2 * 5 * 6 * 6  # of 5 samples [1, 6, 6], forward

    def loss_of(twin: nn.Module) -> torch.Tensor:
        return twin(torch.empty(5, 1, 6, 6, dtype=how.dtype)).sum()

    assert flops.of_batch(model.to(how.dtype), loss_of, how) == 2 * conv + 3 * 2 * linear
    assert all(torch.equal(model.state_dict()[k], v.to(model.state_dict()[k].dtype)) for k, v in before.items())
    assert all(p.grad is None for p in model.parameters()) and torch.equal(torch.get_rng_state(), drawn)


@pytest.mark.parametrize("micro", [None, 3])
@pytest.mark.parametrize("ranks", [1, 4])
def test_flops_of_a_step_do_not_depend_on_who_takes_what(ranks: int, micro: int | None):
    from dist_train.config.tree import Config, TrainConfig
    from dist_train.data.feed import Feed
    from dist_train.ranks.dist import World
    from dist_train.run.assemble import Parts
    from dist_train.tasks.classification import Classification

    split = InMemory(torch.zeros(9, 1, 4, 4, dtype=torch.uint8), torch.zeros(9, dtype=torch.int64))
    data, cpu = Data(split, split, (1, 4, 4), tuple("abcd")), torch.device("cpu")
    feed, task = Feed(split, data, cpu, torch.float32, True, False), Classification(classes=4)
    model, how = MLP((1, 4, 4), 4, [9], dropout=0.5), Precision("float32", cpu)
    parts = Parts(data, task, model, {"train": feed}, how, ())
    config = Config(train=TrainConfig(global_batch_size=8, micro_batch_size=micro))
    assert flops.of_step(config, World(0, ranks, 0, ranks, cpu, "torchrun"), parts) == FLOPS


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H200", "bfloat16", 989.4),
        ("NVIDIA H100 80GB HBM3", "tf32", 494.7),
        ("NVIDIA H100 PCIe", "float16", 756),
        ("NVIDIA A100-SXM4-40GB", "float32", 19.5),
        ("NVIDIA A100 80GB PCIe", "bfloat16", 312),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bfloat16", None),
        ("Tesla V100-SXM2-16GB", "float16", 125),
        ("Tesla V100-SXM2-16GB", "bfloat16", None),
        ("NVIDIA L4", "bfloat16", 121),
        ("NVIDIA L40S", "bfloat16", 362),
        ("Tesla T4", "float16", 65),
        ("NVIDIA GeForce RTX 4090", "tf32", 82.6),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "tf32", None),
        ("NVIDIA A10G", "float32", None),
    ],
)
def test_the_peak_of_a_gpu_is_known_or_not_said(name: str, precision: str, peak: float | None):
    assert flops.peak_tflops(name, precision) == peak


# -- shares of a trace -------------------------------------------------------------------------------------------------


def event(cat: str, name: str, begin: float, end: float, tid: int = 1, **args) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": begin, "dur": end - begin, "tid": tid, "args": args}


PHASES = [("data", 0, 100), ("forward", 100, 200), ("backward", 200, 300), ("optimizer", 300, 400)]
PHASES += [("reduce", 400, 500), ("evaluate", 500, 900)]
HOST = [event("user_annotation", name, 10 * begin, 10 * end) for name, begin, end in PHASES]


def shares_of(*more: dict[str, Any]) -> dict[str, float]:
    found = timeline.shares({"traceEvents": [*HOST, *more, {"ph": "i", "name": "data", "ts": 0}]})
    assert sum(found.by_phase.values()) == pytest.approx(1)
    return {**found.by_phase, "in_flight": found.in_flight, "overlapped": found.overlapped}


def near(**expected: float) -> dict[str, Any]:
    whole = dict.fromkeys(("data", "forward", "backward", "reduction", "optimizer", "other"), 0.0)
    return pytest.approx(whole | {"in_flight": 0.0, "overlapped": 0.0} | expected)


def test_shares_on_the_cpu():
    even = dict.fromkeys(("data", "forward", "backward", "optimizer", "other"), 0.2)
    assert shares_of() == near(**even)
    flight = event("user_annotation", "gloo:all_reduce", 2000, 3000, tid=2)
    works = event("cpu_op", "aten::mm", 2000, 2600)
    elsewhere = event("cpu_op", "aten::mm", 2000, 3000, tid=2)  # another thread's work is no reason not to wait
    expected = even | {"backward": 0.12, "reduction": 0.08, "in_flight": 0.2, "overlapped": 0.6}
    assert shares_of(flight, works, elsewhere) == near(**expected)
    around = [event("cpu_op", f"autograd::engine::evaluate_function: {name}", 2000, 3000) for name in "ab"]
    around.append(event("cpu_op", "RegisterPostBackwardFunctionBackward", 2000, 3000))
    assert shares_of(flight, works, elsewhere, *around) == near(**expected)
    busy = [event("cpu_op", "aten::mul", begin, begin + 45) for begin in range(2000, 3050, 50)]
    assert shares_of(flight, *busy) == near(**even, in_flight=0.2, overlapped=1.0)  # Python's pauses are no waiting
    evaluating = event("user_annotation", "gloo:all_reduce", 6000, 8000, tid=2)
    assert shares_of(evaluating) == near(**even)


def test_shares_on_a_device():
    """The host is ahead: what it launched in a phase runs later, and counts for that phase."""

    def kernel(name: str, launched: float, begin: float, end: float, number: int) -> list[dict[str, Any]]:
        launch = event("cuda_runtime", "cudaLaunchKernel", launched, launched + 5, tid=3, correlation=number)
        return [launch, event("kernel", name, begin, end, tid=7, correlation=number)]

    forward = kernel("gemm", 1500, 2000, 3000, 1)
    backward = kernel("gemm", 2500, 3000, 4000, 2)
    reduces = kernel("ncclDevKernel_AllReduce_Sum_f32_RING_LL", 2600, 3500, 4500, 3)
    tests = kernel("gemm", 5500, 6000, 7000, 4) + kernel("ncclDevKernel_AllReduce_Sum_i64", 5600, 7000, 7500, 5)
    # The device idles for 2000 us, half of them in data; then forward, backward, and 500 us of NCCL alone.
    expected = {"data": 0.2, "forward": 0.4, "backward": 0.2, "reduction": 0.1, "other": 0.1}
    expected |= {"in_flight": 0.2, "overlapped": 0.5}
    assert shares_of(*forward, *backward, *reduces, *tests) == near(**expected)


def test_a_trace_without_phases_is_refused():
    with pytest.raises(ValueError, match="without the phases"):
        timeline.shares({"traceEvents": [event("cpu_op", "aten::mm", 0, 1)]})
