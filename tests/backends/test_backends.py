"""What each backend shares out and exchanges, what is refused before a start, and the libraries' own launchers."""

import dataclasses
import json
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy

from dist_train import backends
from dist_train.backends import fsdp2
from dist_train.backends.rules import problems
from dist_train.config.tree import BackendConfig, Config, OptimConfig, TrainConfig
from dist_train.errors import ConfigError
from dist_train.loop import optim
from dist_train.models.blocks import blocks
from dist_train.ranks.launcher import Launcher, detect
from dist_train.run.check import check
from dist_train.tools.agreement import difference

from parity_cells import BACKENDS, TOLERANCE, config, run_cells, run_single, this_world
from workers import RankError, run_ranks

TORCHRUN = Launcher("torchrun", world_size=2)


# -- what is shared out, and what is exchanged -------------------------------------------------------------------------


def held(cell: Config) -> tuple[int, int]:
    """In a worker: elements of weights and of optimizer state that this rank holds after a step."""
    world = this_world()
    model = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 2))
    backend = backends.create(cell, world)
    called, optimizer = backend.prepare(model, optim.factory(OptimConfig(name="SGD", lr=0.1, momentum=0.9)))
    with backend.accumulate(last=True):
        backend.backward(called(torch.ones(4, 512)).sum())
    backend.step(None, measure=False)
    states = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    return sum(map(_local, model.parameters())), sum(map(_local, states))


def _local(tensor: torch.Tensor) -> int:
    return tensor.to_local().numel() if isinstance(tensor, torch.distributed.tensor.DTensor) else tensor.numel()


@pytest.mark.parametrize("backend", BACKENDS)
def test_state_is_shared_out(backend: str):
    whole = 512 * 512 + 512 + 512 * 2 + 2
    weights, state = run_ranks(held, 2, config(backend))[0]
    assert (weights < 0.6 * whole) == (backend in ("fsdp2", "deepspeed:3"))
    assert (state < 0.6 * whole) == (backend in ("fsdp2", "deepspeed:1", "deepspeed:2", "deepspeed:3"))


def exchanges(cell: Config) -> list[int]:
    """In a worker: sums over the ranks in a micro-batch that is not the last of its step, and in one that is."""
    backend = backends.create(cell, this_world())
    model, _ = backend.prepare(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), optim.factory(cell.optim))
    counts = []
    for last in (False, True):
        with torch.profiler.profile() as profile, backend.accumulate(last):
            backend.backward(model(torch.ones(4, 8)).sum())
        counts.append(sum(e.count for e in profile.key_averages() if e.key == "gloo:all_reduce"))
    backend.step(None, measure=False)
    return counts


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_exchanged_in_the_last_micro_batch(backend: str):
    early, late = run_ranks(exchanges, 2, config(backend))[0]
    assert late > 0
    assert (early > 0) == (backend in ("deepspeed:2", "deepspeed:3"))  # they store no whole gradient to wait with


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.layers = nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU()])
        self.layers[1].weight = self.first.weight


def test_layers_that_are_sharded():
    nested = nn.ModuleList([nn.ModuleList([nn.Linear(2, 2)]), nn.Sequential(nn.Linear(2, 2), nn.ReLU())])
    assert list(blocks(nested)) == [nested[0][0], nested[1]]
    tied = Tied()
    assert list(blocks(tied)) == [tied.layers[0]]
    assert list(blocks(nn.Linear(2, 2))) == []


def leave_unwrapped() -> None:
    """In a worker: Accelerate returns the model as it was."""
    from accelerate import Accelerator

    backend = backends.create(config("accelerate"), this_world())
    original, Accelerator.prepare = Accelerator.prepare, lambda self, model: model
    try:
        backend.prepare(nn.Linear(2, 2), optim.factory(OptimConfig()))
    finally:
        Accelerator.prepare = original


def test_a_model_that_accelerate_leaves_unwrapped_is_an_error():
    with pytest.raises(RankError, match="expected DDP"):
        run_ranks(leave_unwrapped, 1)


def step_on_nan(stage: int) -> float:
    """In a worker: the norm that a step gives whose gradient is not finite."""
    backend = backends.create(config(f"deepspeed:{stage}"), this_world())
    model, _ = backend.prepare(nn.Linear(2, 2), optim.factory(OptimConfig()))
    with backend.accumulate(last=True):
        backend.backward(model(torch.full((1, 2), float("nan"))).sum())
    return float(backend.step(None, measure=True))


@pytest.mark.parametrize("stage", [1, 3])
def test_a_step_that_deepspeed_leaves_out_has_a_norm_that_says_so(stage: int):
    assert run_ranks(step_on_nan, 1, stage) == [float("inf")]


