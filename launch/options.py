"""The command line of `python -m launch`."""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from dist_train.config.values import unknown
from dist_train.errors import ConfigError

LAUNCHERS = ("torchrun", "accelerate", "deepspeed", "srun")
SLURM_OPTIONS = ("partition", "account", "qos", "time", "gpus-per-node", "cpus-per-task", "job-name")
HELP = """\
Starts a run of dist_train: prints what it is about to do, as a shell script, and does it.
What stands behind -- goes to dist_train: python -m launch --nproc 4 -- --train.epochs 5
"""


@dataclass(frozen=True)
class Options:
    """What the command line says. A None is left to the plan.

    Args:
        arguments: what dist_train gets: `--config FILE`, and the words behind `--`.
        nproc: processes of a node; None for one a GPU.
        nodes: how many machines.
        node_rank: which of them this is; None where it was not said.
        hosts: their names.
        hostfile: a file with their names and slots, as DeepSpeed and MPI read it.
        launcher: one of LAUNCHERS.
        port: where node 0 listens.
        max_restarts: how often torchrun starts all ranks again after one failed.
        interface: the network card between the nodes.
        files: folder for the files that are made.
        slurm: options of sbatch; None where the run is not submitted.
        dry_run: only print.
    """

    arguments: tuple[str, ...] = ()
    nproc: int | None = None
    nodes: int = 1
    node_rank: int | None = None
    hosts: tuple[str, ...] = ()
    hostfile: str | None = None
    launcher: str | None = None
    port: int | None = None
    max_restarts: int = 0
    interface: str | None = None
    files: str = "runs/launch"
    slurm: dict[str, str] | None = None
    dry_run: bool = False


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"command line: {message}; python -m launch --help lists the options")


def parse(argv: Sequence[str]) -> Options:
    """The options of a command line. Raises ConfigError; `--help` prints and raises SystemExit(0)."""
    argv = list(argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    argv, overrides = argv[:cut], argv[cut + 1 :]
    parser = _parser()
    given, unknown_words = parser.parse_known_args(argv)
    for word in unknown_words:
        _refuse(word, [option for action in parser._actions for option in action.option_strings])
    hosts = tuple(given.hosts.split(",")) if given.hosts is not None else ()
    for host in hosts:
        if not re.fullmatch(r"[\w.-]+", host):
            raise ConfigError(f"--hosts: got {host!r} in it, expected names with commas between; --hosts box1,box2")
    if len(set(hosts)) < len(hosts):
        raise ConfigError(f"--hosts: got {given.hosts}, expected each name once; --nproc says the processes of each")
    if hosts and given.nodes not in (None, str(len(hosts))):
        raise ConfigError(
            f"--nodes: got {given.nodes} with {len(hosts)} names in --hosts, expected {len(hosts)}; leave --nodes out"
        )
    nodes = len(hosts) or _integer("--nodes", given.nodes or "1", 1)
    if given.interface is not None and not re.fullmatch(r"[\w.:,-]+", given.interface):
        raise ConfigError(
            f"--interface: got {given.interface!r}, expected a network card; for example --interface eth0"
        )
    slurm = {key: getattr(given, f"slurm.{key}") for key in SLURM_OPTIONS}
    slurm = {key: value for key, value in slurm.items() if value is not None}
    node_rank = None if given.node_rank is None else _integer("--node-rank", given.node_rank, 0, nodes - 1)
    return Options(
        arguments=(*(("--config", given.config) if given.config is not None else ()), *overrides),
        nproc=None if given.nproc == "auto" else _integer("--nproc", given.nproc, 1, also="auto or "),
        nodes=nodes,
        node_rank=node_rank,
        hosts=hosts,
        hostfile=given.hostfile,
        launcher=given.launcher,
        port=None if given.port is None else _integer("--port", given.port, 1, 65535),
        max_restarts=_integer("--max-restarts", given.max_restarts, 0),
        interface=given.interface,
        files=given.files,
        slurm=slurm if given.slurm or slurm else None,
        dry_run=given.dry_run,
    )


def _parser() -> _Parser:
    parser = _Parser(
        prog="python -m launch",
        usage="%(prog)s [--config FILE.yaml] [options] [-- --section.key value ...]",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", metavar="FILE", help="the run's config")
    add("--nproc", metavar="N", default="auto", help="processes of a node (auto: one a GPU; without a GPU one)")
    add("--nodes", metavar="N", help="machines (1); above 1 the command of each is printed, to start there by hand")
    add("--node-rank", metavar="K", help="with --nodes: start node K, which this machine is")
    add("--hosts", metavar="A,B", help="the machines' names; the first is node 0")
    add("--hostfile", metavar="FILE", help="the machines as DeepSpeed and MPI read them: lines such as box1 slots=8")
    add("--launcher", choices=LAUNCHERS, help="what starts the processes (by the config's backend)")
    add("--port", metavar="P", help="port of node 0 (one machine: a free one; several: 29500)")
    add("--max-restarts", metavar="N", default="0", help="torchrun: starts of all ranks after one failed (0)")
    add("--interface", metavar="NAME", help="network card between the nodes, for NCCL and gloo")
    add("--files", metavar="DIR", default="runs/launch", help="folder for the files that are made (%(default)s)")
    add("--slurm", action="store_true", help="submit slurm/train.sbatch, or train_srun.sbatch with --launcher srun")
    for key in SLURM_OPTIONS:
        add(f"--slurm.{key}", metavar="V", dest=f"slurm.{key}", help=f"submit, with sbatch --{key}=V")
    add("--dry-run", action="store_true", help="only print")
    return parser


def _integer(option: str, text: str, least: int, most: int | None = None, also: str = "") -> int:
    value = int(text) if re.fullmatch(r"-?\d{1,9}", text) else None
    if value is None or value < least or (most is not None and value > most):
        bound = f"{also}a number of {least} or more" if most is None else f"a number from {least} to {most}"
        raise ConfigError(f"{option}: got {text!r}, expected {bound}; for example {option} {least}")
    return value


def _refuse(word: str, valid: list[str]) -> None:
    option = word.partition("=")[0]
    if option.startswith("--slurm."):
        raise ConfigError(unknown("--slurm", option.removeprefix("--slurm."), SLURM_OPTIONS, "option"))
    if option.startswith("--") and "." in option:
        raise ConfigError(
            f"command line: got {option} before --, expected there what is dist_train's own; "
            f"for example python -m launch --nproc 4 -- {option} VALUE"
        )
    raise ConfigError(unknown("command line", option, valid, "word"))
