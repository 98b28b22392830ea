"""From config and options to what will be run. Pure: the same facts give the same plan."""

import hashlib
import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path

from dist_train.config.tree import Config
from dist_train.errors import ConfigError
from launch import files
from launch.machine import Machine
from launch.options import Options

PORT = 29500  # of several machines, which must all know it
SLURM_FOLDERS = (Path("slurm"), Path(__file__).parent.parent / "slurm")


@dataclass(frozen=True)
class Command:
    """A command, and the variables that it gets beside the environment's own. `where` names the machine to start it on,
    if it is not this one."""

    argv: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)
    where: str | None = None

    def shell(self) -> str:
        """As a line of a shell script."""
        return " ".join(
            [*(f"{key}={shlex.quote(value)}" for key, value in self.env.items()), *map(shlex.quote, self.argv)]
        )


@dataclass(frozen=True)
class _Run:
    """What the makers of a command go by: the processes of each machine by its name, the variables that all of them
    get, and whether they compute on GPUs."""

    options: Options
    hosts: dict[str, int]
    machine: Machine
    env: dict[str, str]
    gpu: bool

    @property
    def first(self) -> str:
        """The name of node 0."""
        return next(iter(self.hosts))


@dataclass(frozen=True)
class Plan:
    """What is done: files are written, then the one command is run. Several commands are for as many machines, and only
    printed.

    Args:
        commands: one, or one for each machine.
        files: text by path.
        notes: for people.
        listens_on: the port that must be free on this machine.
    """

    commands: tuple[Command, ...]
    files: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    listens_on: int | None = None

    def script(self) -> str:
        """The plan as a shell script that does the same."""
        lines = [f"# {note if note.isprintable() else repr(note)}" for note in self.notes]
        folders = dict.fromkeys(str(Path(path).parent) for path in self.files)
        lines += [f"mkdir -p -- {shlex.quote(folder)}" for folder in folders]
        lines += [f"printf %s {shlex.quote(text)} > {shlex.quote(path)}" for path, text in self.files.items()]
        for command in self.commands:
            lines += [f"# on {command.where}:"] if command.where else []
            lines.append(command.shell())
        return "\n".join(lines) + "\n"


def build(options: Options, config: Config, machine: Machine) -> Plan:
    """The plan. Raises ConfigError for options that do not go together."""
    launcher = _launcher(options, config, machine)
    _check(options, launcher)
    if options.slurm is not None:
        return _sbatch(options, config, launcher, machine)
    hosts, about = _hosts(options, config, launcher, machine)
    processes = sum(hosts.values())
    if config.backend.name == "single" and processes > 1:
        raise ConfigError(
            f"backend.name: got single with {processes} processes, expected a backend that joins them; write "
            f"--nproc 1, or -- --backend.name ddp"
        )
    env = _interface(options)
    if launcher == "srun":
        plan = _srun(options, machine)
    else:
        threads, said = _threads(max(hosts.values()), machine)
        env, about = env | threads, [*about, said]
        if launcher == "none":
            plan = Plan((Command((machine.python, "-m", "dist_train", *options.arguments)),))
        else:
            make = {"torchrun": _torchrun, "accelerate": _accelerate, "deepspeed": _deepspeed}[launcher]
            plan = make(_Run(options, hosts, machine, env, _on_gpu(config, machine) and options.hostfile is None))
    commands = tuple(replace(command, env=env | command.env) for command in plan.commands)
    return replace(plan, commands=_here(commands, options), notes=(*about, *plan.notes))


def _launcher(options: Options, config: Config, machine: Machine) -> str:
    """A name of LAUNCHERS; "none" for one process of its own."""
    if options.launcher is not None:
        return options.launcher
    backend = config.backend.name
    if options.slurm is not None:
        return "torchrun"
    if backend == "deepspeed" and options.hostfile is not None:
        return "deepspeed"
    if backend == "accelerate" and (options.hostfile is not None or _on_gpu(config, machine)):
        return "accelerate"
    alone = options.nodes == 1 and (options.nproc or _auto(config, machine)[0]) == 1 and not options.max_restarts
    return "none" if alone and backend in ("auto", "single") else "torchrun"


