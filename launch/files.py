"""The files that other tools want, made from the one config. DeepSpeed's JSON is none of them: its backend makes it
when the run starts."""

import re
from pathlib import Path

import yaml

from dist_train.errors import ConfigError


def accelerate_yaml(machines: int, processes: int, gpu: bool, hostfile: str | None = None) -> str:
    """What `accelerate launch --config_file` reads. Precision and accumulation stay neutral: the run's config has them.

    Args:
        machines: how many.
        processes: over all machines.
        gpu: on GPUs, else through MPI.
        hostfile: MPI's hosts.
    """
    kind = "MULTI_GPU" if gpu else "MULTI_CPU"
    tree = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": kind if processes > 1 else "NO",
        "mixed_precision": "no",
        "num_machines": machines,
        "num_processes": processes,
        "rdzv_backend": "static",
        "use_cpu": not gpu,
    }
    if hostfile is not None:
        tree["mpirun_config"] = {"mpirun_hostfile": hostfile}
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def hostfile(hosts: dict[str, int]) -> str:
    """Hosts and their slots, as DeepSpeed and MPI read them."""
    return "".join(f"{host} slots={slots}\n" for host, slots in hosts.items())


def read_hostfile(name: str) -> dict[str, int]:
    """Hosts and their slots. Raises ConfigError for a line that DeepSpeed would not read."""
    try:
        lines = Path(name).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(f"--hostfile: got {name!r}, expected a file that can be read: {error}") from None
    hosts: dict[str, int] = {}
    for line in lines:
        text = line.partition("#")[0].strip()
        match = re.fullmatch(r"(\S+)\s+slots=([1-9]\d*)", text)
        if text and (match is None or match[1] in hosts):
            raise ConfigError(
                f"--hostfile: got {line!r} in {name}, expected each host once, with its slots, such as box1 slots=8"
            )
        if match:
            hosts[match[1]] = int(match[2])
    if not hosts:
        raise ConfigError(f"--hostfile: got no host in {name}, expected lines such as box1 slots=8")
    return hosts
