"""python -m dist_train doctor [--config FILE.yaml] [--json] [--only SECTION,...] [--max-mb 64]

Checks what a run needs before it starts, alone or under any launcher. Each line passes, warns or fails, with the
command that mends it. Exit code 0 if none failed, 1 if one did, 2 for a mistake on the command line. Other options are
the config's own: what this run needs is what is checked. Nothing stays on the disk, and nothing is downloaded.
"""

import contextlib
import dataclasses
import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from dist_train.config.load import dump, load
from dist_train.config.tree import Config
from dist_train.config.values import unknown
from dist_train.doctor import fit, machine, meeting, pair, versions
from dist_train.doctor.apart import Apart
from dist_train.doctor.join import GROUP_S, join
from dist_train.doctor.report import Line, Report, attempt, ranks, reason, worst
from dist_train.doctor.subject import Subject
from dist_train.errors import ConfigError
from dist_train.ranks import ending
from dist_train.ranks.launcher import Launcher, detect
from dist_train.tools.options import split

if TYPE_CHECKING:
    from dist_train.doctor.peers import Peers
    from dist_train.ranks.dist import World

SECTIONS = ("versions", "machine", "launcher", "network", "disk", "data", "config")
# Default, and an example.
OPTIONS = {"--only": (",".join(SECTIONS), "versions,disk"), "--max-mb": ("64", "4")}
DISK_S = 60.0
PROG = "python -m dist_train doctor"