def formats(cell: Config) -> list[torch.dtype]:
    """In a worker: the format of a layer's output, with no autocast around the call."""
    backend = backends.create(cell, this_world())
    layer = nn.Linear(2, 2)
    seen = []
    layer.register_forward_hook(lambda _, args, output: seen.append(output.dtype))
    model, _ = backend.prepare(nn.Sequential(layer), optim.factory(OptimConfig()))
    model(torch.ones(1, 2))
    return seen


@pytest.mark.parametrize("stage", [0, 3])
def test_deepspeed_autocasts_within_its_engine(stage: int):
    """The engine turns off the autocast that is around it, on an accelerator."""
    cell = config(f"deepspeed:{stage}")
    assert run_ranks(formats, 1, cell)[0] == [torch.float32]
    cell = dataclasses.replace(cell, train=dataclasses.replace(cell.train, precision="bfloat16"))
    assert run_ranks(formats, 1, cell)[0] == [torch.bfloat16]


def engine_settings(extra: str) -> dict:
    """In a worker: what DeepSpeed made of our settings and those of a file."""
    cell = config("deepspeed:2", clips=True)
    cell = dataclasses.replace(cell, backend=dataclasses.replace(cell.backend, config=extra))
    backend = backends.create(cell, this_world())
    backend.prepare(nn.Linear(2, 2), optim.factory(OptimConfig()))
    made = backend.engine._config
    zero = made.zero_config
    return {
        "stage": zero.stage, "overlap_comm": zero.overlap_comm, "reduce_bucket_size": zero.reduce_bucket_size,
        "allgather_bucket_size": zero.allgather_bucket_size, "clipping": made.gradient_clipping,
        "memory_breakdown": made.memory_breakdown, "untested": made.zero_allow_untested_optimizer,
    }  # fmt: skip


def test_a_file_adds_to_deepspeeds_settings(tmp_path: Path):
    extra = tmp_path / "extra.json"
    zero = {"overlap_comm": True, "reduce_bucket_size": 77}
    extra.write_text(json.dumps({"memory_breakdown": True, "zero_optimization": zero}))
    made = run_ranks(engine_settings, 1, str(extra))[0]
    assert (made["overlap_comm"], made["reduce_bucket_size"], made["memory_breakdown"]) == (True, 77, True)
    assert (made["stage"], made["allgather_bucket_size"], made["clipping"], made["untested"]) == (2, 6, 0.2, True)


def _offloaded(cell: Config) -> Config:
    return dataclasses.replace(cell, backend=dataclasses.replace(cell.backend, offload=True))


@pytest.mark.parametrize("backend", ["fsdp2", "deepspeed:1", "deepspeed:2", "deepspeed:3"])
def test_offloaded_is_the_same_as_single(backend: str):
    cell = config(backend, "AdamW", micro_batch_size=8, clips=True)
    run = run_ranks(run_cells, 2, [_offloaded(cell)])[0][0]
    found = difference(run, run_single(dataclasses.replace(cell, backend=BackendConfig("single"))))
    assert found.worst < TOLERANCE["float32"], found


def offloads(cell: Config) -> bool:
    """In a worker: whether the library was told to offload, whole: each layer and the model."""
    told = []
    original = fsdp2.fully_shard
    fsdp2.fully_shard = lambda *a, **kw: told.append(kw["offload_policy"]) or original(*a, **kw)  # it still shards
    try:
        backend = backends.create(cell, this_world())
        backend.prepare(nn.Sequential(nn.Linear(2, 2)), optim.factory(OptimConfig()))
    finally:
        fsdp2.fully_shard = original
    if cell.backend.name == "fsdp2":
        return len(told) == 2 and all(isinstance(policy, CPUOffloadPolicy) for policy in told)
    return backend.engine.zero_cpu_offload() and not backend.engine.zero_force_ds_cpu_optimizer()


@pytest.mark.parametrize("backend", ["fsdp2", "deepspeed:1", "deepspeed:3"])
def test_the_library_is_told_to_offload(backend: str):
    assert run_ranks(offloads, 1, _offloaded(config(backend)))[0] is True
    assert run_ranks(offloads, 1, config(backend))[0] is False


# -- what is refused ---------------------------------------------------------------------------------------------------


def _config(backend: str = "ddp", stage: int | None = None, **sections) -> Config:
    return Config(backend=BackendConfig(backend, stage), **sections)


