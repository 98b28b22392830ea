"""What a config must satisfy beyond its types: runs the rules that each room owns. Pure: reads the config, the launcher
and the file system, changes nothing, and runs before torch is imported and before any process group starts."""

import os
from collections.abc import Iterator
from typing import Any

from dist_train.backends import rules as backends
from dist_train.checkpoint import rules as checkpoint
from dist_train.config.lookup import accepts
from dist_train.config.paths import typed
from dist_train.config.tree import Config, run_folder
from dist_train.data import rules as data
from dist_train.errors import ConfigError
from dist_train.loop import rules as loop
from dist_train.models import rules as models
from dist_train.ranks.launcher import Launcher
from dist_train.run import HOOKS
from dist_train.run.lock import holder, how_to_end
from dist_train.tasks import rules as tasks
from dist_train.track import rules as track
from dist_train.track.status import status_of

ROOMS = (loop, data, models, tasks, backends, checkpoint, track)


def check(config: Config, launcher: Launcher, writes: bool = True) -> None:
    """Raises ConfigError with a line for every mistake.

    Args:
        config: what to check.
        launcher: who started the process.
        writes: the run's folder will be written.
    """
    lines: list[str] = []
    rules = [*(room.problems for room in ROOMS), _hooks]
    for rule in [*rules, _folder] if writes else rules:
        try:
            lines += rule(config, launcher)
        except ConfigError as error:
            lines += error.lines
    if lines:
        raise ConfigError(*lines)


def hook_of(entry: Any) -> tuple[str, dict[str, Any]] | None:
    """The path and the arguments of an entry of train.hooks; None where it is none."""
    if isinstance(entry, str):
        return entry, {}
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        return None
    return entry["name"], {key: value for key, value in entry.items() if key != "name"}


def _hooks(config: Config, _: Launcher) -> Iterator[str]:
    for entry in config.train.hooks:
        found = hook_of(entry)
        if found is None or (":" not in found[0] and found[0] not in HOOKS):
            yield (
                f"train.hooks: got {entry!r}, expected {', '.join(HOOKS)} or module:Class, or "
                f"{{name: module:Class, ...}} with arguments; for example --train.hooks '[my_module:MyHook]'"
            )
            continue
        name, args = found
        takes = accepts(HOOKS, name, "train.hooks")
        for key in args.keys() - takes.keys() if "**" not in takes else ():
            yield f"train.hooks: got {key} of {name}, expected one of its arguments: {', '.join(takes) or 'none'}"
        for key in [key for key, required in takes.items() if required and key not in args]:
            yield f"train.hooks: got no {key} of {name}, which needs it; write {{name: {name}, {key}: VALUE}}"


def _folder(config: Config, _: Launcher) -> Iterator[str]:
    name = config.run.name
    if name is not None and (name in ("", ".", "..") or "/" in name or not typed(name).isprintable()):
        yield f"run.name: got {name!r}, expected a plain folder name; give the way to it as --run.dir"
        return
    if config.run.dir is not None and (not config.run.dir or "\0" in config.run.dir):
        yield f"run.dir: got {config.run.dir!r}, expected a folder; for example --run.dir runs/new"
        return
    folder = run_folder(config)
    if folder is None:
        return
    path = "run.name" if config.run.name is not None else "run.dir"
    try:
        there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    except OSError as error:  # too long, or behind a folder that cannot be entered
        yield f"{path}: got a folder that cannot be made ({error}), expected one such as --run.dir runs/new"
        return
    if not there.is_dir():
        yield f"{path}: got {folder}, but {there} is a file; expected a folder, for example --run.dir runs/new"
    elif not os.access(there, os.W_OK):
        yield f"{path}: got {folder}, but {there} cannot be written to; expected a folder of your own"
    writer = holder(folder)
    if writer is not None:
        yield (
            f"{path}: got {folder}, in which another run writes ({writer}), expected a folder of its own; for example "
            f"--run.dir {folder}-2{how_to_end(writer)}"
        )
    if status_of(folder) == "finished":
        another = f"--{path} {folder.name if path == 'run.name' else folder}-2"
        yield f"{path}: got {folder}, which holds a finished run; expected a new folder, for example {another}"
