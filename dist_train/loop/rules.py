"""What the loop asks of the config: its sizes, the optimizer and its schedule. Pure, and before torch is imported."""

import math
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from dist_train.config.lookup import accepts, parameters, torch_optimizers
from dist_train.config.tree import Config
from dist_train.config.values import no_share, not_finite, too_small, unknown
from dist_train.ranks.launcher import Launcher

# The keys of train.early_stopping, with their defaults.
EARLY_STOPPING = {"metric": None, "patience": 3, "min_delta": 0.0}
OPTIM_FIELDS = ("lr", "weight_decay", "momentum")
# Arguments that are for all parameters: how an update is computed.
FOR_ALL = {"fused", "foreach", "differentiable", "capturable"}
# Each schedule with the keys that it has; the keys that it cannot do without, and examples of these.
SCHEDULES: dict[str, tuple[str, ...]] = {
    "constant": (),
    "linear": ("lr_final",),
    "cosine": ("lr_final",),
    "polynomial": ("lr_final", "power"),
    "step": ("step_size", "gamma"),
    "wsd": ("lr_final", "decay_steps", "decay_share"),
    "cosine_restarts": ("lr_final", "restart_steps", "restart_factor"),
}
NEEDED = {"power", "step_size", "gamma", "restart_steps"}
EXAMPLES = {"step_size": "1000", "gamma": "0.1", "power": "2.0", "decay_steps": "1000", "decay_share": "0.1"}
EXAMPLES |= {"restart_steps": "1000", "restart_factor": "2"}
UNFIT_OPTIMIZERS = {
    "LBFGS": "it evaluates the loss several times a step",
    "SparseAdam": "it takes sparse gradients only",
}
MUON = Path(__file__).with_name("muon.py")  # in the place of torch's, which its version 2.8 does not have
# What AdamW takes beside Muon, in optim.args.adamw and in a group with optimizer AdamW.
BESIDE = ("lr", "betas", "eps", "weight_decay")


def problems(config: Config, _: Launcher) -> Iterator[str]:
    """A line for every mistake."""
    yield from _ranges(config)
    yield from _batch(config)
    yield from _optimizer(config)
    yield from _schedule(config)
    yield from _average(config)
    yield from _early_stopping(config)
    yield from _audit(config)


def _ranges(config: Config) -> Iterator[str]:
    t, o = config.train, config.optim
    yield from too_small(
        {
            "train.epochs": (t.epochs, 1),
            "train.max_steps": (t.max_steps, 1),
            "train.global_batch_size": (t.global_batch_size, 1),
            "train.micro_batch_size": (t.micro_batch_size, 1),
            "train.eval_batch_size": (t.eval_batch_size, 1),
            "train.eval_every_epochs": (t.eval_every_epochs, 1),
            "train.eval_every_steps": (t.eval_every_steps, 1),
            "train.threads": (t.threads, 1),
            "train.audit_every_steps": (t.audit_every_steps, 1),
            "train.seed": (t.seed, 0),
            "optim.warmup_steps": (o.warmup_steps, 0),
            "optim.step_size": (o.step_size, 1),
            "optim.decay_steps": (o.decay_steps, 1),
            "optim.restart_steps": (o.restart_steps, 1),
            "optim.restart_factor": (o.restart_factor, 1),
            "optim.ema_start": (o.ema_start, 0),
        }
    )
    if t.seed >= 2**63:
        yield f"train.seed: got {t.seed}, expected less than 2**63; for example --train.seed 0"
    rates = {f"optim.{key}": getattr(o, key) for key in ("lr", "weight_decay", "momentum", "lr_final")}
    limits = {f"train.{key}": getattr(t, key) for key in ("grad_clip", "max_time_s", "step_timeout_s")}
    yield from not_finite(rates, zero_fits=True)
    yield from not_finite({"optim.gamma": o.gamma, "optim.power": o.power}, zero_fits=False)
    yield from not_finite(limits, zero_fits=False, null_is_off=True)


def _batch(config: Config) -> Iterator[str]:
    size = config.train.global_batch_size
    micro = config.train.micro_batch_size
    if micro is not None and micro > size:
        yield (
            f"train.micro_batch_size: got {micro}, expected at most train.global_batch_size, which is {size}; "
            f"leave it out (null) to take a rank's share at once"
        )


