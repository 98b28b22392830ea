"""Steps of a run that were taken again (python -m dist_train replay): read from its folder, and held to their form."""

import base64
import binascii
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = "replay"
PNG = b"\x89PNG"


@dataclass(frozen=True)
class Sample:
    """One of a step.

    Args:
        index: in the training split.
        loss: the mean over its units; None where nobody can tell.
        what: its file, class, numbers or text; empty where it was left out.
        png: its picture; empty where it has none.
    """

    index: int
    loss: float | None
    what: str
    png: bytes


@dataclass(frozen=True)
class Replayed:
    """A step.

    Args:
        step: counts from 1.
        loss: of the step.
        grad_norm: before clipping; None where it was not measured.
        layers: the same by parameter.
        samples: the largest loss first.
        unknown: why samples have no loss; empty where they have.
        off: the largest relative difference from what the run recorded; None where it recorded nothing to compare.
        differs: by more than rounding.
    """

    step: int
    loss: float
    grad_norm: float | None
    layers: dict[str, float]
    samples: list[Sample]
    unknown: str
    off: float | None
    differs: bool


def read(folder: Path, problems: list[str]) -> list[Replayed]:
    """Those that lie in a run's folder, by step. What cannot be read is put into `problems`, a line each."""
    found: dict[int, Replayed] = {}
    for path in sorted((folder / FOLDER).glob("step-*.json")):
        try:
            for one in _read(json.loads(path.read_text(encoding="utf-8"))):
                found[one.step] = one
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, binascii.Error) as error:
            problems.append(f"{FOLDER}/{path.name} cannot be read: {error}")
    return [found[step] for step in sorted(found)]


def _read(tree: dict[str, Any]) -> list[Replayed]:
    off = [float(one["relative"]) for one in tree["compared"]]
    differs = any(bool(one["differs"]) for one in tree["compared"])
    return [
        Replayed(
            int(step["step"]),
            float(step["loss"]),
            None if step["grad_norm"] is None else float(step["grad_norm"]),
            {str(name): float(norm) for name, norm in step["layers"].items()},
            [_sample(one) for one in step["samples"]],
            str(step["unknown"]),
            max(off) if off else None,
            differs,
        )
        for step in tree["steps"]
    ]


def _sample(one: dict[str, Any]) -> Sample:
    png = base64.b64decode(one.get("png", ""), validate=True)
    if png and not png.startswith(PNG):
        raise ValueError("a picture that is no PNG")
    loss = None if one["loss"] is None else float(one["loss"])
    return Sample(int(one["index"]), loss, str(one.get("what", "")), png)
