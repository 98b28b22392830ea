"""What the class or function that a section of the config names takes, held against what the section gives it."""

from collections.abc import Iterator
from typing import Any

from dist_train.config.lookup import accepts


def problems(
    registry: dict[str, str], name: str, section: str, values: dict[str, Any], given: set[str], by_us: tuple[str, ...]
) -> Iterator[str]:
    """Arguments that `name` does not take, and required ones that are not there."""
    takes = accepts(registry, name, f"{section}.name")
    missing = [k for k in by_us if k not in takes and "**" not in takes]
    if missing:
        own = ", ".join(takes) or "nothing"
        yield f"{section}.name: got {name!r} that takes {own}, expected it to take {' and '.join(missing)} as well"
    ours = [k for k in takes if k not in by_us and k != "**"]
    for path in sorted(given):
        key = path.rpartition(".")[2]
        if key in by_us:
            yield f"{path}: got {values[key]!r}, but it is set by the package; leave it out"
        elif key not in takes and "**" not in takes:
            own = ", ".join(ours) or "no arguments"
            yield f"{path}: got {values[key]!r}, but {name} does not have it; it takes {own}; leave it out"
    for key in ours:
        if takes[key] and key not in values:
            path = f"{section}.args.{key}"
            yield f"{path}: got nothing, expected a value: {name} needs it; write --{path} VALUE"