def _check(options: Options, launcher: str) -> None:
    """Options that say nothing where they stand are refused, not ignored."""
    slurm = options.slurm is not None
    unfit = [
        ("--hostfile", options.hostfile, launcher not in ("deepspeed", "accelerate"), "deepspeed or accelerate"),
        ("--max-restarts", options.max_restarts, launcher != "torchrun" or slurm, "torchrun"),
        ("--node-rank", options.node_rank is not None, launcher in ("srun", "deepspeed") or slurm, "torchrun"),
        ("--hosts", options.hosts, launcher == "srun" or slurm, "torchrun, accelerate or deepspeed"),
        ("--port", options.port, launcher in ("srun", "none") or slurm, "torchrun, accelerate or deepspeed"),
    ]
    for option, given, does_not_fit, by in unfit:
        if given and does_not_fit:
            how = "--slurm" if slurm else f"--launcher {launcher}" if launcher != "none" else "one process"
            raise ConfigError(f"{option}: got it with {how}, expected it with --launcher {by} alone; leave it out")
    if slurm and launcher not in ("torchrun", "srun"):
        raise ConfigError(
            f"--launcher: got {launcher} with --slurm, expected torchrun or srun, under which every backend runs; "
            f"leave --launcher out"
        )
    if options.hostfile is not None and (options.hosts or options.nodes > 1 or options.nproc is not None):
        raise ConfigError(
            "--hostfile: got it with --hosts, --nodes or --nproc, expected it alone: it names the hosts and their slots"
        )
    if options.node_rank is not None and options.nodes == 1:
        raise ConfigError("--node-rank: got it on one machine, expected several; add --nodes 2 or --hosts box1,box2")
    if options.node_rank and not options.hosts:
        raise ConfigError(
            "--node-rank: got a machine that is not the first, without the first one's name; add --hosts box1,box2"
        )
    if launcher == "deepspeed" and options.nodes > 1 and not options.hosts:
        raise ConfigError("--nodes: got several for deepspeed without their names; write --hosts box1,box2")


def _on_gpu(config: Config, machine: Machine) -> bool:
    return machine.gpus > 0 and config.train.device != "cpu"


def _auto(config: Config, machine: Machine) -> tuple[int, str]:
    """The processes of a node where nothing was said, and why."""
    if config.backend.name == "single":
        return 1, "1 process: backend.name is single"
    if config.train.device == "cpu":
        return 1, "1 process: train.device is cpu; --nproc 4 starts 4"
    if machine.gpus == 0:
        return 1, "1 process: no GPU was found; --nproc 4 starts 4"
    return machine.gpus, f"{machine.gpus} processes: one a GPU"


def _hosts(options: Options, config: Config, launcher: str, machine: Machine) -> tuple[dict[str, int], list[str]]:
    """The processes of each machine, by its name, and what is said about them."""
    if options.hostfile is not None:
        hosts = files.read_hostfile(options.hostfile)
        return hosts, [f"{sum(hosts.values())} processes: the slots of {options.hostfile}"]
    nproc, said = options.nproc, None
    if nproc is None and launcher == "srun":
        raise ConfigError("--nproc: got auto with --launcher srun, expected the tasks of a node; for example --nproc 4")
    if nproc is None:
        nproc, said = _auto(config, machine)
        said += f"; the same on all {options.nodes} machines" if options.nodes > 1 else ""
    if options.nodes == 1:
        return {options.hosts[0] if options.hosts else "localhost": nproc}, [said] if said else []
    names = options.hosts or (machine.name, *(f"node {rank}" for rank in range(1, options.nodes)))
    return dict.fromkeys(names, nproc), [said] if said else []