def run(argv: list[str], launcher: Launcher) -> int:
    """Prints the report. Collective."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # before torch is imported: it tells of every try to connect
    options, rest = split([word for word in argv if word != "--json"], OPTIONS, "doctor")
    sections = tuple(options["--only"].split(","))
    for name in sections:
        if name not in SECTIONS:
            raise ConfigError(unknown("--only", name, SECTIONS, "section"))
    if not options["--max-mb"].isdecimal():
        raise ConfigError(f"--max-mb: got {options['--max-mb']!r}, expected a whole number; for example --max-mb 64")
    config, refused = _load(rest)
    report = Report(launcher.rank, as_json="--json" in argv)
    subject = Subject(config, refused, launcher, sections, int(options["--max-mb"]) << 20, report)
    aside = contextlib.redirect_stdout(sys.stderr) if report.as_json else contextlib.nullcontext()
    with aside, _estimator(subject) as needs:  # first of all, as it forks a process without threads, in no group
        (_alone if launcher.name == "none" else _with_others)(subject, needs)
    return ending.FAILED if worst(report.lines) == "fail" else ending.OK


def _load(argv: list[str]) -> tuple[Config, tuple[str, ...]]:
    """The config, or what the options alone say with why its file cannot be read."""
    words, options = iter(argv), []
    for word in words:
        if word == "--config":
            next(words, "")
        elif not word.startswith("--config="):
            options.append(word)
    without_files = load(options, PROG)
    try:
        return load(argv, PROG), ()
    except ConfigError as error:
        return without_files, error.lines


@contextlib.contextmanager
def _estimator(subject: Subject) -> Iterator[Apart | None]:
    """What rank 0 asks what the run needs; None where nobody asks."""
    if subject.refused or subject.launcher.rank or not {"disk", "config"} & set(subject.sections):
        yield None
        return
    found = Apart(_needs, subject.config, subject.launcher)
    try:
        yield found
    finally:
        found.close()


def _needs(config: Config, launcher: Launcher) -> Any:
    import torch

    from dist_train.doctor.traced import of_run

    torch.set_num_threads(1)  # the other ranks have work as well
    return of_run(config, launcher)


def _alone(subject: Subject, needs: Apart | None) -> None:
    def measured(peers: "Peers") -> None:
        for _ in _link(subject, peers):
            pass

    with contextlib.ExitStack() as stack:
        second = None
        if "network" in subject.sections:
            second = stack.enter_context(pair.second_process(measured))  # first of all: it is forked
        _host(subject)
        if second is not None:
            own = ("own name", meeting.own_name), ("port", meeting.loopback_port)
            subject.look("network", *own, ("link", _two, subject, second))
    _run(subject, None, None, needs)
    subject.report.close()


def _two(subject: Subject, second: Any) -> Iterator[Line]:
    """The link that two ranks on this host would have."""
    where = "of two processes of this host"
    try:
        with subject.limit("network", "rendezvous", 3 * GROUP_S, where), pair.as_first(second) as peers:
            yield Line("pass", "rendezvous", "two processes of this host joined through gloo, and were timed:")
            yield from _link(subject, peers)
    except (RuntimeError, OSError) as error:
        mend = "export GLOO_SOCKET_IFNAME=lo"
        yield Line("fail", "rendezvous", f"{where} through gloo: {reason(error)}", mend)


def _with_others(subject: Subject, needs: Apart | None) -> None:
    report, launcher = subject.report, subject.launcher
    report.hold = True  # until the others' lines can be had
    _host(subject)
    stack = contextlib.ExitStack()
    found = join(subject, stack)
    report.hold = False
    if found is None:
        report.show()
        _run(subject, None, None, needs)
        report.close()
        subject.speak()
        return
    from dist_train.doctor.peers import agreement, table

    world, peers = found
    report.joined(peers.size, peers.gather)
    report.add("network", attempt("ranks", table, peers, launcher))
    report.add("network", attempt("same on all", agreement, peers, _facts(subject)))
    if "network" in subject.sections and peers.size > 1:
        with subject.limit("network", "link", 3 * GROUP_S):
            report.add("network", attempt("link", _link, subject, peers))
    report.show()
    _run(subject, world, peers, needs)
    report.close()
    if not report.lost:
        with contextlib.suppress(RuntimeError):  # another rank is gone; what is known is shown
            stack.close()


def _host(subject: Subject) -> None:
    config, launcher = subject.config, subject.launcher
    subject.look("versions", ("versions", versions.check, config, launcher))
    subject.look("machine", ("machine", machine.check, config, launcher))
    subject.look("launcher", ("launcher", _seen))


def _seen() -> Iterator[Line]:
    found = detect()  # raises what contradicts itself
    facts = dataclasses.asdict(found)
    if found.name == "none":
        yield Line("pass", "launcher", "none: this process was started alone", facts=facts)
        return
    what = f"{found.name}: {ranks(found.world_size)}, {found.local_world_size} here; rank 0 at"
    yield Line("pass", "launcher", f"{what} {found.master_addr} port {found.master_port}", facts=facts)


def _link(subject: Subject, peers: "Peers") -> Iterator[Line]:
    from dist_train.doctor import link

    yield from link.bandwidth(peers, subject.most_bytes)
    yield from link.clocks(peers)


def _facts(subject: Subject) -> dict[str, str]:
    """What must be the same on all ranks."""
    from dist_train import versions as used

    return (
        used.versions()
        | versions.installed()
        | {"config": hashlib.sha256(dump(subject.config).encode()).hexdigest()[:12]}
    )


def _run(subject: Subject, world: "World | None", peers: "Peers | None", estimator: Apart | None) -> None:
    """The sections about this run: its disk, its data, its config. Collective."""
    from dist_train.doctor import data as data_checks
    from dist_train.doctor import disk
    from dist_train.ranks import dist
    from dist_train.run import assemble

    config, launcher = subject.config, subject.launcher
    needs = data = None
    if not subject.refused:
        data = _or_error(assemble.read_data, config.data, False)
        device = _or_error(dist.resolve_device, config.train.device, launcher.local_rank)
        failed = next((found for found in (device, data) if isinstance(found, Exception)), None)
        needs = failed or (_or_error(estimator.result) if estimator else None)
    if peers is not None:  # rank 0 holds the largest share
        gathered = _or_error(peers.gather, needs)
        needs = needs if isinstance(needs, Exception) else gathered if isinstance(gathered, Exception) else gathered[0]
    speaks = launcher.local_rank == 0  # for the other ranks of its node
    state_bytes = getattr(needs, "state", None)
    checks = [("free space", disk.space, config, state_bytes), ("write", disk.speed, config)] if speaks else []
    if peers is not None and peers.size > 1:
        checks.append(("same folder", disk.shared, config, world, peers))
    with subject.limit("disk", "disk", DISK_S, "the disk may hang"):
        subject.look("disk", *checks, ("checkpoint", disk.checkpoint, config, peers))
    if subject.refused:
        subject.look("config", ("config", _refused, subject.refused))
        return
    subject.look("data", *([("data set", data_checks.check, config, data)] if speaks else []))
    memory = [("memory", fit.estimate, config, launcher, device, needs)] if needs is not None else []
    subject.look("config", ("config", fit.valid, config, launcher), *memory)


def _refused(lines: tuple[str, ...]) -> Iterator[Line]:
    for text in lines:
        yield Line("fail", "config", text)
    mend = f"{PROG} --only data,config   once the lines above are mended"
    yield Line("warn", "data, memory", "not checked, as the config cannot be read", mend)


def _or_error(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns, or the error that it raises."""
    try:
        return function(*arguments)
    except Exception as error:
        return error
