"""Who started a process, told from the environments that the starters really make."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_train.errors import ConfigError
from dist_train.ranks.launcher import Launcher, clean_argv, detect, first_host

from checkpoint_runs import DDP
from zygote import Zygote

# Each as the starter sets it: of the variables that are not about places only those that tell starters apart.
TORCHRUN = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "GROUP_RANK": "1",
    "ROLE_RANK": "5",
    "ROLE_NAME": "default",
    "WORLD_SIZE": "8",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_WORLD_SIZE": "2",
    "ROLE_WORLD_SIZE": "8",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "42253",
    "TORCHELASTIC_RUN_ID": "d20c39ed",
    "TORCHELASTIC_RESTART_COUNT": "0",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "OMP_NUM_THREADS": "1",
}
ACCELERATE_ALONE = {"ACCELERATE_USE_CPU": "True", "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "no"}
DEEPSPEED = {
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "CROSS_RANK": "1",
    "CROSS_SIZE": "2",
    "LOCAL_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
    "CUDA_VISIBLE_DEVICES": "0,1",
}
OPENMPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "3",
    "OMPI_COMM_WORLD_NODE_RANK": "3",
    "OMPI_UNIVERSE_SIZE": "4",
    "PMIX_RANK": "3",
}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}  # MPICH and Intel MPI
SBATCH = {  # the batch script itself, before any srun
    "SLURM_JOB_ID": "4242",
    "SLURM_JOB_NODELIST": "gpu[03-05]",
    "SLURM_JOB_NUM_NODES": "3",
    "SLURM_NTASKS": "7",
    "SLURM_TASKS_PER_NODE": "3(x2),1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}
SRUN = SBATCH | {
    "SLURM_STEP_ID": "1",
    "SLURM_STEP_NODELIST": "gpu[03-05]",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_TASKS_PER_NODE": "3(x2),1",
    "SLURM_PROCID": "6",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
}
SRUN_PORT = 20000 + (4242 * 31 + 1) % 12000
OWN_PORT = 20000 + os.getppid() % 12000

ENVIRONMENTS = [
    ("alone", {}, Launcher("none", 0, 1, 0, 1)),
    ("a bare sbatch script is no rank", SBATCH, Launcher("none", 0, 1, 0, 1)),
    ("torchrun", TORCHRUN, Launcher("torchrun", 5, 8, 1, 4, "node1", 42253)),
    ("torchrun in a batch script", SBATCH | TORCHRUN, Launcher("torchrun", 5, 8, 1, 4, "node1", 42253)),
    ("torchrun in srun", SRUN | TORCHRUN, Launcher("torchrun", 5, 8, 1, 4, "node1", 42253)),
    (
        "accelerate, which takes torchrun",
        TORCHRUN | ACCELERATE_ALONE,
        Launcher("accelerate", 5, 8, 1, 4, "node1", 42253),
    ),
    ("accelerate, one process", ACCELERATE_ALONE, Launcher("accelerate", 0, 1, 0, 1)),
    (
        "accelerate, which takes mpirun",
        OPENMPI | ACCELERATE_ALONE | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
        Launcher("accelerate", 3, 4, 3, 4, "127.0.0.1", 29500),
    ),
    ("deepspeed", DEEPSPEED, Launcher("deepspeed", 3, 4, 1, 2, "10.0.0.1", 29500)),
    (
        "by hand, as cluster operators do",
        {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "job-0", "MASTER_PORT": "23456"},
        Launcher("env", 1, 2, 1, 2, "job-0", 23456),
    ),
    ("mpirun", OPENMPI, Launcher("mpirun", 3, 4, 3, 4, "127.0.0.1", OWN_PORT)),
    ("mpirun, whose daemons srun started", SRUN | OPENMPI, Launcher("mpirun", 3, 4, 3, 4, "127.0.0.1", OWN_PORT)),
    (
        "mpirun on two nodes",
        OPENMPI
        | {
            "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
            "OMPI_COMM_WORLD_LOCAL_RANK": "1",
            "MASTER_ADDR": "n1",
            "MASTER_PORT": "1",
        },
        Launcher("mpirun", 3, 4, 1, 2, "n1", 1),
    ),
    ("mpiexec", HYDRA, Launcher("mpiexec", 1, 2, 1, 2, "127.0.0.1", OWN_PORT)),
    ("srun", SRUN, Launcher("srun", 6, 7, 0, 1, "gpu03", SRUN_PORT)),
    ("srun with PMI", SRUN | {"PMI_RANK": "6", "PMI_SIZE": "7"}, Launcher("srun", 6, 7, 0, 1, "gpu03", SRUN_PORT)),
    (
        "a step smaller than its job",
        SRUN
        | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_PROCID": "0", "SLURM_NODEID": "0"},
        Launcher("srun", 0, 1, 0, 1, "gpu03", SRUN_PORT),
    ),
    (
        "srun, the port given",
        SRUN | {"MASTER_PORT": "29500"},
        Launcher("srun", 6, 7, 0, 1, "gpu03", 29500),
    ),
    (
        "srun, the address given",
        SRUN | {"MASTER_ADDR": "10.1.1.1"},
        Launcher("srun", 6, 7, 0, 1, "10.1.1.1", SRUN_PORT),
    ),
]


@pytest.mark.parametrize(("env", "launcher"), [row[1:] for row in ENVIRONMENTS], ids=[row[0] for row in ENVIRONMENTS])
def test_the_starter_is_told_from_the_environment(env: dict[str, str], launcher: Launcher):
    assert detect(env) == launcher


@given(st.lists(st.integers(1, 5), min_size=1, max_size=8))
def test_srun_ranks_fill_the_nodes_in_order(tasks: list[int]):
    """SLURM writes runs of equal counts as N(xTIMES)."""
    runs: list[list[int]] = []
    for count in tasks:
        if runs and runs[-1][0] == count:
            runs[-1][1] += 1
        else:
            runs.append([count, 1])
    text = ",".join(f"{count}(x{times})" if times > 1 else str(count) for count, times in runs)
    rank = 0
    for node, count in enumerate(tasks):
        for local_rank in range(count):
            step = {"SLURM_STEP_NUM_TASKS": str(sum(tasks)), "SLURM_STEP_TASKS_PER_NODE": text}
            place = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(local_rank), "SLURM_NODEID": str(node)}
            got = detect(SRUN | step | place)
            assert (got.rank, got.world_size, got.local_rank, got.local_world_size) == (
                rank,
                sum(tasks),
                local_rank,
                count,
            )
            rank += 1


def test_all_ranks_of_a_step_agree_on_the_port_and_two_steps_do_not():
    ports = {detect(SRUN | {"SLURM_PROCID": str(rank)}).master_port for rank in range(7)}
    assert len(ports) == 1
    assert detect(SRUN | {"SLURM_STEP_ID": "2"}).master_port not in ports
    assert detect(SRUN | {"SLURM_JOB_ID": "4243"}).master_port not in ports


@given(st.integers(0, 2**40), st.integers(0, 10_000))
def test_a_derived_port_is_outside_the_range_of_outgoing_connections(job: int, step: int):
    port = detect(SRUN | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}).master_port
    assert 1024 <= port < 32768


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[03-05,9],login1", "gpu03"),
        ("gpu[7,9-11]", "gpu7"),
        ("login1,gpu[03-05]", "login1"),
        ("rack[1-2]node[3-4]", "rack1node3"),
        ("gpu[03-05]-ib,x", "gpu03-ib"),
        ("gpu-a-1.site.org", "gpu-a-1.site.org"),
    ],
)
def test_the_first_host_of_a_node_list(nodelist: str, host: str):
    assert first_host(nodelist) == host


CONTRADICTIONS = [
    (TORCHRUN | {"RANK": "8"}, ["RANK=8, WORLD_SIZE=8", "expected 0 <= rank < world size", "torchrun"]),
    (TORCHRUN | {"RANK": "-1"}, ["RANK=-1"]),
    (TORCHRUN | {"LOCAL_RANK": "4"}, ["LOCAL_RANK=4, 4 on this node", "local rank < local size"]),
    (TORCHRUN | {"LOCAL_WORLD_SIZE": "9"}, ["9 on this node"]),
    (TORCHRUN | {"WORLD_SIZE": "many"}, ["WORLD_SIZE='many'", "expected an integer", "unset it"]),
    (TORCHRUN | {"MASTER_PORT": ""}, ["MASTER_PORT=''", "expected an integer"]),
    ({"RANK": "0"}, ["RANK=0 without WORLD_SIZE", "expected both or neither", "unset RANK"]),
    ({"WORLD_SIZE": "4"}, ["WORLD_SIZE=4 without RANK", "expected both or neither", "unset WORLD_SIZE"]),
    ({"RANK": "0", "WORLD_SIZE": "2"}, ["RANK=0 without MASTER_ADDR and MASTER_PORT", "start with torchrun"]),
    ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, ["RANK=0 without MASTER_PORT,"]),
    (
        OPENMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
        ["4 ranks on several nodes under mpirun without MASTER_ADDR and MASTER_PORT", "mpirun -x MASTER_ADDR="],
    ),
    (SRUN | {"SLURM_STEP_NUM_TASKS": "3"}, ["SLURM_PROCID=6, SLURM_STEP_NUM_TASKS=3"]),
    (SRUN | {"SLURM_PTY_PORT": "40001"}, ["SLURM_STEP_NUM_TASKS=7 and SLURM_PTY_PORT", "srun --overlap --ntasks=7"]),
    (SRUN | {"SLURM_PTY_WIN_COL": "80"}, ["SLURM_PTY_WIN_COL in one process", "env -u SLURM_STEP_NUM_TASKS python"]),
    (SRUN | {"SLURM_NODEID": "3"}, ["SLURM_STEP_TASKS_PER_NODE='3(x2),1' and SLURM_NODEID=3", "for every node"]),
    (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "3(x"}, ["SLURM_STEP_TASKS_PER_NODE='3(x'", "such as 2(x3),1"]),
    (SRUN | {"SLURM_STEP_TASKS_PER_NODE": ""}, ["SLURM_STEP_TASKS_PER_NODE=''"]),
]


@pytest.mark.parametrize(("env", "words"), CONTRADICTIONS, ids=[row[1][0] for row in CONTRADICTIONS])
def test_contradicting_variables_give_one_line(env: dict[str, str], words: list[str]):
    with pytest.raises(ConfigError) as caught:
        detect(env)
    (line,) = caught.value.lines
    assert line.startswith("environment: got ") and [word for word in words if word not in line] == [], line


def test_a_word_of_the_deepspeed_launcher_is_taken_out():
    argv = ["--local_rank=3", "eval", "--run.dir", "--local_rank=x"]
    assert clean_argv(argv, detect(DEEPSPEED)) == argv[1:]
    assert clean_argv(argv, detect(TORCHRUN)) == argv


def test_a_task_of_srun_pty_itself_is_a_rank(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("dist_train.ranks.launcher._parent_name", lambda: "slurmstepd\n")
    assert detect(SRUN | {"SLURM_PTY_PORT": "40001"}).rank == 6


def test_who_waits_for_ranks_says_for_whom_and_ends_with_a_line(zygote: Zygote, tmp_path: Path):
    run = DDP.run(tmp_path, plant={0: ("speaks_soon",), 1: ("leaves",)})
    ended = zygote.run(run)[0]
    assert ended.codes == [1, 0] and "Traceback" not in ended.err[0], ended
    assert re.search(r"\[rank 0\] has waited 0 s for (other ranks|rank 1) at 127.0.0.1:\d+\n", ended.err[0]), ended
    assert re.search(r"\ndist_train: rank 0 waited \d s in vain for rank 1 at 127.0.0.1:\d+; expected 2", ended.err[0])
    alone = zygote.run(DDP.run(tmp_path, plant={0: ("leaves",), 1: ("speaks_soon",)}))[0]
    assert alone.codes == [0, 1] and "[rank 1] has waited 0 s for rank 0 at 127.0.0.1:" in alone.err[1], alone
    assert "dist_train: rank 1 waited" in alone.err[1] and "Traceback" not in alone.err[1]


def test_a_port_that_is_taken_is_a_line(zygote: Zygote, tmp_path: Path):
    run = DDP.run(tmp_path, plant={0: ("takes_port",), 1: ("speaks_soon",)})
    ended = zygote.run(run)[0]
    assert ended.codes == [2, 1], ended
    assert re.fullmatch(r"dist_train: environment: got MASTER_PORT=\d+, at which another program .*\n", ended.err[0]), (
        ended
    )
    assert "Traceback" not in ended.err[1] and "dist_train: rank 1 waited" in ended.err[1]


# To a file of its own: mpirun may mix the lines of its ranks.
PLACE = """
import dataclasses, json, pathlib, sys
from dist_train.ranks.launcher import detect
place = detect()
pathlib.Path(sys.argv[1], str(place.rank)).write_text(json.dumps(dataclasses.asdict(place)))
"""


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="mpirun is not installed")
def test_a_real_mpirun(tmp_path: Path):
    env = os.environ | {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
    }
    command = ["mpirun", "-n", "3", sys.executable, "-c", PLACE, str(tmp_path)]
    subprocess.run(command, env=env, capture_output=True, timeout=60, check=True)
    places = [json.loads(file.read_text()) for file in sorted(tmp_path.iterdir())]
    assert [(p["rank"], p["world_size"], p["local_rank"], p["local_world_size"]) for p in places] == [
        (rank, 3, rank, 3) for rank in range(3)
    ]
    assert len({(p["name"], p["master_addr"], p["master_port"]) for p in places}) == 1
    assert places[0]["name"] in ("mpirun", "mpiexec")