def _threads(ranks: int, machine: Machine) -> tuple[dict[str, str], str]:
    if machine.threads is not None:
        return {}, f"OMP_NUM_THREADS={machine.threads}: as the environment has it"
    threads = max(1, machine.cores // ranks)
    return {"OMP_NUM_THREADS": str(threads)}, f"OMP_NUM_THREADS={threads}: cores {machine.cores}, processes {ranks}"


def _interface(options: Options) -> dict[str, str]:
    names = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
    return dict.fromkeys(names, options.interface) if options.interface is not None else {}


def _torchrun(run: _Run) -> Plan:
    options = run.options
    start = (run.machine.python, "-m", "torch.distributed.run")
    sizes = (f"--nproc-per-node={run.hosts[run.first]}", f"--max-restarts={options.max_restarts}")
    train = ("-m", "dist_train", *options.arguments)
    if options.nodes == 1:
        if options.port is None:
            return Plan((Command((*start, "--standalone", *sizes, *train)),))  # c10d, on a port that torchrun finds
        meet = _meeting("localhost", options.port)
        return Plan((Command((*start, "--nnodes=1", *sizes, *meet, *train)),), listens_on=options.port)
    port = options.port or PORT
    meet = _meeting(run.first, port)
    commands = tuple(
        # Said, not guessed: torchrun compares the name with the machine's own, which may be written otherwise.
        Command(
            (*start, f"--nnodes={options.nodes}", *sizes, *meet, f"--rdzv-conf=is_host={int(rank == 0)}", *train),
            where=host,
        )
        for rank, host in enumerate(run.hosts)
    )
    return Plan(commands, listens_on=port if options.node_rank == 0 else None)


def _meeting(host: str, port: int) -> tuple[str, ...]:
    return ("--rdzv-backend=c10d", f"--rdzv-endpoint={host}:{port}", f"--rdzv-id=dist_train-{port}")


def _accelerate(run: _Run) -> Plan:
    options, machines, processes = run.options, len(run.hosts), sum(run.hosts.values())
    if not run.gpu and machines > 1:
        raise ConfigError(
            f"--launcher: got accelerate for {machines} machines without GPUs, whose MPI does not pass its settings "
            f"on, expected torchrun; write --launcher torchrun"
        )
    hosts, made = _hostfile(run) if not run.gpu and processes > 1 else (None, {})
    path, config = _file(options, "accelerate", ".yaml", files.accelerate_yaml(machines, processes, run.gpu, hosts))
    made = made | config
    start = (run.machine.python, "-m", "accelerate.commands.launch", "--config_file", path)
    train = ("-m", "dist_train", *options.arguments)
    if machines == 1:
        port = f"--main_process_port={options.port or run.machine.free_port}"
        return Plan((Command((*start, port, *train)),), made, listens_on=options.port)
    meet = (f"--main_process_ip={run.first}", f"--main_process_port={options.port or PORT}")
    commands = tuple(
        Command((*start, f"--machine_rank={rank}", *meet, *train), where=host) for rank, host in enumerate(run.hosts)
    )
    about = ("on each machine: the file, then its command",) if options.node_rank is None else ()
    return Plan(commands, made, about, listens_on=(options.port or PORT) if options.node_rank == 0 else None)


def _deepspeed(run: _Run) -> Plan:
    options, ranks = run.options, run.hosts[run.first]
    start = (run.machine.python, "-m", "deepspeed.launcher.runner")
    train = ("--module", "dist_train", *options.arguments)
    if len(run.hosts) == 1:
        port = f"--master_port={options.port or run.machine.free_port}"
        if run.gpu:
            # --num_gpus would have it forget CUDA_VISIBLE_DEVICES.
            visible = run.machine.visible_gpus
            which = f"--include=localhost:{_first(visible, ranks)}" if visible else f"--num_gpus={ranks}"
            return Plan((Command((*start, which, port, *train)),), listens_on=options.port)
        # It counts no processes without GPUs; a file tells it. Without --no_ssh it would try ssh to this machine.
        path, made = _hostfile(run)
        alone = ("--no_ssh", "--node_rank=0", "--master_addr=127.0.0.1")
        return Plan((Command((*start, f"--hostfile={path}", *alone, port, *train)),), made, listens_on=options.port)
    for word in options.arguments:
        if word.startswith("-") and shlex.quote(word) != word or "'" in word:
            raise ConfigError(
                f"command line: got {word!r}, which DeepSpeed's ssh would not pass on whole, expected a plain word, or "
                f"the value in a config file"
            )
    path, made = _hostfile(run)
    meet = (f"--master_addr={run.first}", f"--master_port={options.port or PORT}")
    # What its ssh does not pass on otherwise.
    text = "".join(f"{key}={value}\n" for key, value in run.env.items())
    env_path, env_file = _file(options, "deepspeed", ".env", text)
    variables = {"DS_ENV_FILE": str(Path(env_path).absolute())} if text else {}
    command = Command((*start, f"--hostfile={path}", *meet, *train), variables)
    return Plan((command,), made | (env_file if text else {}), ("DeepSpeed reaches the machines by pdsh and ssh",))


def _first(visible: str, count: int) -> str:
    return ",".join(visible.split(",")[:count])


def _hostfile(run: _Run) -> tuple[str, dict[str, str]]:
    if run.options.hostfile is not None:
        return run.options.hostfile, {}
    return _file(run.options, "hostfile", "", files.hostfile(run.hosts))


def _file(options: Options, stem: str, suffix: str, text: str) -> tuple[str, dict[str, str]]:
    """A path that other contents do not have, so a plan does not disturb another that runs."""
    mark = hashlib.sha256(text.encode()).hexdigest()[:8]
    path = str(Path(options.files) / f"{stem}-{mark}{suffix}")
    return path, {path: text}


def _srun(options: Options, machine: Machine) -> Plan:
    tasks = (f"--nodes={options.nodes}", f"--ntasks-per-node={options.nproc}", "--kill-on-bad-exit=1")
    return Plan((Command(("srun", *tasks, machine.python, "-u", "-m", "dist_train", *options.arguments)),))


def _sbatch(options: Options, config: Config, launcher: str, machine: Machine) -> Plan:
    """The batch scripts do the rest: they run on the nodes, where the GPUs are."""
    name = "train.sbatch" if launcher == "torchrun" else "train_srun.sbatch"
    folder = next((path for path in SLURM_FOLDERS if (path / name).exists()), None)
    if folder is None:
        raise ConfigError(f"--slurm: got no slurm/{name} here, expected the repository; start from its root")
    nproc, notes = options.nproc, ()
    if launcher == "srun" and nproc is None:
        gpus = (options.slurm or {}).get("gpus-per-node", "").rpartition(":")[2]
        if not gpus.isdigit():
            raise ConfigError("--nproc: got auto with srun, expected the tasks of a node; add --slurm.gpus-per-node 8")
        nproc = int(gpus)
    if nproc is None:
        notes = ("a process a GPU of the node; without a GPU one",)
    tasks = 1 if launcher == "torchrun" else nproc
    wanted = (f"--nodes={options.nodes}", f"--ntasks-per-node={tasks}")
    wanted += tuple(f"--{key}={value}" for key, value in (options.slurm or {}).items())
    env = {"DIST_TRAIN_SLURM": str(folder.absolute()), "PYTHON": machine.python}
    if launcher == "torchrun" and nproc is not None:
        env["NPROC"] = str(nproc)
    if options.interface is not None:
        env["INTERFACE"] = options.interface
    argv = ("sbatch", *wanted, str(folder.absolute() / name), *options.arguments)
    if (folder / "site.env").exists():
        argv = ("bash", "-c", '. "$0" && exec "$@"', str(folder.absolute() / "site.env"), *argv)
        notes += ("slurm/site.env has the site's settings",)
    return Plan((Command(argv, env),), notes=notes)


def _here(commands: tuple[Command, ...], options: Options) -> tuple[Command, ...]:
    """The command of the machine that --node-rank says this is; without it that of every machine."""
    return commands if options.node_rank is None else (replace(commands[options.node_rank], where=None),)