def _optimizer(config: Config) -> Iterator[str]:
    optim, known = config.optim, torch_optimizers() | {"Muon": MUON}
    names = [n for n in known if n not in UNFIT_OPTIMIZERS]
    if optim.name in UNFIT_OPTIMIZERS:
        yield f"optim.name: got {optim.name}, but {UNFIT_OPTIMIZERS[optim.name]}; expected one of {', '.join(names)}"
        return
    if optim.name not in known and ":" not in optim.name:
        yield unknown("optim.name", optim.name, [*names, "or your own as module:Class"], "optimizer", names)
        return
    if optim.name == "Muon":
        yield from _muon(config)
        return
    if optim.name in known:
        takes, title = parameters(known[optim.name], optim.name) or {}, f"torch.optim.{optim.name}"
    else:
        takes, title = accepts({}, optim.name, "optim.name"), optim.name
        yield from _own_optimizer(config, takes)
    yield from _arguments(config, takes, title)
    yield from _groups(config, takes, title)


def _own_optimizer(config: Config, takes: dict[str, bool]) -> Iterator[str]:
    """Of an optimizer of the user's own: what it needs."""
    optim = config.optim
    if "lr" not in takes and "**" not in takes:
        own = ", ".join(takes) or "nothing"
        yield f"optim.name: got {optim.name!r} that takes {own}, expected parameters, and lr as well"
    given = {"lr", *optim.args, *(key for key in OPTIM_FIELDS if getattr(optim, key) is not None)}
    for key in [k for k, required in takes.items() if required][1:]:  # the first takes the parameters
        if key not in given:
            path = f"optim.{key}" if key in OPTIM_FIELDS else f"optim.args.{key}"
            yield f"{path}: got nothing, expected a value: {optim.name} needs it; write --{path} VALUE"


def _arguments(config: Config, takes: dict[str, bool], title: str) -> Iterator[str]:
    optim = config.optim
    own = [k for k in [*takes][1:] if k not in (*OPTIM_FIELDS, "**")]
    for key in OPTIM_FIELDS:
        value = getattr(optim, key)
        if value is not None and key not in takes and "**" not in takes:
            yield f"optim.{key}: got {value}, but {title} does not have it; leave it out (null)"
    if optim.no_decay and "weight_decay" not in takes and "**" not in takes:
        yield f"optim.no_decay: got true, but {title} has no weight_decay; leave it out"
    for key, value in optim.args.items():
        if key in OPTIM_FIELDS:
            yield f"optim.args.{key}: got {value!r}, expected it as optim.{key}; write --optim.{key}"
        elif key not in own and "**" not in takes:
            yield unknown("optim.args", key, own, f"argument of {title}")


def _groups(config: Config, takes: dict[str, bool], title: str) -> Iterator[str]:
    """The settings of the groups. Whether their patterns match anything, the model tells."""
    valid = ["match", *(k for k in [*takes][1:] if k not in (*FOR_ALL, "**"))]
    for i in range(len(config.optim.groups)):
        yield from _group(config, i, valid, takes, title)


def _group(config: Config, i: int, valid: Sequence[str], takes: Collection[str], title: str) -> Iterator[str]:
    group, path = config.optim.groups[i], f"optim.groups[{i}]"
    if not isinstance(group.get("match"), str):
        example = "{match: 'head.*', lr: 0.01}"
        yield f"{path}: got {group}, expected a pattern of names in match; for example {example}"
    for key, value in group.items():
        if key in FOR_ALL and key in takes:
            yield f"{path}.{key}: got {value!r}, which is for all parameters; write --optim.args.{key}"
        elif key not in valid and "**" not in takes:
            yield unknown(path, key, valid, f"argument of {title}")
        elif key in OPTIM_FIELDS and not _is_rate(value):
            yield f"{path}.{key}: got {value!r}, expected a finite number of 0 or more; for example 0.1"
    if "lr" in group and not config.optim.lr:
        yield (
            f"{path}.lr: got {group['lr']} with optim.lr 0, to which it would be related; write a last group "
            f"{{match: '*', lr: 0.0}} in its place"
        )


def _muon(config: Config) -> Iterator[str]:
    """Of Muon, with AdamW for what is no matrix."""
    takes = {key: required for key, required in (parameters(MUON, "Muon") or {}).items() if key != "optimizer"}
    yield from _arguments(config, takes, "Muon")
    adamw, path = config.optim.args.get("adamw"), "optim.args.adamw"
    if adamw is not None and not isinstance(adamw, dict):
        yield f"{path}: got {adamw!r}, expected arguments of AdamW; for example --{path}.lr 3e-4"
    elif adamw:
        for key, value in adamw.items():
            if key not in BESIDE:
                yield unknown(path, key, BESIDE, "argument of AdamW")
            elif key in OPTIM_FIELDS and not _is_rate(value):
                yield f"{path}.{key}: got {value!r}, expected a finite number of 0 or more; for example 3e-4"
        if "lr" in adamw and not config.optim.lr:
            yield f"{path}.lr: got {adamw['lr']} with optim.lr 0, to which it would be related; leave it out"
    own = [key for key in [*takes][1:] if key not in ("ns_dtype", "adamw", *FOR_ALL)]
    valid = {"Muon": own, "AdamW": BESIDE, None: ("lr", "weight_decay")}
    titles = {None: "Muon and AdamW both; with optimizer: Muon, or AdamW, a group takes more"}
    for i, group in enumerate(config.optim.groups):
        said = group.get("optimizer")
        if said not in valid:
            yield unknown(f"optim.groups[{i}].optimizer", str(said), ["Muon", "AdamW"], "optimizer")
        else:
            yield from _group(config, i, ["match", "optimizer", *valid[said]], takes, titles.get(said, said))


