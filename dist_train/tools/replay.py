"""python -m dist_train replay --run.dir RUN --step K [--steps N] [--samples 10] [--tolerance T] [--json FILE]

Takes the steps K to K + N - 1 of a run again (they count from 1), from its newest checkpoint before them or from its
start, and shows what each was made of: the numbers of its samples with the loss of each, largest first, the gradient
norm by layer, and how far it is from what the run recorded. It changes nothing of the run, and leaves what it found in
RUN/replay/step-K.json, which the report shows, or in FILE. The config is the run's own with what the command line gives
on top, so any backend and number of ranks may take the steps; started alone, backend single does. Exit code 1 if a step
differs by more than T, which is what rounding may do in the run's precision (1e-5 in float32).
"""

import base64
import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_train.backends import mesh
from dist_train.columns import columns
from dist_train.config.load import load
from dist_train.config.tree import Config
from dist_train.errors import ConfigError
from dist_train.ranks import ending
from dist_train.ranks.launcher import Launcher
from dist_train.run.check import check
from dist_train.tools.finished import alone, recorded
from dist_train.tools.options import split
from dist_train.tools.parity import number
from dist_train.whole import can_write, write

if TYPE_CHECKING:
    from dist_train.run.assemble import Parts
    from dist_train.run.replaying import Step

OPTIONS = {
    "--step": ("", "4711"),
    "--steps": ("1", "10"),
    "--samples": ("10", "20"),
    "--tolerance": ("as in parity", "1e-4"),
    "--json": ("", "replay.json"),
}
SHOWN_LAYERS = 10
COMPARED = ("train/loss", "train/grad_norm")
Line = dict[str, float]  # of metrics, by name


