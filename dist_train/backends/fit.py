"""What a backend asks of the model itself, once that is there; `rules.py` has what it asks of the config."""

import itertools
from collections.abc import Iterator

import torch
from torch import nn

from dist_train.backends.probe import Findings
from dist_train.config.tree import Config
from dist_train.errors import ConfigError
from dist_train.models import split

NAMES_SHOWN = 4
# By what torch's optimizers and the group of DDP take; see check_sparse for the rest.
SPARSE_OPTIMIZERS = ("SGD", "Adagrad")
SPARSE_BACKENDS = ("single", "ddp", "accelerate")


def check_model(backend: str, findings: Findings, model: nn.Module | None = None, stage: int | None = None) -> None:
    """Raises ConfigError where a backend could not train the model as one process does.

    Args:
        backend: its name, `auto` settled.
        findings: what a first forward and backward of the model showed.
        model: before it is sharded or wrapped; None leaves out what only it shows.
        stage: of ZeRO.
    """
    if findings.written and backend != "single":
        raise ConfigError(
            f"model: got a forward that changes weights in place ({some(findings.written)}), as an embedding's "
            f"max_norm does; under {backend} each rank would change its own copy by the samples that it sees; expected "
            f"a forward that only reads weights; take that out, or train in one process, without torchrun"
        )
    if model is not None and backend == "deepspeed" and stage:
        lines = list(_zero(model, stage))
        if lines:
            raise ConfigError(*lines)


def check_split(config: Config, model: nn.Module, findings: Findings, ranks: int, block: int | None) -> None:
    """Raises ConfigError where the layers of a model cannot be split over tensor ranks.

    Args:
        config: of the run.
        model: the whole one.
        findings: what a first forward and backward of the model showed.
        ranks: of the tensor dimension.
        block: tokens of a sample; None where that is not known.
    """
    split.check(model, config.model, ranks, block)
    if ranks > 1 and findings.draws:
        raise ConfigError(
            f"backend.mesh.tensor: got {ranks}, but the model draws by {some(findings.draws)}, of which ranks that "
            f"split layers would not have parts of the same; expected dropout and stochastic depth alone, with "
            f"train.draws keyed; or write --backend.mesh.tensor 1"
        )


def _zero(model: nn.Module, stage: int) -> Iterator[str]:
    """What ZeRO 1 to 3 cannot do, which move the weights into flat buffers of one type."""
    instead = "write --backend.zero_stage 0, or --backend.name ddp"
    asked = {name: p for name, p in model.named_parameters() if p.requires_grad}
    others = tuple(name for name, p in asked.items() if p.dtype != torch.float32)
    if others:
        got = str(asked[others[0]].dtype).removeprefix("torch.")
        yield f"model: got weights in {got} ({some(others)}), expected float32 alone under ZeRO {stage}; {instead}"
    empty = tuple(name for name, p in model.named_parameters() if not p.numel())
    if stage == 3 and empty:
        yield (
            f"model: got weights of no elements ({some(empty)}), which ZeRO 3 cannot gather; take them out, or write "
            f"--backend.zero_stage 2"
        )
    for one, other in _overlapping(model):
        yield (
            f"model: got {one} and {other} in the same memory, which ZeRO {stage} would part; share the parameter "
            f"itself, as in self.head.weight = self.embedding.weight; or {instead}"
        )


def _overlapping(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Parameters that lie in the memory of another parameter, or of a buffer."""
    places = []
    tensors = [(name, p, True) for name, p in model.named_parameters()]
    tensors += [(name, b, False) for name, b in model.named_buffers()]
    for name, value, is_parameter in tensors:
        if value.numel():
            past = 1 + sum((n - 1) * step for n, step in zip(value.shape, value.stride(), strict=True))
            first = value.data_ptr()
            places.append((str(value.device), first, first + past * value.element_size(), name, is_parameter))
    places.sort()
    for (device, _, past, one, own), (device_too, first, _, other, own_too) in itertools.pairwise(places):
        if device == device_too and first < past and (own or own_too):
            yield one, other


def check_sparse(config: Config, backend: str, device: torch.device, findings: Findings) -> None:
    """Raises ConfigError where gradients are sparse, and the optimizer or the backend takes dense ones alone.

    Args:
        config: of the run.
        backend: its name, `auto` settled.
        device: of this rank.
        findings: what a first forward and backward of the model showed.
    """
    if not findings.sparse:
        return
    names = some(findings.sparse)
    optim, dense = config.optim, "or give the embedding dense ones with sparse=False"
    got = f"got {optim.name} for a model with sparse gradients ({names})"
    if optim.name not in SPARSE_OPTIMIZERS:
        raise ConfigError(f"optim.name: {got}, expected {' or '.join(SPARSE_OPTIMIZERS)}, which take them; {dense}")
    settings = {"weight_decay": optim.weight_decay, "momentum": optim.momentum} | optim.args
    for key, value in settings.items():
        if value and key in ("weight_decay", "momentum", "fused", "differentiable"):
            path = f"optim.{key}" if key in ("weight_decay", "momentum") else f"optim.args.{key}"
            raise ConfigError(f"{path}: {got} and {key} {value}, which needs dense ones; leave it out, {dense}")
    if backend not in SPARSE_BACKENDS or (backend != "single" and device.type != "cpu"):
        where = "" if device.type == "cpu" else f" on {device.type}"
        raise ConfigError(
            f"model: got sparse gradients ({names}) under {backend}{where}, which exchanges dense ones alone; give the "
            f"embedding dense ones with sparse=False, or train in one process, without torchrun"
        )


def some(names: tuple[str, ...]) -> str:
    """The first of the names, and how many more there are."""
    rest = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