def _is_rate(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= 0


def _schedule(config: Config) -> Iterator[str]:
    o = config.optim
    if o.schedule not in SCHEDULES:
        if ":" not in o.schedule:
            valid = [*SCHEDULES, "or your own as module:function"]
            yield unknown("optim.schedule", o.schedule, valid, "schedule", [*SCHEDULES])
            return
        takes = accepts({}, o.schedule, "optim.schedule")
        needed = sum(takes.values())
        if needed > 2 or (len(takes) < 2 and "**" not in takes):
            own = ", ".join(takes) or "nothing"
            yield f"optim.schedule: got {o.schedule!r} that takes {own}, expected (step, total_steps)"
    has = SCHEDULES.get(o.schedule, ())
    for key in EXAMPLES:
        value = getattr(o, key)
        if value is not None and key not in has:
            yield f"optim.{key}: got {value} with optim.schedule {o.schedule}, which does not have it; leave it out"
    for key in has:
        if key in NEEDED and getattr(o, key) is None:
            example = f"for example --optim.{key} {EXAMPLES[key]}"
            yield f"optim.{key}: got nothing, but optim.schedule {o.schedule} needs it; {example}"
    if o.schedule == "wsd" and (o.decay_steps is None) == (o.decay_share is None):
        got = "nothing" if o.decay_steps is None else f"{o.decay_steps} and optim.decay_share {o.decay_share}"
        yield f"optim.decay_steps: got {got}, expected it or optim.decay_share; for example --optim.decay_share 0.1"
    if o.lr_final and "lr_final" not in has:
        yield f"optim.lr_final: got {o.lr_final} with optim.schedule {o.schedule}, which does not have it; leave it out"
    if o.warmup_steps and o.warmup_share is not None:
        yield (
            f"optim.warmup_share: got {o.warmup_share} with optim.warmup_steps {o.warmup_steps}, expected one of them; "
            f"leave the other out"
        )
    yield from no_share({"optim.warmup_share": o.warmup_share, "optim.decay_share": o.decay_share})
    total = config.train.max_steps
    for key in ("warmup_steps", "decay_steps"):
        value = getattr(o, key)
        if total is not None and value is not None and value > total:
            yield f"optim.{key}: got {value}, expected at most train.max_steps, which is {total}"


def _average(config: Config) -> Iterator[str]:
    o, total = config.optim, config.train.max_steps
    if o.ema is not None and not 0 <= o.ema < 1:
        yield f"optim.ema: got {o.ema}, expected 0 or more and below 1; for example --optim.ema 0.999"
    if o.ema is None and o.ema_start:
        yield f"optim.ema_start: got {o.ema_start} without optim.ema; for example --optim.ema 0.999"
    if total is not None and o.ema_start >= max(total, 1):
        yield f"optim.ema_start: got {o.ema_start}, expected less than train.max_steps, which is {total}"


def _audit(config: Config) -> Iterator[str]:
    path, every = "train.audit_every_steps", config.train.audit_every_steps
    if every is None:
        return
    if config.compile.scope == "step":
        yield f"{path}: got {every} with compile.scope step, which is captured as a whole; write --compile.scope model"
    if config.task.name == "none":
        yield f"{path}: got {every} with task.name none, whose loss a loop of your own has; leave it out"


def _early_stopping(config: Config) -> Iterator[str]:
    asked, path = config.train.early_stopping, "train.early_stopping"
    for key in asked.keys() - EARLY_STOPPING.keys():
        yield unknown(path, str(key), list(EARLY_STOPPING))
    settings = EARLY_STOPPING | asked
    metric, patience, delta = (settings[key] for key in EARLY_STOPPING)
    if metric is not None and not isinstance(metric, str):
        yield f"{path}.metric: got {metric!r}, expected the name of a metric; for example --{path}.metric eval/loss"
    if type(patience) is not int or patience < 1:
        yield f"{path}.patience: got {patience!r}, expected a whole number above 0; for example --{path}.patience 3"
    if type(delta) not in (int, float) or not (math.isfinite(delta) and delta >= 0):
        yield f"{path}.min_delta: got {delta!r}, expected a number of 0 or more; for example --{path}.min_delta 0.001"
