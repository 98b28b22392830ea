"""python -m dist_train plan [--config FILE.yaml] [--ranks 8] [--per-node 8] [--meshes 'ddp, {shard: 8}, ...']
    [--micro-batch-sizes 1,2,4] [--memory 80GB] [--gb-per-s 450,50] [--json]

What a rank would hold and send under each backend, mesh and micro-batch size, and which of them is recommended. On one
process: nothing is trained, and no rank is needed. Other options are the config's own.
"""

import contextlib
import json
import re
import sys
from dataclasses import asdict
from typing import Any

from dist_train.columns import columns
from dist_train.config.load import load
from dist_train.config.tree import Config
from dist_train.doctor.apart import Apart, Failed
from dist_train.doctor.candidates import FULL, Candidate, Machine, best, listed
from dist_train.doctor.estimate import Estimate
from dist_train.doctor.machine import memory
from dist_train.doctor.report import ranks as of_ranks
from dist_train.doctor.report import size
from dist_train.errors import ConfigError
from dist_train.ranks import ending
from dist_train.ranks.launcher import Launcher
from dist_train.run.check import check
from dist_train.tools.options import split

# Default, and an example. The speeds are those of an H100 in a DGX: NVLink, and an adapter of 400 Gbit/s.
OPTIONS = {
    "--ranks": ("8", "64"),
    "--per-node": ("", "8"),
    "--meshes": ("", "'ddp, {shard: 8}'"),
    "--micro-batch-sizes": ("", "1,2,4"),
    "--memory": ("", "80GB"),
    "--gb-per-s": ("450,50", "450,50"),
}
UNITS = {"": 1.0, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
PROG = "python -m dist_train plan"


def run(argv: list[str], launcher: Launcher) -> int:
    """Prints the table. Returns 0 if a candidate fits, else 1."""
    options, rest = split([word for word in argv if word != "--json"], OPTIONS, "plan")
    as_json, config = "--json" in argv, load(rest, PROG)
    if launcher.name != "none":
        raise ConfigError(f"plan: got {of_ranks(launcher.world_size)} of {launcher.name}, expected one process; {PROG}")
    ranks = number("--ranks", options["--ranks"])
    of_node = number("--per-node", options["--per-node"] or str(min(8, ranks)))
    if ranks % of_node:
        raise ConfigError(f"--per-node: got {of_node} with {ranks} ranks, expected a divisor; --per-node {ranks}")
    speeds = [1e9 * amount("--gb-per-s", text) for text in options["--gb-per-s"].split(",")]
    if len(speeds) != 2:
        raise ConfigError(
            f"--gb-per-s: got {options['--gb-per-s']!r}, expected GB/s that a rank sends inside a node, and between "
            f"nodes; for example --gb-per-s 450,50"
        )
    sizes = options["--micro-batch-sizes"]
    counts = [number("--micro-batch-sizes", text) for text in sizes.split(",")] if sizes else []
    given = amount("--memory", options["--memory"]) if options["--memory"] else None
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        tried = _tried(config, listed(config, options["--meshes"], counts, ranks, of_node), ranks, of_node)
        machine = Machine(ranks, of_node, *_memory(config, given, of_node), *speeds)
    chosen = best([found for _, found in tried], machine)
    print(json.dumps(_tree(tried, machine, chosen)) if as_json else _text(tried, machine, chosen))
    return ending.FAILED if chosen is None else ending.OK


Tried = list[tuple[Candidate, Estimate]]


def _tried(config: Config, every: list[Candidate], ranks: int, of_node: int) -> Tried:
    """What each needs. Raises ConfigError where one cannot be, or cannot be known."""
    for one in every:
        starter = "none" if one.config.backend.name == "single" else "torchrun"
        check(one.config, Launcher(starter, 0, ranks, 0, of_node), writes=False)

    found = []
    for one in every:
        try:
            found.append((one, Apart(_estimate, one.config, ranks, of_node).result()))
        except Failed as error:
            raise ConfigError(
                f"model.name: got {config.model.name}, which does not run on tensors without values under {one.name} "
                f"({error.what}), expected a forward that does not depend on them; a run of --train.max_steps 1 shows "
                f"what it needs"
            ) from error
    return found


def _estimate(config: Config, ranks: int, of_node: int) -> Estimate:
    from dist_train.doctor.traced import traced
    from dist_train.run import assemble

    return traced(config, assemble.read_data(config.data, config.data.download), ranks, of_node)


def _memory(config: Config, given: float | None, of_node: int) -> tuple[int, bool]:
    """Bytes of a rank, and whether they are the host's: of what was given, or of this machine."""
    from dist_train.ranks import dist

    device = dist.resolve_device(config.train.device, 0)
    if given is not None:
        return int(given), config.train.device == "cpu"
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0], False
    return memory()[1] // of_node, True


