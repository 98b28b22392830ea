"""What the loop asks of the config: its sizes, the optimizer and its schedule. Pure, and before torch is imported."""

from collections.abc import Iterator

from dist_train.config.lookup import parameters, torch_optimizers
from dist_train.config.tree import Config
from dist_train.config.values import not_finite, too_small, unknown
from dist_train.ranks.launcher import Launcher

OPTIM_FIELDS = ("lr", "weight_decay", "momentum")
UNFIT_OPTIMIZERS = {
    "LBFGS": "it evaluates the loss several times a step",
    "SparseAdam": "it takes sparse gradients only",
    "Muon": "it takes matrices only, and a model has biases",
}


def problems(config: Config, launcher: Launcher) -> Iterator[str]:
    """A line for every mistake."""
    yield from _ranges(config)
    yield from _batch(config, launcher)
    yield from _optimizer(config)
    yield from _schedule(config)


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
            "train.seed": (t.seed, 0),
            "optim.warmup_steps": (o.warmup_steps, 0),
            "optim.step_size": (o.step_size, 1),
        }
    )
    if t.seed >= 2**63:
        yield f"train.seed: got {t.seed}, expected less than 2**63; for example --train.seed 0"
    rates = {f"optim.{key}": getattr(o, key) for key in ("lr", "weight_decay", "momentum", "lr_final")}
    limits = {f"train.{key}": getattr(t, key) for key in ("grad_clip", "max_time_s", "step_timeout_s")}
    yield from not_finite(rates, zero_fits=True)
    yield from not_finite({"optim.gamma": o.gamma}, zero_fits=False)
    yield from not_finite(limits, zero_fits=False, null_is_off=True)


def _batch(config: Config, launcher: Launcher) -> Iterator[str]:
    size, world = config.train.global_batch_size, launcher.world_size
    if size >= 1 and size % world:
        below, above = size // world * world, (size // world + 1) * world
        nearest = f"the nearest are {below} and {above}" if below else f"the nearest is {above}"
        yield (
            f"train.global_batch_size: got {size} on {world} ranks, expected a multiple of {world}; "
            f"{nearest}, for example --train.global_batch_size {above}"
        )
    micro = config.train.micro_batch_size
    if micro is not None and micro > size:
        yield (
            f"train.micro_batch_size: got {micro}, expected at most train.global_batch_size, which is {size}; "
            f"leave it out (null) to take a rank's share at once"
        )


def _optimizer(config: Config) -> Iterator[str]:
    optim, known = config.optim, torch_optimizers()
    names = [n for n in known if n not in UNFIT_OPTIMIZERS]
    if optim.name in UNFIT_OPTIMIZERS:
        yield f"optim.name: got {optim.name}, but {UNFIT_OPTIMIZERS[optim.name]}; expected one of {', '.join(names)}"
        return
    if optim.name not in known:
        yield unknown("optim.name", optim.name, names, "optimizer")
        return
    takes = parameters(known[optim.name], optim.name) or {}
    own = [k for k in takes if k not in ("params", *OPTIM_FIELDS)]
    for key in OPTIM_FIELDS:
        value = getattr(optim, key)
        if value is not None and key not in takes:
            yield f"optim.{key}: got {value}, but torch.optim.{optim.name} does not have it; leave it out (null)"
    for key, value in optim.args.items():
        if key in OPTIM_FIELDS:
            yield f"optim.args.{key}: got {value!r}, expected it as optim.{key}; write --optim.{key}"
        elif key not in own:
            yield unknown("optim.args", key, own, f"argument of torch.optim.{optim.name}")


def _schedule(config: Config) -> Iterator[str]:
    o = config.optim
    for key in ("step_size", "gamma"):
        value = getattr(o, key)
        if o.schedule == "step" and value is None:
            example = "1000" if key == "step_size" else "0.1"
            yield f"optim.{key}: got nothing, but optim.schedule step needs it; for example --optim.{key} {example}"
        if o.schedule != "step" and value is not None:
            yield f"optim.{key}: got {value} with optim.schedule {o.schedule}, which does not have it; leave it out"
    if o.lr_final and o.schedule not in ("linear", "cosine"):
        yield f"optim.lr_final: got {o.lr_final} with optim.schedule {o.schedule}, which does not have it; leave it out"
    total = config.train.max_steps
    if total is not None and o.warmup_steps > total:
        yield f"optim.warmup_steps: got {o.warmup_steps}, expected at most train.max_steps, which is {total}"
