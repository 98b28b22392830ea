"""What a backend asks of the config, the launcher and the machine. Pure, and before torch or a library is imported."""

import os
from collections.abc import Iterator, Mapping
from importlib.util import find_spec

from dist_train.backends import BACKENDS, LIBRARIES, chosen
from dist_train.config import Config, unknown
from dist_train.launcher import Launcher

STAGES = (0, 1, 2, 3)
# Measured against single: these compute with a tensor's shape, or write in place what a shard cannot take.
UNFIT_OPTIMIZERS = {
    "fsdp2": {"Adafactor": "does not take sharded weights", "Rprop": "does not take sharded weights"},
    "deepspeed": {"Adafactor": "needs a weight's rows and columns, but ZeRO 1 to 3 flattens weights"},
}
# What `accelerate launch` can be told that the config decides: variable, neutral value, option, what to do instead.
ACCELERATE_SETTINGS = (
    ("ACCELERATE_MIXED_PRECISION", "no", "--mixed_precision", "leave it out (or no), and set train.precision"),
    ("ACCELERATE_DYNAMO_BACKEND", "no", "--dynamo_backend", "leave it out (or no), and set compile.mode"),
    (
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1", "--gradient_accumulation_steps",
        "leave it out, and set train.micro_batch_size",
    ),
    ("ACCELERATE_USE_DEEPSPEED", "false", "--use_deepspeed", "start with torchrun, and set backend.name deepspeed"),
    ("ACCELERATE_USE_FSDP", "false", "--use_fsdp", "start with torchrun, and set backend.name fsdp2"),
    ("ACCELERATE_USE_MEGATRON_LM", "false", "--use_megatron_lm", "leave it out, there is no such backend"),
    ("ACCELERATE_USE_PARALLELISM_CONFIG", "false", "--use_parallelism_config", "leave it out: data parallel only"),
)  # fmt: skip


def problems(config: Config, launcher: Launcher, env: Mapping[str, str] = os.environ) -> Iterator[str]:
    """A line for every mistake: got, expected, and what to do."""
    name = config.backend.name
    if name != "auto" and name not in BACKENDS:
        yield unknown("backend.name", name, ["auto", *BACKENDS], "backend")
        return
    backend = chosen(name, launcher.name)
    if backend == "single" and launcher.world_size > 1:
        yield (
            f"backend.name: got single on {launcher.world_size} ranks, expected a backend that joins them; write "
            f"--backend.name ddp, or start one process with python -m dist_train"
        )
    if backend != "single" and launcher.name == "none":
        yield (
            f"backend.name: got {backend} in a process that was started alone, expected a launcher; write "
            f"torchrun --nproc_per_node=2 -m dist_train --backend.name {backend}, or --backend.name single"
        )
    library = LIBRARIES.get(backend)
    if library is not None and find_spec(library) is None:
        yield (
            f"backend.name: got {backend}, but {library} is not installed; pip install 'dist-train[{library}]', or "
            f"write --backend.name ddp"
        )
    yield from _stage(config, backend)
    yield from _combination(config, backend)
    yield from _accelerate(config, env)


def _stage(config: Config, backend: str) -> Iterator[str]:
    stage = config.backend.zero_stage
    if stage is not None and backend != "deepspeed":
        yield f"backend.zero_stage: got {stage}, but backend {backend} does not have it; leave it out (null)"
    elif stage is not None and stage not in STAGES:
        yield f"backend.zero_stage: got {stage}, expected one of 0, 1, 2, 3; for example --backend.zero_stage 2"


def _combination(config: Config, backend: str) -> Iterator[str]:
    """What a library cannot do, or does wrong without a word."""
    if backend == "deepspeed" and config.train.precision == "float64":
        yield (
            "train.precision: got float64 with backend deepspeed, which computes in float32 below it; write "
            "--train.precision float32, or --backend.name ddp or fsdp2"
        )
    sharded = backend != "deepspeed" or config.backend.zero_stage
    reason = UNFIT_OPTIMIZERS.get(backend, {}).get(config.optim.name)
    if reason and sharded:
        yield f"optim.name: got {config.optim.name}, which {reason}; write --backend.name ddp, or --optim.name AdamW"


def _accelerate(config: Config, env: Mapping[str, str]) -> Iterator[str]:
    for variable, neutral, option, instead in ACCELERATE_SETTINGS:
        value = env.get(variable, neutral)
        if value.lower() != neutral:
            yield f"accelerate launch: got {option}, as {variable}={value} says, expected {neutral}; {instead}"
    if env.get("ACCELERATE_USE_CPU", "").lower() == "true" and config.train.device not in ("auto", "cpu"):
        yield (
            f"train.device: got {config.train.device}, but accelerate launch was told --cpu; write "
            f"--train.device cpu, or leave --cpu out"
        )
