"""python -m dist_train inspect DIR [--json]: what a checkpoint holds, or which checkpoints a run has.

Reads and checks every file; changes nothing. Exit code 1 if a checkpoint is damaged.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from dist_train.checkpoint import manifest
from dist_train.checkpoint.manifest import Damaged, Manifest
from dist_train.columns import columns
from dist_train.errors import ConfigError
from dist_train.ranks import ending
from dist_train.ranks.launcher import Launcher


def run(argv: list[str], launcher: Launcher) -> int:
    """Prints a table of a run's checkpoints, newest first, or the content of one."""
    as_json = "--json" in argv
    places = [word for word in argv if word != "--json"]
    if len(places) != 1 or places[0].startswith("-"):
        raise ConfigError(
            f"command line: got {' '.join(argv) or 'nothing'}, expected the folder of a checkpoint or of a run; write "
            f"inspect DIR, or inspect DIR --json"
        )
    place = Path(places[0])
    found, damaged = manifest.listed(place)
    if not found and not damaged:
        raise ConfigError(f"command line: got {place}, expected the folder of a checkpoint, or of a run that has some")
    whole = []
    for folder, what in found:
        try:
            manifest.verify(folder, what, what.files)
            whole.append((folder, what))
        except Damaged as error:
            damaged.append(error)
    if as_json:
        print(json.dumps([_tree(folder, what) for folder, what in whole]))
    elif whole and whole[0][0] == place:
        _print_one(*whole[0])
    else:
        _print_table(whole)
    for error in damaged:
        print(f"damaged: {error}")
    return ending.FAILED if damaged else ending.OK


def _tree(folder: Path, what: Manifest) -> dict[str, Any]:
    return {"folder": str(folder), "tensors": _tensors(folder), **dataclasses.asdict(what)}


def _tensors(folder: Path) -> dict[str, dict[str, Any]]:
    from dist_train.checkpoint import storage  # torch, which the table does not need

    return {
        name: {"shape": list(tensor.size), "dtype": str(tensor.properties.dtype).removeprefix("torch.")}
        for name, tensor in storage.tensors(folder).items()
    }


def _print_table(whole: list[tuple[Path, Manifest]]) -> None:
    rows = [("checkpoint", "step", "epoch", "written by", "ranks", "MB", "evaluation", "at")]
    for folder, what in whole:
        metrics = "  ".join(f"{name.removeprefix('eval/')} {value:.4f}" for name, value in what.evaluation.items())
        size = f"{what.bytes() / 1e6:,.1f}"
        row = (
            folder.name,
            what.step,
            _epochs(what),
            what.backend,
            what.world_size,
            size,
            metrics or "-",
            what.saved_at,
        )
        rows.append(tuple(map(str, row)))
    if whole:
        print(columns(rows))


def _epochs(what: Manifest) -> str:
    return f"{what.epoch} + {what.step_in_epoch} steps" if what.step_in_epoch else str(what.epoch)


def _print_one(folder: Path, what: Manifest) -> None:
    config, tensors = what.config, _tensors(folder)
    facts = {
        "step": what.step,
        "epochs": _epochs(what),
        "written by": f"{what.writer}, {what.saved_at}",
        "model": f"{config['model']['name']}, {sum(math.prod(t.shape) for t in what.model.values()):,} elements",
        "optimizer": config["optim"]["name"],
        "data": f"{config['data']['name']}, {what.data.train:,} samples to train on, {what.data.fingerprint[:12]}",
        "global batch size": what.global_batch_size,
        "seed": what.seed,
        "evaluation": ", ".join(f"{name} {value:.6g}" for name, value in what.evaluation.items())
        or "none at this step",
        "files": f"{len(what.files) + 1}, {what.bytes() / 1e6:,.1f} MB, whole",
        "versions": ", ".join(f"{name} {version}" for name, version in what.versions.items()),
    }
    for name, value in facts.items():
        print(f"{name:<18} {value}")
    print()
    width = max(len(name) for name in tensors)
    for name, tensor in sorted(tensors.items()):
        print(f"{name:<{width}}  {tensor['dtype']:<8} {tensor['shape']}")
