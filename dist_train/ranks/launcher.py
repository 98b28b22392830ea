"""Who started this process, and which rank it is: read from the environment, before torch is imported."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from dist_train.errors import ConfigError

# The variables in which each starter tells a process its place. The first row that matches decides, so
# a starter that builds on another (accelerate on torchrun, srun around torchrun) stands before or after it.
# name: (the variables that show it, rank, world size, local rank, local world size)
_TORCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
STARTERS: dict[str, tuple[tuple[str, ...], tuple[str, str, str, str]]] = {
    "accelerate": (("ACCELERATE_MIXED_PRECISION",), _TORCH),
    "torchrun": (("TORCHELASTIC_RUN_ID",), _TORCH),
    "deepspeed": (("CROSS_RANK", "LOCAL_SIZE", "RANK"), ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    "env": (("RANK", "WORLD_SIZE"), _TORCH),
    "mpirun": (
        ("OMPI_COMM_WORLD_SIZE",),
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ),
    "mpiexec": (("PMI_SIZE", "MPI_LOCALRANKID"), ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")),
    # SLURM_STEP_NUM_TASKS exists only under srun: an sbatch script itself has SLURM_PROCID=0 but is no rank.
    "srun": (
        ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
        ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
    ),
}


@dataclass(frozen=True)
class Launcher:
    """The place of this process among those that were started together.

    Args:
        name: the starter: a key of STARTERS, or "none" for a process that was started alone.
        rank: 0 <= rank < world_size.
        world_size: the number of processes.
        local_rank: the rank among those of this node.
        local_world_size: the number of processes on this node.
        master_addr: where rank 0 listens.
        master_port: the port there.
    """

    name: str = "none"
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    master_addr: str = "127.0.0.1"
    master_port: int = 0


def detect(env: Mapping[str, str] = os.environ) -> Launcher:
    """The launcher that `env` tells of. Raises ConfigError where its variables contradict each other."""
    name = next((n for n, (shown_by, _) in STARTERS.items() if all(key in env for key in shown_by)), "none")
    if name == "none":
        for key, other in (("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")):
            if key in env:
                raise ConfigError(
                    f"environment: got {key}={env[key]} without {other}, expected both or neither; "
                    f"start with torchrun, or unset {key} to run one process"
                )
        return Launcher()
    keys = STARTERS[name][1]
    if name == "accelerate" and "RANK" not in env:
        # Its MPI way on CPU: the ranks are MPI's. Its one-process way: no rank at all.
        rows = [STARTERS[mpi] for mpi in ("mpirun", "mpiexec")]
        mpi = [row_keys for shown_by, row_keys in rows if all(key in env for key in shown_by)]
        if not mpi:
            _expect_one_process(env)
            return Launcher(name)
        keys = mpi[0]
    rank, size = _int(env, keys[0]), _int(env, keys[1])
    local_rank = _int(env, keys[2], default=rank)
    local_size = _local_size(env, name, keys[3], size)
    if name == "srun" and size > 1:
        _expect_a_task(env, size)
    if not (0 <= rank < size and 0 <= local_rank < local_size <= size):
        raise ConfigError(
            f"environment: got {keys[0]}={rank}, {keys[1]}={size}, {keys[2]}={local_rank}, "
            f"{local_size} on this node, expected 0 <= rank < world size and 0 <= local rank < local size; "
            f"start with torchrun, or unset the variables that another program left behind"
        )
    addr, port = _master(env, name, size, local_size)
    return Launcher(name, rank, size, local_rank, local_size, addr, port)


def _expect_a_task(env: Mapping[str, str], size: int) -> None:
    """Raises ConfigError in the shell of srun --pty: what is typed there inherits the variables of the first task."""
    shown = next((key for key in ("SLURM_PTY_PORT", "SLURM_PTY_WIN_COL") if key in env), None)
    if shown is None or _parent_name().startswith("slurmstepd"):  # srun --pty python is a task itself
        return
    raise ConfigError(
        f"environment: got SLURM_STEP_NUM_TASKS={size} and {shown} in one process, typed in a shell of srun --pty, "
        f"expected a task for every rank; write srun --overlap --ntasks={size} python -m dist_train ... for {size} "
        f"ranks, or env -u SLURM_STEP_NUM_TASKS python -m dist_train ... for one process"
    )


def _parent_name() -> str:
    try:
        with open(f"/proc/{os.getppid()}/comm", encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def _expect_one_process(env: Mapping[str, str]) -> None:
    """Raises ConfigError where accelerate launch was told of several processes: only then does it set the port."""
    if "MASTER_PORT" in env:
        raise ConfigError(
            "accelerate launch: got --num_processes above 1, but it started one process, as it does without GPUs; "
            "write accelerate launch --cpu --num_processes 2 --num_machines 1 --mpirun_hostfile FILE -m dist_train "
            "(FILE with a line such as `localhost slots=2`), or torchrun --nproc_per_node=2 -m dist_train "
            "--backend.name accelerate"
        )


def _int(env: Mapping[str, str], key: str, default: int | None = None) -> int:
    if key not in env and default is not None:
        return default
    try:
        return int(env[key])
    except (KeyError, ValueError):
        raise ConfigError(
            f"environment: got {key}={env.get(key)!r}, expected an integer; start with torchrun, or unset it"
        ) from None


def _local_size(env: Mapping[str, str], name: str, key: str, size: int) -> int:
    if name != "srun":
        return _int(env, key, default=size)
    # "2(x3),1" means 2, 2, 2, 1 tasks on the nodes of the step; ours is at SLURM_NODEID.
    text, node = env.get(key, str(size)), _int(env, "SLURM_NODEID", default=0)
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        counts += [int(match[1])] * int(match[2] or 1) if match else []
    if not 0 <= node < len(counts):
        raise ConfigError(
            f"environment: got {key}={text!r} and SLURM_NODEID={node}, expected tasks for every node such as 2(x3),1; "
            f"start with srun, or unset the variables that another job left behind"
        )
    return counts[node]


def _master(env: Mapping[str, str], name: str, size: int, local_size: int) -> tuple[str, int]:
    """Where rank 0 listens. The starters of torch's family say it; for srun and mpirun it is derived alike on all."""
    if "MASTER_PORT" in env:
        port = _int(env, "MASTER_PORT")
    elif name == "accelerate":
        raise ConfigError(
            f"accelerate launch: got {size} ranks of MPI with an accelerate launch each, expected one that "
            f"starts MPI; write accelerate launch --cpu --num_processes {size} --num_machines 1 "
            f"--mpirun_hostfile FILE -m dist_train"
        )
    else:
        # Below 32768, where the ports begin that Linux gives to outgoing connections.
        job = _int(env, "SLURM_JOB_ID", default=0) * 31 + _int(env, "SLURM_STEP_ID", default=0)
        # Every rank of one node has the same parent.
        port = 20000 + (job if name == "srun" else os.getppid()) % 12000
    if "MASTER_ADDR" in env:
        addr = env["MASTER_ADDR"]
    else:
        addr = first_host(env.get("SLURM_STEP_NODELIST", "")) if name == "srun" else ""
    missing = [key for key in ("MASTER_ADDR", "MASTER_PORT") if key not in env]
    if missing and "RANK" in env:
        raise ConfigError(
            f"environment: got RANK={env['RANK']} without {' and '.join(missing)}, expected both; start with torchrun, "
            f"or unset RANK and WORLD_SIZE to run one process"
        )
    if missing and size > local_size and name != "srun":
        raise ConfigError(
            f"environment: got {size} ranks on several nodes under {name} without {' and '.join(missing)}, "
            f"expected both; for example {name} -x MASTER_ADDR=$(hostname) -x MASTER_PORT=29500 ..."
        )
    return addr or "127.0.0.1", port


def first_host(nodelist: str) -> str:
    """The first host of a SLURM node list such as `gpu[03-05,9],login1` or `rack[1-2]node[3-4]`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodelist)[0]  # commas within brackets do not part the hosts
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first)


def clean_argv(argv: list[str], launcher: Launcher) -> list[str]:
    """`argv` without the --local_rank=N that the deepspeed launcher adds to every program's own arguments."""
    if launcher.name != "deepspeed":
        return argv
    return [a for a in argv if not re.fullmatch(r"--local[_-]rank=\d+", a)]