REFUSED = {
    "pip install 'dist-train\\[deepspeed\\]'": (_config("deepspeed"), {}),
    "pip install 'dist-train\\[accelerate\\]'": (_config("accelerate"), {}),
    "zero_stage: got 1, but backend fsdp2": (_config("fsdp2", 1), {}),
    "zero_stage: got 4, expected one of 0, 1, 2, 3": (_config("deepspeed", 4), {}),
    "precision: got float64 with backend deepspeed": (_config("deepspeed", train=TrainConfig(precision="float64")), {}),
    "got Adafactor.*flattens": (_config("deepspeed", 1, optim=OptimConfig("Adafactor")), {}),
    "precision: got float16 with backend deepspeed": (_config("deepspeed", train=TrainConfig(precision="float16")), {}),
    "offload: got true, but backend ddp": (Config(backend=BackendConfig("ddp", offload=True)), {}),
    "offload: got true, but backend accelerate": (Config(backend=BackendConfig("accelerate", offload=True)), {}),
    "offload: got true at ZeRO stage 0": (Config(backend=BackendConfig("deepspeed", offload=True)), {}),
    "config: got extra.json, but backend fsdp2": (Config(backend=BackendConfig("fsdp2", config="extra.json")), {}),
    "config: got 'no.json', expected.*No such file": (Config(backend=BackendConfig("deepspeed", config="no.json")), {}),
    "got Rprop": (_config("fsdp2", optim=OptimConfig("Rprop")), {}),
    "got --mixed_precision": (_config(), {"ACCELERATE_MIXED_PRECISION": "bf16"}),
    "got --dynamo_backend": (_config(), {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}),
    "got --gradient_accumulation_steps": (_config(), {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}),
    "got --use_deepspeed": (_config(), {"ACCELERATE_USE_DEEPSPEED": "true"}),
    "got --use_fsdp": (_config(), {"ACCELERATE_USE_FSDP": "true"}),
    "told --cpu": (_config(train=TrainConfig(device="cuda")), {"ACCELERATE_USE_CPU": "True"}),
}


@pytest.mark.parametrize("line", REFUSED)
def test_refused_by_name(line: str, monkeypatch: pytest.MonkeyPatch):
    cell, env = REFUSED[line]
    if "pip install" in line:
        monkeypatch.setitem(sys.modules, cell.backend.name, None)  # as if it were not installed
    with pytest.raises(ConfigError, match=line):
        raise ConfigError(*problems(cell, TORCHRUN, env))


def _lines_on(text: str, folder: Path) -> list[str]:
    """What is said about a file for DeepSpeed with this text."""
    file = folder / "extra.json"
    file.write_text(text)
    return list(problems(Config(backend=BackendConfig("deepspeed", config=str(file))), TORCHRUN, {}))


OUR_KEYS = {
    '{"train_batch_size": 64}': "set train.global_batch_size",
    '{"train_micro_batch_size_per_gpu": 8}': "set train.micro_batch_size",
    '{"gradient_accumulation_steps": 1}': "set train.micro_batch_size",
    '{"gradient_clipping": 1.0}': "set train.grad_clip",
    '{"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}': "set optim.name",
    '{"scheduler": {"type": "WarmupLR"}}': "set optim.schedule",
    '{"fp16": {"enabled": "auto"}}': "set train.precision",
    '{"bf16": {"enabled": true}}': "set train.precision",
    '{"zero_optimization": {"stage": 1}}': "set backend.zero_stage",
    '{"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}': "set backend.offload",
}


@pytest.mark.parametrize("text", OUR_KEYS)
def test_a_key_of_ours_in_deepspeeds_file_is_refused(text: str, tmp_path: Path):
    tree = json.loads(text)
    name = ".".join([*tree, *tree.get("zero_optimization", {})])
    (line,) = _lines_on(text, tmp_path)
    assert line.startswith(f"{name} in ") and OUR_KEYS[text] in line


WRONG_FILES = {
    "{": "expected valid JSON",
    '{"steps_per_print": 1, "steps_per_print": 2}': "'steps_per_print' stands twice",
    "[1]": r"with \[1\], expected an object",
    '{"zero_optimization": true}': "zero_optimization in .*: got true, expected an object",
    '{"zero_optimization": {"reduce_bucket_size": "auto"}}': "^zero_optimization.reduce_bucket_size in .*: got 'auto'",
    '{"x": [{"y": "auto"}]}': r"^x\[0\].y in .*: got 'auto'",
}


@pytest.mark.parametrize("text", WRONG_FILES)
def test_a_wrong_file_for_deepspeed_is_refused(text: str, tmp_path: Path):
    (line,) = _lines_on(text, tmp_path)
    assert re.search(WRONG_FILES[text], line) and "\n" not in line


def test_a_file_for_deepspeed_is_accepted(tmp_path: Path):
    assert _lines_on('{"wall_clock_breakdown": true, "zero_optimization": {"overlap_comm": true}}', tmp_path) == []


