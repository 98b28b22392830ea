"""What is planned is what a run then holds: the prediction against the memory that real processes had."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

import dist_train
from dist_train.config.load import load
from dist_train.doctor import traced
from dist_train.doctor.apart import Apart, Failed
from dist_train.doctor.estimate import Estimate
from dist_train.ranks.launcher import Launcher

from language_models import LINES
from zygote import Ended, Run, Zygote

TENTH = 0.1
# 38 million weights, in 3 layers.
LARGE = ["--model.args={layers: 3, width: 1024, heads: 8}", "--data.args.block=128", "--train.global_batch_size=8"]
TINY = ["--model.args={layers: 1, width: 16, heads: 1}", "--data.args.block=8"]
# The number of ranks and what a run is asked for.
SETTINGS: Mapping[str, tuple[int, list[str]]] = {
    "single": (1, ["--backend.name=single"]),
    "ddp": (2, ["--backend.name=ddp"]),
    "fsdp2": (2, ["--backend.name=fsdp2"]),
    "fsdp2, 2 copies": (4, ["--backend.name=fsdp2", "--backend.mesh={replicate: 2, shard: 2}"]),
    "ddp, accumulated": (2, ["--backend.name=ddp", "--train.micro_batch_size=2"]),
}


def options(folder: Path, *more: str) -> list[str]:
    """Of a run of a language model that evaluates nothing."""
    (folder / "corpus.txt").write_text(LINES * 40)
    data = ["--data.name=text", f"--data.root={folder}", "--data.args.files=corpus.txt", "--data.args.test_fraction=0"]
    model = ["--model.name=decoder", "--task.name=language_modelling", "--train.device=cpu", "--train.max_steps=2"]
    return [*data, *model, "--train.threads=1", *more]


def measured(zygote: Zygote, folder: Path, ranks: int, *argv: str) -> int:
    """The most bytes that a rank had in training, of the one that had most."""
    folder.mkdir()
    plant = {rank: ("peak_memory", str(folder / f"peak{rank}")) for rank in range(ranks)}
    run = Run([*options(folder, *argv), f"--run.dir={folder / 'run'}"], ranks, plant, timeout_s=400)
    zygote.run(run)[0].check()
    return max(int((folder / f"peak{rank}").read_text()) for rank in range(ranks))


def predicted(folder: Path, ranks: int, *argv: str) -> Estimate:
    launcher = Launcher("env" if ranks > 1 else "none", 0, ranks, 0, ranks)
    return traced.of_run(load(options(folder, *argv)), launcher)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "fsdp2" else pytest.mark.full) for name in SETTINGS]
)
def test_the_predicted_peak_is_within_a_tenth_of_what_a_run_has(name: str, zygote: Zygote, tmp_path: Path):
    ranks, argv = SETTINGS[name]
    found = predicted(tmp_path, ranks, *argv, *LARGE)
    libraries = measured(zygote, tmp_path / "tiny", ranks, *argv, *TINY, f"--train.global_batch_size={ranks}")
    real = measured(zygote, tmp_path / "large", ranks, *argv, *LARGE) - libraries
    assert found.peak.total == pytest.approx(real, rel=TENTH), found
    forgotten = {"gathered", "optimizer"} if "fsdp2" in name else {"optimizer"}
    for kind in forgotten:  # an estimate without them would be seen
        assert found.peak.total - found.peak.parts[kind] != pytest.approx(real, rel=TENTH), (kind, found)


# -- the command -------------------------------------------------------------------------------------------------------

MLP = ["--data.args={}", "--model.hidden=[256, 256]", "--train.device=cpu", "--train.eval_batch_size=1"]
WEIGHTS = 4 * (64 * 256 + 256 + 256 * 256 + 256 + 256 * 10 + 10)


def planned(zygote: Zygote, *argv: str) -> Ended:
    (ended,) = zygote.run(Run(["plan", *MLP, *argv], timeout_s=150.0))
    return ended


def tree(ended: Ended) -> dict:
    return json.loads(ended.out[0])


def test_what_each_sends_and_which_is_recommended(zygote: Zygote):
    asked = ["--json", "--ranks=4", "--per-node=2", "--gb-per-s=100,1", "--memory=1GB"]
    found = tree(planned(zygote, *asked, "--meshes=ddp, fsdp2, deepspeed:3", "--micro-batch-sizes=16,4").check())
    by = {(one["name"], one["micro_batches"]): one for one in found["candidates"]}
    sent = {key: sum(to["bytes"] for to in one["sent"]) for key, one in by.items()}
    assert list(by) == [(name, n) for name in ("ddp", "fsdp2", "deepspeed:3") for n in (1, 4)]
    # Of the whole, each of 4 ranks passes on three quarters: twice where it is summed for all. The rest is the norm.
    passed = WEIGHTS * 3 // 4
    assert sent["ddp", 1] == sent["ddp", 4] == 2 * passed
    assert sent["deepspeed:3", 1] == 3 * passed and sent["deepspeed:3", 4] == 12 * passed
    # Rows of zeros make the ranks' parts of the last layer alike.
    assert 3 * passed <= sent["fsdp2", 1] == pytest.approx(3 * passed, rel=0.01)
    assert sent["fsdp2", 4] - sent["fsdp2", 1] == pytest.approx(3 * 2 * passed, rel=0.01)  # gathered again
    assert all(to["between"] for one in by.values() for to in one["sent"])
    assert by["ddp", 1]["sending_s"] == pytest.approx(2 * passed / 1e9)
    assert by["ddp", 1]["held"] == {"weights": WEIGHTS, "gradients": WEIGHTS, "optimizer": 2 * WEIGHTS + 6 * 4}
    assert by["ddp", 1]["formula"] is False and by["deepspeed:3", 1]["formula"] is True
    # Both send alike; of the two, the one with fewer micro-batches.
    assert found["recommended"] == "--backend.name ddp --train.micro_batch_size 16"
    assert all(one["fits"] for one in by.values())


def test_what_does_not_fit_is_not_recommended(zygote: Zygote):
    both = ["--ranks=4", "--meshes=ddp, fsdp2", "--gb-per-s=1,1"]
    needed = [one["needed_bytes"] for one in tree(planned(zygote, "--json", "--memory=1TB", *both))["candidates"]]
    assert needed[1] < 0.7 * needed[0]
    between = math.sqrt(needed[0] * needed[1]) / 0.8
    ended = planned(zygote, f"--memory={between:.0f}", *both).check()
    lines = ended.out[0].splitlines()
    assert lines[0] == f"4 ranks, 4 on a node, {between / 1e6:,.1f} MB of the host a rank"
    assert lines[3].startswith("ddp ") and lines[3].endswith("does not fit")
    assert lines[4].startswith("fsdp2 ") and lines[4].endswith("recommended")
    assert "recommended: --backend.name fsdp2" in lines
    ended = planned(zygote, "--memory=1KB", *both)
    assert ended.codes == [1] and "none fits in 80% of 1.0 KB" in ended.out[0] and "fsdp2 with" in ended.out[0]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (
            ["--meshes={shards: 4}"],
            "--meshes: got unknown dimension 'shards', expected one of replicate, shard, tensor",
        ),
        (["--meshes={shard: 3}", "--ranks=4"], "backend.mesh: got {shard: 3} on 4 ranks, expected sizes with that"),
        (["--meshes=dpd"], "--meshes: got unknown backend 'dpd'"),
        (["--meshes={shard: [2]}"], "--meshes: got '{shard: [2]}', expected backends and meshes with commas"),
        (["--memory=much"], "--memory: got 'much', expected a number above 0; for example --memory 80GB"),
        (["--ranks=0"], "--ranks: got '0', expected whole numbers from 1 on"),
        (["--ranks=4", "--per-node=3"], "--per-node: got 3 with 4 ranks, expected a divisor"),
        (["--gb-per-s=3"], "--gb-per-s: got '3', expected GB/s that a rank sends inside a node, and between"),
        (["--optim.lrr=1"], "optim: got unknown key 'lrr'"),
    ],
)
def test_a_mistake_is_said_in_a_line(argv: list[str], said: str, zygote: Zygote):
    ended = planned(zygote, *argv)
    assert ended.codes == [2] and ended.out == [""] and said in ended.err[0] and ended.err[0].count("\n") == 1


def test_a_model_that_reads_values(zygote: Zygote, tmp_path: Path):
    (tmp_path / "reads.py").write_text(
        "import torch\nclass Reads(torch.nn.Linear):\n    def __init__(self):\n        super().__init__(64, 10)\n"
        "    def forward(self, x):\n        return super().forward(x.flatten(1) * (2.0 if x.sum() > 0 else 1.0))\n"
    )
    (ended,) = zygote.run(Run(["plan", "--ranks=2", "--model.name=reads:Reads"], cwd=str(tmp_path)))
    assert ended.codes == [2] and ended.err[0].count("\n") == 1
    assert "model.name: got reads:Reads, which does not run on tensors without values under ddp" in ended.err[0]
    assert "a run of --train.max_steps 1 shows what it needs" in ended.err[0]


# -- work apart --------------------------------------------------------------------------------------------------------


def test_work_apart_ends_with_what_it_found_or_why_not():
    assert Apart(divmod, 7, 2).result() == (3, 1)
    with pytest.raises(Failed, match="ZeroDivisionError: "):
        Apart(divmod, 7, 0).result()
    with pytest.raises(Failed, match="was ended"):
        Apart(os._exit, 3).result()
    never = Apart(divmod, 7, 2)
    never.close()
    never.close()


# -- at scale ----------------------------------------------------------------------------------------------------------

LLAMA_8B = "{layers: 32, width: 4096, heads: 32, kv_heads: 8, mlp_width: 14336, tied: false}"


@pytest.mark.full
def test_eight_billion_weights_on_64_ranks_take_no_memory_to_plan(tmp_path: Path):
    (tmp_path / "corpus.txt").write_text(LINES * 100)
    argv = [*options(tmp_path), f"--model.args={LLAMA_8B}", "--data.args.block=4096", "--train.precision=bfloat16"]
    argv += ["--json", "--ranks=64", "--memory=80GB", "--meshes=fsdp2", "--train.global_batch_size=64"]
    command = [sys.executable, "-m", "dist_train", "plan", *argv]
    environment = os.environ | {"PYTHONPATH": str(Path(dist_train.__file__).parents[1])}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)  # of it and of its own children
    process.returncode = os.waitstatus_to_exitcode(status)
    (one,) = json.loads(said)["candidates"]
    weights = 4 * 7_000_000_000
    assert process.returncode == 0 and one["fits"] and usage.ru_maxrss * 1024 < 2e9
    assert weights / 64 < one["held"]["weights"] < 1.2 * weights / 64
