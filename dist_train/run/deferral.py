"""Which runs start without a whole copy of the model on any rank, and how (backends/start.py)."""

import gc
import sys
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from dist_train.backends.fit import some
from dist_train.backends.precision import Precision, cast
from dist_train.backends.pretended import leftovers, pretended
from dist_train.backends.probe import Findings
from dist_train.backends.start import Start
from dist_train.checkpoint import later, places
from dist_train.config.tree import Config
from dist_train.data.feed import Feed
from dist_train.data.sets import Data
from dist_train.errors import ConfigError
from dist_train.models import draws
from dist_train.models.deferred import record
from dist_train.models.recording import Unrecordable
from dist_train.run.look import look
from dist_train.tasks.base import Task

SHOWN = 200  # characters of an error
AUTO = 100_000_000  # weights, from which on `auto` is worth the seconds that torch's fake tensors take to import

LOOKS: WeakSet[Any] = WeakSet()  # the modes of torch's fake tensors in which models were looked at


class Whole(Exception):
    """The model is to be built whole on every rank: why."""


def defers(config: Config) -> bool:
    """Whether a run of this config may start so."""
    return config.backend.name == "fsdp2" and config.backend.start != "whole"


def begun(
    config: Config, make: Callable[[], nn.Module], dtype: torch.dtype, device: torch.device, warm: bool
) -> tuple[nn.Module, Start, tuple[str, ...]] | None:
    """The model with its parameters on the meta device, what gives it their values, and lines about what is loaded
    from model.init_from; None where it is too small to be started so.

    Args:
        config: of the run.
        make: gives the model.
        dtype: of its parameters.
        device: of its buffers.
        warm: see assemble.build.

    Raises:
        Whole: it cannot be done with this model.
        ConfigError: of model.init_from.
    """
    try:
        found = record(lambda: cast(make(), dtype), AUTO if config.backend.start == "auto" else 0)
        if found is None:
            return None
        model, start = found[0], Start(found[1])
        start.settle(device)
        later_on = {name for name, value in model.state_dict().items() if value.is_meta}
        if not later_on <= dict(model.named_parameters(remove_duplicate=False)).keys():
            raise Unrecordable("gives the model's state other names than its parameters have")
        lines: tuple[str, ...] = ()
        if warm and config.model.init_from is not None:
            lines = later.warm_start(model, start, places.at(config.model.init_from), config.model.init_strict)
    except Unrecordable as error:
        raise Whole(f"its constructor {error}") from error
    return model, start, lines


def looked(
    config: Config, model: nn.Module, task: Task, feed: Feed, data: Data, precision: Precision, trains: bool
) -> Findings:  # fmt: skip
    """See look.look, for a model whose parameters are on the meta device. Raises Whole where that needs values, also
    where it would raise for another reason: then a look at the whole model says it better."""
    try:
        with pretended(model, precision.device) as as_if:
            LOOKS.add(as_if.mode)
            findings = look(config, model, task, feed, data, precision, trains, as_if)
            del as_if
    except Exception as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:SHOWN]}"
        raise Whole(f"its forward does not run on tensors without values ({why})") from error
    finally:
        draws.forget()
    if config.backend.mesh.get("tensor", 1) != 1 and draws.drawn(model):
        raise Whole("its split layers draw, and what each rank draws is held against the whole model first")
    left = leftovers(model)
    if left:
        raise Whole(f"its forward keeps tensors ({some(tuple(left))})")
    return findings


def check_left(start: str) -> None:
    """Raises ConfigError where somebody has kept a tensor without values, which the run would find there.

    Args:
        start: backend.start.
    """
    fakes = sys.modules.get("torch._subclasses.fake_tensor")
    if fakes is None:  # nobody has looked
        return
    gc.collect()
    left = [thing for thing in gc.get_objects() if type(thing) is fakes.FakeTensor and thing.fake_mode in LOOKS]
    LOOKS.clear()
    if left:
        raise ConfigError(
            f"backend.start: got {start}, but the model, the task or a library keeps {len(left)} tensors of a first "
            f"look that is taken without values (one of them {list(left[0].shape)}), and the run would compute with "
            f"them; write --backend.start whole"
        )


def said(why: str) -> str:
    """A line for people."""
    return f"model: it is built whole on every rank before it is sharded (backend.start): {why}"