@pytest.mark.parametrize("backend", ["fsdp2", "deepspeed:1", "deepspeed:2", "deepspeed:3"])
def test_offload_is_not_refused(backend: str):
    assert list(problems(_offloaded(config(backend)), TORCHRUN, {})) == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_not_refused(backend: str):
    neutral = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_USE_CPU": "True"}
    assert list(problems(config(backend), TORCHRUN, neutral)) == []
    cell = config(backend)
    with pytest.raises(ConfigError, match="started alone") as caught:
        check(cell, Launcher())
    alone = "--backend.name single" + ("" if cell.backend.zero_stage is None else " --backend.zero_stage null")
    assert caught.value.lines[0].endswith(f"or {alone}")


def test_each_starter_has_a_backend():
    for starter in ("accelerate", "deepspeed"):
        assert list(problems(Config(), Launcher(starter), {})) == []
        assert backends.chosen("auto", starter) == starter


def test_accelerate_launch_is_seen_through():
    given = {"ACCELERATE_MIXED_PRECISION": "no"}
    assert detect(given).world_size == 1
    several = given | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    with pytest.raises(ConfigError, match="started one process"):
        detect(several)
    mpi = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
    assert (detect(several | mpi).rank, detect(several | mpi).world_size) == (1, 2)
    intel = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
    assert (detect(several | intel).rank, detect(several | intel).master_port) == (1, 29500)
    with pytest.raises(ConfigError, match="an accelerate launch each"):
        detect(given | mpi)


# -- the real launchers ------------------------------------------------------------------------------------------------

OPTIONS = [
    *("--data.name=synthetic", "--data.args.n=131", "--data.args.n_test=101", "--data.args.shape=[1,6,6]"),
    *("--model.hidden=[16]", "--train.epochs=1", "--train.device=cpu", "--train.threads=1"),
]
ALONE = """
import sys
sys.modules["accelerate"] = sys.modules["deepspeed"] = None  # an import of either is an error
from dist_train.__main__ import main
main()
"""


def launch(*command: str, folder: Path) -> subprocess.CompletedProcess:
    """Runs a launcher from this environment's bin to its end."""
    program = str(Path(sys.executable).parent / command[0])
    words = [program, *command[1:], *OPTIONS, f"--run.dir={folder}"]
    return subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)


def free_port() -> str:
    """A port for a launcher whose own default may be taken."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


def _summary(folder: Path) -> tuple[str, int]:
    summary = json.loads((folder / "summary.json").read_text())
    return summary["backend"], summary["world_size"]


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.full), 3])
def test_torchrun_says_nothing_but_ours(stage: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = ["--backend.name=deepspeed", f"--backend.zero_stage={stage}"]
    done = launch("torchrun", "--standalone", "--nproc_per_node=2", "-m", "dist_train", *options, folder=tmp_path / "r")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "deepspeed" not in done.stdout.lower().replace("backend deepspeed", "")
    assert _summary(tmp_path / "r") == ("deepspeed", 2)


def test_single_and_ddp_import_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    script = tmp_path / "alone.py"
    script.write_text(ALONE)
    for name, command in (("single", ["python"]), ("ddp", ["torchrun", "--standalone", "--nproc_per_node=1"])):
        done = launch(*command, str(script), folder=tmp_path / name)
        assert done.returncode == 0, done.stderr
        assert _summary(tmp_path / name) == (name, 1)


def test_the_deepspeed_launcher(tmp_path: Path):
    options = ["--num_gpus", "2", "--master_port", free_port(), "--module", "dist_train"]
    done = launch("deepspeed", *options, folder=tmp_path / "r")
    assert done.returncode == 0, done.stderr
    assert _summary(tmp_path / "r") == ("deepspeed", 2)


def test_accelerate_launch_that_starts_one_process_is_refused(tmp_path: Path):
    done = launch("accelerate", "launch", "--cpu", "--num_processes", "2", "-m", "dist_train", folder=tmp_path / "r")
    assert done.returncode != 0
    assert "it started one process" in done.stderr
    assert not (tmp_path / "r").exists()


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs MPI: Debian's openmpi-bin")
def test_accelerate_launch_through_mpi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"):
        monkeypatch.setenv(name, "1")
    hosts = tmp_path / "hosts"
    hosts.write_text("localhost slots=2\n")
    mpi = ["--num_machines", "1", "--mpirun_hostfile", str(hosts)]
    options = ["--cpu", "--num_processes", "2", *mpi, "--main_process_port", free_port(), "-m", "dist_train"]
    done = launch("accelerate", "launch", *options, folder=tmp_path / "r")
    assert done.returncode == 0, done.stderr
    assert _summary(tmp_path / "r") == ("accelerate", 2)
