"""What a backend asks of the config, the launcher and the machine. Pure, and before torch or a library is imported."""

import json
import os
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dist_train.backends import BACKENDS, LIBRARIES, chosen, mesh
from dist_train.config.tree import Config
from dist_train.config.values import unknown
from dist_train.ranks.launcher import Launcher

STAGES = (0, 1, 2, 3)
# Weights of a model that is small: what DeepSpeed gathers or reduces of it at once takes no memory to speak of.
SMALL = 1 << 21
# Measured against single: these compute with a tensor's shape, or write in place what a shard cannot take.
UNFIT_OPTIMIZERS = {
    "fsdp2": {"Adafactor": "does not take sharded weights", "Rprop": "does not take sharded weights"},
    "deepspeed": {"Adafactor": "needs a weight's rows and columns, but ZeRO 1 to 3 flattens weights"},
}
# compile.scope step: those whose update is one kernel on CUDA, and the arguments that would make another of it.
CAPTURED_OPTIMIZERS = ("SGD", "Adam", "AdamW")
CAPTURED_DECIDES = {"fused", "foreach", "differentiable", "capturable"}
RECOMPUTED = ("none", "blocks", "selective")
# backend.reduce ordered: who sums by itself.
NOT_ORDERED = {
    "accelerate": "whose DistributedDataParallel sums as it likes",
    "deepspeed": "whose engine sums in buckets of its own",
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

# Keys of DeepSpeed's JSON that this config decides, and where. Two places could contradict each other, and DeepSpeed
# would follow its own.
OWNED = {
    "train_batch_size": "set train.global_batch_size",
    "train_micro_batch_size_per_gpu": "set train.micro_batch_size",
    "gradient_accumulation_steps": "set train.micro_batch_size",
    "managed_gradient_accumulation": "set train.micro_batch_size",
    "elasticity": "set train.global_batch_size, which holds at every world size",
    "gradient_clipping": "set train.grad_clip",
    "optimizer": "set optim.name, optim.lr and optim.args",
    "scheduler": "set optim.schedule and optim.warmup_steps",
    "fp16": "set train.precision",
    "bf16": "set train.precision",
    "bfloat16": "set train.precision",
    "amp": "set train.precision",
    "torch_autocast": "set train.precision",
    "data_types": "set train.precision",
    "communication_data_type": "leave it out: gradients are summed in float32",
    "gradient_allreduce_op": "leave it out: the loop divides by the number of samples",
    "compile": "set compile.mode",
    "tensor_parallel": "leave it out: data parallel only",
    "sequence_parallel_size": "leave it out: data parallel only",
    "zero_allow_untested_optimizer": "leave it out: it is true",
    "zero_force_ds_cpu_optimizer": "leave it out: the optimizer is torch's, as optim.name says",
    "zero_optimization.stage": "set backend.zero_stage",
    "zero_optimization.offload_optimizer": "set backend.offload",
    "zero_optimization.cpu_offload": "set backend.offload",
}


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
        stage = "" if config.backend.zero_stage is None else " --backend.zero_stage null"
        yield (
            f"backend.name: got {backend} in a process that was started alone, expected a launcher; write "
            f"torchrun --nproc_per_node=2 -m dist_train --backend.name {backend}, or --backend.name single{stage}"
        )
    library = LIBRARIES.get(backend)
    if library is not None and find_spec(library) is None:
        yield (
            f"backend.name: got {backend}, but {library} is not installed; pip install 'dist-train[{library}]', or "
            f"write --backend.name ddp"
        )
    yield from _stage(config, backend)
    yield from mesh.problems(config, backend, launcher)
    yield from _offload(config, backend)
    yield from _start(config, backend)
    yield from _extra(config, backend)
    yield from _combination(config, backend)
    yield from _whole_step(config, backend)
    yield from _ordered(config, backend)
    yield from _recompute(config)
    yield from _accelerate(config, env)


def _stage(config: Config, backend: str) -> Iterator[str]:
    stage = config.backend.zero_stage
    if stage is not None and backend != "deepspeed":
        yield f"backend.zero_stage: got {stage}, but backend {backend} does not have it; leave it out (null)"
    elif stage is not None and stage not in STAGES:
        yield f"backend.zero_stage: got {stage}, expected one of 0, 1, 2, 3; for example --backend.zero_stage 2"


def _offload(config: Config, backend: str) -> Iterator[str]:
    if not config.backend.offload:
        return
    if backend not in ("fsdp2", "deepspeed"):
        yield (
            f"backend.offload: got true, but backend {backend} does not have it; leave it out, or write "
            f"--backend.name fsdp2"
        )
    elif backend == "deepspeed" and not config.backend.zero_stage:
        yield (
            "backend.offload: got true at ZeRO stage 0, which shares out no optimizer state, expected stage 1, 2 or 3; "
            "for example --backend.zero_stage 1"
        )


def _start(config: Config, backend: str) -> Iterator[str]:
    if config.backend.start == "sharded" and backend != "fsdp2":
        yield (
            f"backend.start: got sharded, but backend {backend} takes a whole model on every rank; leave it out, or "
            f"write --backend.name fsdp2"
        )


def _extra(config: Config, backend: str) -> Iterator[str]:
    """What is wrong with the user's own JSON for DeepSpeed."""
    name = config.backend.config
    if name is None:
        return
    if backend != "deepspeed":
        yield f"backend.config: got {name}, but backend {backend} does not have it; leave it out (null)"
        return
    try:
        tree = json.loads(Path(name).read_text(encoding="utf-8"), object_pairs_hook=_unlike)
    except OSError as error:
        yield f"backend.config: got {name!r}, expected a JSON file that can be read: {error.strerror}"
        return
    except ValueError as error:
        yield f"backend.config: got {name}, expected valid JSON: {error}"
        return
    if not isinstance(tree, dict):
        yield f"backend.config: got {name} with {json.dumps(tree)}, expected an object with DeepSpeed's keys"
        return
    if not isinstance(tree.get("zero_optimization", {}), dict):
        got = json.dumps(tree["zero_optimization"])
        yield f"zero_optimization in {name}: got {got}, expected an object; the stage is backend.zero_stage"
    yield from _keys(tree, "", name)


def _unlike(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. A key that stands twice is a mistake, not a choice."""
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"the key {key!r} stands twice")
    return dict(pairs)


def _keys(value: Any, path: str, file: str) -> Iterator[str]:
    """A line for every key of the JSON that this config owns, and for every value that DeepSpeed would leave open."""
    if path in OWNED:
        yield f"{path} in {file}: got {json.dumps(value)}, but the config decides it; take it out, and {OWNED[path]}"
    elif isinstance(value, dict):
        for key, below in value.items():
            yield from _keys(below, f"{path}.{key}" if path else key, file)
    elif isinstance(value, list):
        for i, below in enumerate(value):
            yield from _keys(below, f"{path}[{i}]", file)
    elif value == "auto":
        yield f"{path} in {file}: got 'auto', which another library would fill in, expected a value; or take it out"


def _combination(config: Config, backend: str) -> Iterator[str]:
    """What a library cannot do, or does wrong without a word."""
    if backend == "deepspeed" and config.train.precision == "float16":
        yield (
            "train.precision: got float16 with backend deepspeed, whose loss scale needs weights in float16; write "
            "--train.precision bfloat16, or --backend.name ddp or fsdp2"
        )
    if backend == "deepspeed" and config.train.precision == "float64":
        yield (
            "train.precision: got float64 with backend deepspeed, which computes in float32 below it; write "
            "--train.precision float32, or --backend.name ddp or fsdp2"
        )
    sharded = backend != "deepspeed" or config.backend.zero_stage
    reason = UNFIT_OPTIMIZERS.get(backend, {}).get(config.optim.name)
    if reason and sharded:
        yield f"optim.name: got {config.optim.name}, which {reason}; write --backend.name ddp, or --optim.name AdamW"


def _whole_step(config: Config, backend: str) -> Iterator[str]:
    """What a step that is captured cannot be: it asks nothing of the host, and is replayed as it was."""
    if config.compile.scope != "step":
        return
    instead = "write --compile.scope model"
    if backend != "single":
        yield f"compile.scope: got step with backend {backend}, expected single, whose step is on one device; {instead}"
    if config.compile.mode == "reduce-overhead":
        yield (
            f"compile.mode: got reduce-overhead with compile.scope step, which captures graphs of its own; write "
            f"--compile.mode default, or {instead.removeprefix('write ')}"
        )
    if config.train.nonfinite == "skip":
        yield f"train.nonfinite: got skip with compile.scope step, where no step can be left out; {instead}"
    if config.train.precision in ("float16", "float64"):
        reason = {"float16": "the host decides its loss scale", "float64": "its learning rate is a float32"}
        yield (
            f"train.precision: got {config.train.precision} with compile.scope step, but "
            f"{reason[config.train.precision]}, expected float32, tf32 or bfloat16; {instead}"
        )
    optim = config.optim
    if optim.name not in CAPTURED_OPTIMIZERS:
        yield (
            f"optim.name: got {optim.name} with compile.scope step, expected one of {', '.join(CAPTURED_OPTIMIZERS)}, "
            f"which read the learning rate on the device; {instead}"
        )
    for key in sorted(CAPTURED_DECIDES & optim.args.keys()):
        yield f"optim.args.{key}: got {optim.args[key]!r}, but compile.scope step decides it; leave it out"


def _ordered(config: Config, backend: str) -> Iterator[str]:
    """What sums in a fixed order ask for."""
    if config.backend.reduce != "ordered":
        return
    path, leave = "backend.reduce: got ordered", "or leave backend.reduce out"
    if backend in NOT_ORDERED:
        yield f"{path} with backend {backend}, {NOT_ORDERED[backend]}; write --backend.name ddp or fsdp2, {leave}"
    if config.train.micro_batch_size is None:
        eighth = max(1, config.train.global_batch_size // 8)
        yield (
            f"{path} without train.micro_batch_size, expected the samples of a slice, whose gradients are added up in "
            f"order; for example --train.micro_batch_size {eighth}"
        )
    if config.train.threads is None:
        yield (
            f"{path} without train.threads, on which the sums within a process depend; for example --train.threads 1"
        )
    if config.compile.scope == "step":
        yield f"{path} with compile.scope step, which adds up by itself; write --compile.scope model"
    if config.train.precision == "float16":
        yield f"{path} with float16, whose loss scale depends on what overflows first; write --train.precision bfloat16"
    if config.backend.offload:
        yield f"{path} with backend.offload, expected gradients on the device; leave one of them out"


def _recompute(config: Config) -> Iterator[str]:
    path, asked, example = "backend.recompute", config.backend.recompute, "for example --backend.recompute blocks"
    if isinstance(asked, dict):
        budget = asked.get("budget")
        if asked.keys() != {"budget"} or type(budget) not in (int, float) or not 0 <= budget <= 1:
            yield f"{path}: got {asked}, expected {{budget: SHARE}} with a share from 0 to 1; {example}"
        elif config.compile.mode == "off":
            yield (
                f"{path}: got {asked} with compile.mode off, but it is the compiler that keeps to a budget; write "
                f"--compile.mode default, or --{path} selective"
            )
    elif asked not in RECOMPUTED:
        yield f"{path}: got {asked!r}, expected {', '.join(RECOMPUTED)}, or {{budget: SHARE}}; {example}"
    elif asked != "none" and config.compile.scope == "step":
        yield (
            f"{path}: got {asked} with compile.scope step, whose graph is not taken apart into blocks; write "
            f"--compile.scope model, or --{path} '{{budget: 0.5}}' with a compile.mode"
        )


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


def bucket_of(weights: int, ranks: int) -> int:
    """Elements that DeepSpeed gathers or reduces at once: a small model whole; of a large one a part that is little
    beside what a rank holds of it. The library's defaults, of up to a billion, are allocated for any model, and keep
    all layers gathered from forward to backward."""
    aligned = 2 * ranks  # ZeRO 1 and 2 cut a bucket into the ranks' parts
    return -(-min(weights, max(SMALL, weights // 32)) // aligned) * aligned
