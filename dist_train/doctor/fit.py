"""The config: valid, and what the run needs of memory against what there is."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from dist_train import backends
from dist_train.config.tree import Config
from dist_train.doctor.apart import Failed
from dist_train.doctor.candidates import FULL
from dist_train.doctor.machine import memory
from dist_train.doctor.report import Line, ranks, reason, size
from dist_train.errors import ConfigError
from dist_train.ranks.launcher import Launcher
from dist_train.run import check

if TYPE_CHECKING:
    import torch

    from dist_train.doctor.estimate import Estimate


def valid(config: Config, launcher: Launcher) -> Iterator[Line]:
    """What training would refuse."""
    check.check(config, launcher)  # raises a line for every mistake
    backend = backends.chosen(config.backend.name, launcher.name)
    yield Line("pass", "config", f"valid: backend {backend} on {ranks(launcher.world_size)}")


def estimate(
    config: Config, launcher: Launcher, device: "torch.device", found: "Estimate | Exception"
) -> Iterator[Line]:  # fmt: skip
    """What the run needs on the device, and on the host, at the moment when it needs most.

    Args:
        config: the run.
        launcher: of this rank.
        device: of this rank.
        found: of a rank, or what kept that from being known.
    """
    if isinstance(found, Exception):
        if isinstance(found, ConfigError):  # of the data or the device, which has a line of its own
            mend = "python -m dist_train doctor --only config   once the lines above are mended"
            yield Line("warn", "memory", "not estimated, as it depends on what the lines above tell of", mend)
            return
        what = found.what if isinstance(found, Failed) else reason(found)
        mend = "a run of --train.max_steps 1 shows it: torch's fake tensors do not pass through this model"
        yield Line("warn", "memory", f"not estimated: {what}", mend)
        return
    backend, n = backends.chosen(config.backend.name, launcher.name), launcher.local_world_size
    parts = dict(found.peak.parts)
    if device.type == "cuda":
        import torch

        from dist_train.data.feed import DEVICE_SHARE

        free, _ = torch.cuda.mem_get_info(device)
        resident = found.data if found.data < DEVICE_SHARE * free else 0
        offloaded = {name: parts.pop(name) for name in _offloaded(config, backend)}
        yield _against(parts | {"data": resident}, free, f"a rank, of {device}", config, backend, found)
        # A rank builds the model on the host, then keeps there what does not go to the device.
        host = {"model": max(found.start, sum(offloaded.values())), "data": found.data}
    else:
        host = parts | {"data": found.data}
    _, available = memory()
    whole = {name: n * count for name, count in host.items()}
    yield _against(whole, available, f"{ranks(n)}, of main memory", config, backend, found)


def _offloaded(config: Config, backend: str) -> tuple[str, ...]:
    if not config.backend.offload:
        return ()
    return ("weights", "gradients", "optimizer") if backend == "fsdp2" else ("optimizer",)


def _against(parts: dict[str, int], free: int, whose: str, config: Config, backend: str, found: "Estimate") -> Line:
    total = sum(parts.values())
    said = ", ".join(f"{name} {size(count)}" for name, count in parts.items() if count)
    during = f"{found.busiest} of {found.samples}" if found.samples else found.busiest
    what = f"{size(total)} for {whose}, which has {size(free)} free, at most in {during}: {said}"
    facts = {"needed_bytes": total, "free_bytes": free, "parts": parts, "held": found.held}
    if total <= FULL * free:
        return Line("pass", "memory", what, facts=facts)
    largest = max(parts, key=lambda name: parts[name])
    mend = "torchrun --nproc_per_node=N -m dist_train --backend.name fsdp2, on more ranks"
    if largest == "data":
        mend = "start fewer ranks on the node, or read the data from files (csv_images)"
    elif largest in ("activations", "temporary") and found.samples > 1:
        option = "train.micro_batch_size" if found.busiest == "micro-batch" else "train.eval_batch_size"
        mend = f"--{option} {found.samples // 2}"
    elif backend == "deepspeed" and config.backend.zero_stage != 3:
        mend = "--backend.zero_stage 3"
    elif backend in ("fsdp2", "deepspeed") and not config.backend.offload:
        mend = "--backend.offload true, or more ranks"
    return Line("fail" if total > free else "warn", "memory", what, mend, facts)