def _text(tried: Tried, machine: Machine, chosen: int | None) -> str:
    """The table, and what is recommended by which rule."""
    head = ("", "micro-batch", "memory", "weights", "gradients", "optimizer", "gathered", "activations", "temporary")
    rows = [(*head, "peak in", "sent a step", "ms", "")]
    for i, (one, found) in enumerate(tried):
        to = [f"{size(n)} {to.over}{' between nodes' if to.between else ''}" for to, n in found.sent.items()]
        parts = [size(count) if count else "-" for count in found.peak.parts.values()]
        ms = f"{1e3 * machine.seconds(found):.3g}"
        notes = [] if machine.fits(found) else ["does not fit"]
        notes += ["by formula"] if found.formula else []
        notes += ["recommended"] if i == chosen else []
        when = f"{found.micro} x {found.micro_batches}", size(machine.needed(found)), *parts, found.busiest
        rows.append((one.name, *when, ", ".join(to) or "-", ms, ", ".join(notes)))
    whose = f"{size(machine.memory)} {'of the host ' if machine.of_host else ''}a rank"
    lines = [f"{of_ranks(machine.ranks)}, {machine.of_node} on a node, {whose}", "", columns(rows), ""]
    if chosen is None:
        least, found = min(tried, key=lambda pair: machine.needed(pair[1]))
        largest = max(found.peak.parts, key=lambda kind: found.peak.parts[kind])
        lines += [
            f"none fits in {FULL:.0%} of {whose}; the least is {least.name} with {size(machine.needed(found))}, of "
            f"which {largest} take the most. Smaller --micro-batch-sizes, more --ranks, or --backend.offload true"
        ]
    else:
        lines += [f"recommended: {tried[chosen][0].options}", f"of what fits in {FULL:.0%} of {whose}, {RULE}"]
    return "\n".join(lines)


RULE = "it sends for the shortest time; of those alike, it has the fewest micro-batches, and then the least memory"


def _tree(tried: Tried, machine: Machine, chosen: int | None) -> dict[str, Any]:
    return {
        "machine": asdict(machine),
        "recommended": None if chosen is None else tried[chosen][0].options,
        "candidates": [
            {
                "name": one.name,
                "options": one.options,
                "micro_batch_size": found.micro,
                "micro_batches": found.micro_batches,
                "needed_bytes": machine.needed(found),
                "fits": machine.fits(found),
                "peak_in": found.busiest,
                "parts": found.peak.parts,
                "held": found.held,
                "start_bytes": found.start,
                "data_bytes": found.data,
                "sent": [asdict(to) | {"bytes": count} for to, count in found.sent.items()],
                "sending_s": machine.seconds(found),
                "formula": found.formula,
            }
            for one, found in tried
        ],
    }


def amount(option: str, text: str) -> float:
    """A number above 0, with a unit or without. Raises ConfigError."""
    found = re.fullmatch(r"\s*([\d.]+(?:e\d+)?)\s*([KMGT]B|)\s*", text)
    try:
        value = float(found[1]) * UNITS[found[2]] if found else 0.0
    except ValueError:
        value = 0.0
    if value <= 0:
        example = OPTIONS[option][1]
        raise ConfigError(f"{option}: got {text!r}, expected a number above 0; for example {option} {example}")
    return value


def number(option: str, text: str) -> int:
    """A whole number from 1 on. Raises ConfigError."""
    if not text.strip().isdecimal() or int(text) < 1:
        example = OPTIONS[option][1]
        raise ConfigError(f"{option}: got {text!r}, expected whole numbers from 1 on; for example {option} {example}")
    return int(text)