def run(argv: list[str], launcher: Launcher) -> int:
    """Prints the steps. Returns 1 if one differs from what was recorded."""
    options, rest = split(argv, OPTIONS, "replay", paths=("--json",))
    if {"-h", "--help"} & set(rest):
        load(rest, "python -m dist_train replay")  # which prints the keys of the config, and ends
    if not options["--step"]:
        raise ConfigError("--step: got nothing, expected the step to take again, from 1; for example --step 4711")
    first, count, shown = (number(name, options[name]) for name in ("--step", "--steps", "--samples"))
    folder, config = recorded(rest, "replay")
    config = _as_taken(alone(config, rest, "replay", launcher))
    check(config, launcher, writes=False)
    tolerance = _tolerance(options["--tolerance"], config)
    lines = _recorded(folder)
    path = Path(options["--json"]) if options["--json"] else folder / "replay" / f"step-{first:08d}.json"
    if options["--json"]:
        can_write(path, "--json")

    from dist_train.checkpoint import resume
    from dist_train.data.agree import agree
    from dist_train.data.order import steps_per_epoch
    from dist_train.loop.work import total_steps
    from dist_train.ranks import dist
    from dist_train.run import assemble, replaying

    device = dist.resolve_device(config.train.device, launcher.local_rank)
    dist.set_threads(config.train.threads, launcher.local_world_size)
    parts = assemble.build(config, device)
    cfg = config.train
    total = total_steps(cfg, steps_per_epoch(len(parts.data.train), cfg.global_batch_size, cfg.drop_last))
    if first > total:
        raise ConfigError(f"--step: got {first}, expected at most {total}, which the run has")
    last = min(total, first + count - 1)
    facts = resume.facts_of(parts.model, parts.data)
    with dist.joined(launcher, device, tensor=mesh.of(config, launcher.world_size).tensor) as world:
        agree(parts.data, parts.feeds, world)
        found = _checkpoint(config, folder, first, world)
        differences = resume.differences(found, config, facts) if found else []
        if differences:
            raise ConfigError(*differences)
        if world.is_main:
            print(f"from {found.folder}: step {found.manifest.step}" if found else "from the start", flush=True)
        every = config.track.every_steps
        end = min(total, -(-last // every) * every)  # the next line of metrics, to compare with
        steps, taken = replaying.replay(config, world, parts, found, first, last, end)
        code = ending.OK
        if world.is_main:
            off = _compared(lines, taken, tolerance)
            tree = _tree(config, world, found.manifest.step if found else 0, steps, off, parts, shown)
            for one in tree["steps"]:
                print("\n".join(_shown(one, shown)))
            print("\n".join(_verdict(off, tolerance)))
            path.parent.mkdir(exist_ok=True)
            write(path, (json.dumps(tree, indent=1) + "\n").encode(), "--json")
            print(f"kept in {path}")
            code = ending.FAILED if any(one["differs"] for one in off) else ending.OK
        return dist.on_main(lambda: code)


def _as_taken(config: Config) -> Config:
    """The run's config, for steps that are only looked at: none is captured, and nothing is tracked or saved."""
    compiled = replace(config.compile, scope="model")
    track = replace(config.track, profile={}, wandb=False, tensorboard=False)
    return replace(config, compile=compiled, track=track)


def _tolerance(given: str, config: Config) -> float:
    from dist_train.tools.agreement import FLOOR

    if given == OPTIONS["--tolerance"][0]:
        return FLOOR[config.train.precision]
    try:
        value = float(given)
    except ValueError:
        value = math.nan
    if not value >= 0:
        raise ConfigError(f"--tolerance: got {given}, expected a relative difference; for example --tolerance 1e-4")
    return value


def _recorded(folder: Path) -> dict[int, Line]:
    """What the run recorded of its steps, by step: what was written last, where a step was taken twice."""
    from dist_train.report.read import read

    found: dict[int, Line] = {}
    (of_run,) = read([folder])
    for name in COMPARED:
        series = of_run.series.get(name)
        for step, value in zip(series.step, series.value, strict=True) if series else ():
            found.setdefault(int(step), {})[name] = float(value)
    return found


def _checkpoint(config: Config, folder: Path, first: int, world: Any) -> Any:
    """The newest whole checkpoint before a step: the run's own, or of the one that it went on from. Collective."""
    from dist_train.checkpoint import resume

    asked = config.checkpoint.resume
    places = [folder, *([Path(asked)] if asked not in ("auto", "never") else [])]
    for place in places:
        found, _ = resume.choose(place, world, before=first)
        if found is not None:
            return found
    return None


def _compared(
    lines: dict[int, dict[str, float]], taken: list[dict[str, Any]], tolerance: float
) -> list[dict[str, Any]]:
    """Each line of metrics that was taken again, beside the one that the run recorded."""
    rows = []
    for line in taken:
        step = int(line["step"])
        for name in COMPARED:
            before, now = lines.get(step, {}).get(name), line.get(name)
            if before is None or now is None:
                continue
            off = _off(float(now), before)
            rows.append(
                {"step": step, "metric": name, "recorded": before, "replayed": float(now), "relative": off,
                 "differs": not off <= tolerance}
            )  # fmt: skip
    return rows


def _off(now: float, before: float) -> float:
    if now == before or (math.isnan(now) and math.isnan(before)):
        return 0.0
    return abs(now - before) / abs(before) if before else math.inf


def _tree(
    config: Config, world: Any, begin: int, steps: "list[Step]", off: list[dict[str, Any]], parts: "Parts", shown: int
) -> dict[str, Any]:  # fmt: skip
    from dist_train.backends import chosen

    return {
        "from_step": begin,
        "backend": chosen(config.backend.name, world.launcher),
        "world_size": world.size,
        "compared": off,
        "steps": [_of_step(step, parts, shown) for step in steps],
    }


def _of_step(step: "Step", parts: "Parts", shown: int) -> dict[str, Any]:
    from dist_train.run.described import described

    samples: list[dict[str, Any]] = []
    for i, (sample, loss) in enumerate(step.samples):
        one: dict[str, Any] = {"index": sample, "loss": loss}
        if i < shown:
            one["what"] = described(parts, sample)
            if png := _png(parts, sample):
                one["png"] = png
        samples.append(one)
    return {
        "step": step.number,
        "units": step.units,
        "unit": parts.task.unit,
        "loss": step.loss,
        "grad_norm": step.grad_norm,
        "layers": step.layers,
        "samples": samples,
        "unknown": step.unknown,
    }


def _png(parts: "Parts", sample: int) -> str | None:
    from dist_train.run.described import picture

    pixels = picture(parts, sample)
    if pixels is None:
        return None
    try:
        from dist_train.report.images import picture as as_image
    except ImportError:  # the extra `report` has what makes pictures
        return None
    file = io.BytesIO()
    as_image(pixels).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _shown(step: dict[str, Any], shown: int) -> list[str]:
    samples, layers = step["samples"], sorted(step["layers"].items(), key=lambda one: -_large(one[1]))
    norm = "" if step["grad_norm"] is None else f", gradient norm {step['grad_norm']:.6g}"
    counted = "" if step["unit"] == "samples" else f", {step['units']:,.0f} {step['unit']}"
    lines = [f"step {step['step']}: loss {step['loss']:.6g}{norm}, {len(samples)} samples{counted}"]
    if step["unknown"]:
        lines += [f"no loss of each sample, as {step['unknown']}"]
    head = ("sample", "loss", "what it is")
    rows = [
        (str(one["index"]), "-" if one["loss"] is None else f"{one['loss']:.6g}", one.get("what", ""))
        for one in samples[:shown]
    ]
    lines += [columns([head, *rows])]
    if len(samples) > shown:
        lines += [f"and {len(samples) - shown} others"]
    of_layers = [(name, f"{value:.6g}") for name, value in layers[:SHOWN_LAYERS]]
    if of_layers:
        lines += [columns([("weights", "gradient norm"), *of_layers])]
    return lines


def _large(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _verdict(off: list[dict[str, Any]], tolerance: float) -> list[str]:
    if not off:
        return ["the run recorded none of these steps, so nothing is compared"]
    differing = [one for one in off if one["differs"]]
    for one in differing[:1]:
        return [
            f"differs from what was recorded at step {one['step']}: {one['metric']} {one['replayed']:.9g}, recorded "
            f"{one['recorded']:.9g}, {one['relative']:.1e} off, expected at most {tolerance:.1e}"
        ]
    worst = max(one["relative"] for one in off)
    return [f"as recorded: at most {worst:.1e} off in {len({one['step'] for one in off})} lines of metrics"]
