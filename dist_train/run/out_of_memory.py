"""A run that ends out of memory says what took it, and the smallest change that would fit."""

import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dist_train.backends import recompute
from dist_train.backends.rules import UNFIT_OPTIMIZERS
from dist_train.backends.shards import Shards, local_of
from dist_train.config.tree import group_of
from dist_train.errors import OutOfMemoryError
from dist_train.loop.work import Work
from dist_train.run.running import Run

# What torch says where an allocation fails that is not its own OutOfMemoryError: on the CPU, and in CUDA's libraries.
SIGNS = ("DefaultCPUAllocator: can't allocate memory", "out of memory")
ASKED = re.compile(r"[Tt]ried to allocate ([\d.]+) (bytes|KiB|MiB|GiB)")
UNITS = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
STATM = Path("/proc/self/statm")  # of Linux: pages of this process, those that are resident second


@dataclass(frozen=True)
class Held:
    """Bytes on a rank, where it is short of them.

    Args:
        weights: and buffers.
        gradients: of parameters; those that a library keeps in memory of its own are among the rest.
        optimizer: its state.
        rest: most of it activations; None where nothing counts it.
        program: of the rest, what was there before the run began. On the CPU alone.
    """

    weights: int
    gradients: int
    optimizer: int
    rest: int | None
    program: int

    @property
    def activations(self) -> int:
        """Of the rest, what may be activations."""
        return max(0, (self.rest or 0) - self.program)


@dataclass(frozen=True)
class Change:
    """What would take less.

    Args:
        what: to do.
        frees: about so many bytes.
    """

    what: str
    frees: int


@contextmanager
def explained(run: Run) -> Iterator[None]:
    """Around all that a run does. Where memory ends, raises OutOfMemoryError from the error that says so."""
    model, config = run.parts.model, run.config
    own = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    of_blocks = replace(config, backend=replace(config.backend, recompute="blocks"))
    fits = bool(recompute.layers(model, of_blocks)) and config.compile.scope == "model"
    before = max(0, (resident() or 0) - own) if run.world.device.type == "cpu" else 0
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if run.prepared is None or not is_out_of_memory(error):
            raise
        with suppress(MemoryError):  # there is none left to say it
            raise OutOfMemoryError("\n".join(lines(run, error, before, fits))) from error
        raise


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that an allocation failed."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(sign in str(error) for sign in SIGNS)


def resident() -> int | None:
    """Bytes of this process in the machine's memory; None where the system does not tell."""
    return int(STATM.read_text().split()[1]) * resource.getpagesize() if STATM.exists() else None


def lines(run: Run, error: BaseException, before: int, recomputes: bool) -> Iterator[str]:
    """For people: what took the memory, and what would take less.

    Args:
        run: whose backend has prepared the model.
        error: says that an allocation failed.
        before: see Held.program.
        recomputes: the model has blocks that could be computed again.
    """
    of, work, phase = held(run.work, before), run.work, run.control.phases.name
    took = f"weights {size(of.weights)}, gradients {size(of.gradients)}, optimizer state {size(of.optimizer)}"
    if of.rest is not None:
        program = f", and {size(of.program)} that were there before the run began" if of.program else ""
        took += f", the rest {size(of.rest)}: activations and what is made of them{program}"
    yield f"out of memory in step {run.step + 1} ({phase}) on {work.world.device}. On this rank: {took}"
    found, asked = list(changes(work, of, recomputes)), asked_for(error)
    fitting = [change for change in found if change.frees >= asked]
    if fitting:
        yield f"the smallest change that should fit: {fitting[0].what}{about(fitting[0])}"
    elif found:
        yield f"no single change frees the {size(asked)} that were asked for; several together may"
    for change in found:
        if change not in fitting[:1]:
            yield f"or: {change.what}{about(change)}"


def about(change: Change) -> str:
    """What a change frees, for people."""
    return f" (frees about {size(change.frees)})" if change.frees else ""


def held(work: Work, before: int) -> Held:
    """What this rank holds now. Allocates next to nothing.

    Args:
        work: of the run.
        before: see Held.program.
    """
    backend, device = work.backend, work.world.device
    weights, optimizer, state = 0, 0, backend.state()
    for path, shards in state.items():
        if path.startswith("model."):
            weights += _bytes(shards, device)
        else:
            optimizer += _bytes(shards, device)
    gradients = [local_of(p.grad) for p in backend.parameters if p.grad is not None]
    of_gradients = sum(g.nbytes for g in gradients if g.device.type == device.type)
    total = resident() if device.type == "cpu" else None
    if device.type == "cuda":
        total = torch.cuda.memory_allocated(device)
    rest = None if total is None else max(0, total - weights - of_gradients - optimizer)
    return Held(weights, of_gradients, optimizer, rest, min(before, rest or 0))


def _bytes(shards: Shards, device: torch.device) -> int:
    return sum(part.nbytes for _, part in shards.boxes if part.device.type == device.type)


def asked_for(error: BaseException) -> int:
    """The bytes of the allocation that failed; 0 where the error does not say."""
    told = ASKED.search(str(error))
    return int(float(told[1]) * UNITS[told[2]]) if told else 0


def changes(work: Work, of: Held, recomputes: bool) -> Iterator[Change]:
    """What would take less, the smallest change first.

    Args:
        work: of the run.
        of: what the rank holds.
        recomputes: see `lines`.
    """
    config, ranks, backend = work.config, work.world.size, work.config.backend
    name = type(work.backend).__name__.lower()
    smaller = _micro_batch(work)
    if smaller is not None:
        at_once, half = smaller
        yield Change(f"--train.micro_batch_size {half} ({at_once} samples at once now)", of.activations // 2)
    if recomputes and backend.recompute in ("none", "selective"):
        what = "--backend.recompute blocks, which changes no bit and computes the forward of blocks twice"
        yield Change(what, of.activations // 2)
    state = of.weights + of.gradients + of.optimizer
    sharded = name == "fsdp2" or (name == "deepspeed" and backend.zero_stage == 3)
    if sharded:
        yield Change(f"more ranks to share weights, gradients and optimizer state among: {2 * ranks}", state // 2)
    elif config.optim.name not in UNFIT_OPTIMIZERS["fsdp2"]:
        start, each = "--backend.name fsdp2", max(2, ranks)
        start = start if ranks > 1 else f"torchrun --nproc_per_node=2 ... {start}"
        shares = f"{start}, which shares weights, gradients and optimizer state among {each} ranks"
        yield Change(shares, state - state // each)
    offloads = name == "fsdp2" or (name == "deepspeed" and bool(backend.zero_stage))
    if offloads and not backend.offload and work.world.device.type != "cpu":
        yield Change("--backend.offload true, which keeps the optimizer's state on the CPU", of.optimizer)


def _micro_batch(work: Work) -> tuple[int, int] | None:
    """The most samples that this rank has at once, and half of them; None where they cannot be cut."""
    config, findings = work.config, work.backend.findings
    share = -(-config.train.global_batch_size // work.world.size)
    at_once = min(share, config.train.micro_batch_size or share)
    group = group_of(config.model)
    if findings.mixes_samples or (findings.norms and group is None):
        return None
    half = at_once // 2 // (group or 1) * (group or 1)
    return (at_once, half) if half else None


def size(count: int) -> str:
    """Bytes in the unit that fits."""
    for unit, each in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= each:
            return f"{count / each:,.1f} {unit}"
    return f"{count} bytes"
