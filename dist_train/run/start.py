"""From a config that was checked to ranks that have joined, each with the parts of the run."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from dist_train.backends import chosen, fit, mesh
from dist_train.checkpoint import resume
from dist_train.checkpoint.rules import resumes
from dist_train.checkpoint.save import Facts
from dist_train.config.tree import Config, run_folder
from dist_train.errors import ConfigError
from dist_train.loop import audit
from dist_train.ranks import dist
from dist_train.ranks.dist import World
from dist_train.ranks.launcher import Launcher
from dist_train.run import assemble, own_hooks
from dist_train.run.assemble import Parts
from dist_train.run.hooks import Hook
from dist_train.run.look import check_shares


class Joined(NamedTuple):
    """This rank's place, what the run is made of, what its checkpoints must fit, and its hooks by name."""

    world: World
    parts: Parts
    facts: Facts
    hooks: dict[str, Hook]


@contextmanager
def joined(config: Config, launcher: Launcher, own_loop: bool = False) -> Iterator[Joined]:
    """Builds the parts of a run, says what is wrong with them, and joins the ranks. The process keeps no number of
    threads of it. Raises ConfigError.

    Args:
        config: passed `check`.
        launcher: who started this process.
        own_loop: the user's loop has the loss, so that no task needs to.
    """
    device = dist.resolve_device(config.train.device, launcher.local_rank)
    threads = torch.get_num_threads()
    dist.set_threads(config.train.threads, launcher.local_world_size)
    try:
        parts = assemble.build(config, device, warm=not resumes(config), defers=True)
        if not (parts.task.evaluates or own_loop):
            raise ConfigError(
                f"task.name: got {config.task.name}, which has no loss, for a loop of your own in dist_train.session; "
                f"expected another, for example --task.name classification"
            )
        backend = chosen(config.backend.name, launcher.name)
        fit.check_model(backend, parts.findings, parts.model, config.backend.zero_stage)
        tensor = mesh.of(config, launcher.world_size).tensor
        fit.check_split(config, parts.model, parts.findings, tensor, parts.data.known().get("block"))
        fit.check_sparse(config, backend, device, parts.findings)
        audit.check(config, parts.findings, own_loop)
        check_shares(config, parts.findings, len(parts.data.train), launcher.world_size // tensor)
        hooks = own_hooks.build(config, parts)
        facts = resume.facts_of(parts.model, parts.data)
        resume.check_newest(config, run_folder(config), facts)
        with dist.joined(launcher, device, tensor=tensor) as world:
            yield Joined(world, parts, facts, hooks)
    finally:
        torch.set_num_threads(threads)
