"""What `python -m launch` makes of a config and of flags, and that the script it prints does what it says."""

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from dist_train.config.load import load
from dist_train.errors import ConfigError
from launch.machine import Machine, gpus_here, look, visible_gpus
from launch.options import parse
from launch.plan import Plan, build

ROOT = Path(__file__).parents[2]
PLANS = Path(__file__).parent / "plans"
LAPTOP = Machine("laptop", 8, 0, None, None, 40001, "/venv/bin/python")
BOX = Machine("box1", 64, 8, None, None, 40001, "/venv/bin/python")


def plan(argv: str | list[str], machine: Machine) -> Plan:
    options = parse(shlex.split(argv) if isinstance(argv, str) else argv)
    return build(options, load(list(options.arguments)), machine)


# The name of a file in plans/, which holds the whole script.
GOLDEN = {
    "laptop": ("", LAPTOP),
    "laptop_4": ("--nproc 4 --max-restarts 2 -- --train.epochs 5", LAPTOP),
    "box_8": ("--config configs/ddp.yaml", BOX),
    "box_port": ("--nproc 2 --port 12345 --interface eth0", replace(BOX, threads="3")),
    "box_single": ("--config configs/single.yaml", BOX),
    "ddp_in_one_process": ("--config configs/ddp.yaml", LAPTOP),
    "two_boxes": ("--config configs/fsdp2.yaml --hosts box1,box2 --interface eth0,eth1", BOX),
    "two_boxes_second": ("--config configs/fsdp2.yaml --hosts box1,box2 --port 1234 --node-rank 1", BOX),
    "two_boxes_unnamed": ("--nodes 2 --nproc 1", LAPTOP),
    "accelerate_gpu": ("--config configs/accelerate.yaml", BOX),
    "accelerate_cpu": ("--launcher accelerate --nproc 2", LAPTOP),
    "accelerate_cpu_by_torchrun": ("--config configs/accelerate.yaml --nproc 2", LAPTOP),
    "accelerate_two_boxes": ("--launcher accelerate --hosts box1,box2", BOX),
    "deepspeed_by_torchrun": ("--config configs/deepspeed_zero2.yaml", BOX),
    "deepspeed_gpu": ("--launcher deepspeed --nproc 2", replace(BOX, visible_gpus="4,5,6", gpus=3)),
    "deepspeed_cpu": ("--launcher deepspeed --nproc 2", LAPTOP),
    "deepspeed_two_boxes": ("--launcher deepspeed --hosts box1,box2 --interface ib0", BOX),
    "srun": ("--launcher srun --nodes 2 --nproc 4", LAPTOP),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_the_whole_plan(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    argv, machine = GOLDEN[name]
    script = plan(argv, machine).script().replace(str(ROOT), "/root")
    assert script == (PLANS / f"{name}.sh").read_text()


def test_no_golden_plan_is_left_over():
    assert {path.stem for path in PLANS.iterdir()} == GOLDEN.keys()


SBATCH = f"sbatch --nodes=2 --ntasks-per-node=%s %s{ROOT}/slurm/%s --config configs/ddp.yaml\n"


@pytest.mark.parametrize(
    ("argv", "variables", "sbatch"),
    [
        ("--slurm", "", (1, "", "train.sbatch")),
        ("--slurm.time 1:00 --nproc 4", " NPROC=4", (1, "--time=1:00 ", "train.sbatch")),
        ("--slurm --launcher srun --nproc 4 --interface ib0", " INTERFACE=ib0", (4, "", "train_srun.sbatch")),
        ("--launcher srun --slurm.gpus-per-node a:8", "", (8, "--gpus-per-node=a:8 ", "train_srun.sbatch")),
    ],
)
def test_what_is_submitted(argv: str, variables: str, sbatch: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    script = plan(f"{argv} --nodes 2 --config configs/ddp.yaml", LAPTOP).script()
    expected = f"DIST_TRAIN_SLURM={ROOT}/slurm PYTHON=/venv/bin/python{variables} {SBATCH % sbatch}"
    assert script.splitlines(keepends=True)[-1] == expected


def test_the_sites_settings_are_read_before_submitting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm/train.sbatch").write_text("")
    (tmp_path / "slurm/site.env").write_text("export SBATCH_PARTITION='big gpus'\n")
    (tmp_path / "sbatch").write_text('#!/bin/sh\nprintf "%s\\n" "$SBATCH_PARTITION" "$@"\n')
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    script = plan(["--slurm", "--", "--run.name", "it's"], LAPTOP).script()
    said = subprocess.run(["bash"], input=script, capture_output=True, text=True, check=True).stdout.splitlines()
    assert said[0] == "big gpus" and said[-3:] == [f"{tmp_path}/slurm/train.sbatch", "--run.name", "it's"]


def test_the_readmes_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Those of the table are accepted, and name files that are there."""
    section = (ROOT / "README.md").read_text().partition("## Launching")[2].partition("\n## ")[0]
    rows = [shlex.split(row.split("|")[2].strip(" `")) for row in section.splitlines() if row.startswith("| ")][1:]
    (tmp_path / "hostfile").write_text("box1 slots=8\nbox2 slots=8\n")
    monkeypatch.chdir(tmp_path)
    for folder in ("configs", "slurm"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    for words in rows:
        if words[0] == "sbatch":
            script = next(i for i, word in enumerate(words) if word.startswith("slurm/"))
            assert Path(words[script]).exists() and load(words[script + 1 :])
        else:
            assert words[:3] == ["python", "-m", "launch"] and plan(words[3:], BOX).commands
    assert len(rows) == 8


REFUSED = [
    ("--nproc 0", "--nproc: got '0', expected auto or a number of 1 or more"),
    ("--nproc many", "--nproc: got 'many'"),
    ("--nodes 2 --node-rank 2", "--node-rank: got '2', expected a number from 0 to 1"),
    ("--node-rank 0", "--node-rank: got it on one machine"),
    ("--nodes 2 --node-rank 1", "without the first one's name; add --hosts"),
    ("--hosts a,b --nodes 3", "--nodes: got 3 with 2 names in --hosts, expected 2"),
    ("--hosts a,a", "--hosts: got a,a, expected each name once"),
    ("--hosts a,", "--hosts: got ''"),
    ("--hosts 'a;b'", "--hosts: got 'a;b'"),
    ("--interface 'a b'", "--interface: got 'a b'"),
    ("--port 70000", "--port: got '70000', expected a number from 1 to 65535"),
    ("--max-restarts 1 --launcher accelerate", "--max-restarts: got it with --launcher accelerate"),
    ("--hostfile h --launcher torchrun", "--hostfile: got it with --launcher torchrun"),
    ("--hostfile h --launcher deepspeed", "--hostfile: got 'h', expected a file that can be read"),
    ("--hostfile h --launcher deepspeed --nproc 2", "--hostfile: got it with --hosts, --nodes or --nproc"),
    ("--launcher deepspeed --nodes 2", "--nodes: got several for deepspeed without their names"),
    ('--launcher deepspeed --hosts a,b -- --run.name "it\'s"', "which DeepSpeed's ssh would not pass on whole"),
    ("--launcher accelerate --hosts a,b", "--launcher: got accelerate for 2 machines without GPUs"),
    ("--launcher srun", "--nproc: got auto with --launcher srun"),
    ("--launcher srun --slurm", "--nproc: got auto with srun"),
    ("--slurm --launcher deepspeed", "--launcher: got deepspeed with --slurm"),
    ("--slurm --hosts a,b", "--hosts: got it with --slurm"),
    ("--slurm.tme 1:00", "--slurm: got unknown option 'tme', expected one of partition, account"),
    ("--nprocs 2", "did you mean --nproc?"),
    ("--launcher mpi", "command line: argument --launcher: invalid choice: 'mpi'"),
    ("--train.epochs 3", "got --train.epochs before --"),
    ("-- --train.epoch 3", "did you mean epochs?"),
    ("--config none.yaml", "--config: got 'none.yaml', expected a YAML file that can be read"),
    ("--nproc 2 -- --backend.name single", "backend.name: got single with 2 processes"),
]


@pytest.mark.parametrize(("argv", "said"), REFUSED, ids=[row[0] for row in REFUSED])
def test_bad_flags_give_one_line(argv: str, said: str):
    with pytest.raises(ConfigError) as caught:
        plan(argv, LAPTOP)
    (line,) = caught.value.lines
    assert said in line


@pytest.mark.parametrize("text", ["box1\n", "box1 slots=0\n", "a slots=1\na slots=2\n", "# none\n"])
def test_a_hostfile_that_deepspeed_would_misread(text: str, tmp_path: Path):
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(ConfigError, match="--hostfile: got .*slots="):
        plan(["--hostfile", str(tmp_path / "hosts"), "--launcher", "deepspeed"], LAPTOP)


HOSTILE = 'it\'s "a" $(touch owned) `touch owned`; \\ *\nné 模 \udcff --'
SAY = """\
#!{python}
import json, os, sys
here = os.environb[b"SAID"]
with open(here, "a") as file:
    print(json.dumps([sys.argv, os.environ.get("OMP_NUM_THREADS")]), file=file)
"""


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate", "deepspeed"])
def test_hostile_names_pass_through_a_real_shell(launcher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The interpreter's path, the config's, the files' and the values all have every character that means something."""
    folder = tmp_path / HOSTILE
    folder.mkdir()
    python = folder / "python"
    python.write_text(SAY.format(python=sys.executable))
    python.chmod(0o755)
    (folder / "c.yaml").write_text("train: {epochs: 1}\n")
    argv = ["--nproc", "2", "--launcher", launcher, "--files", str(folder / "made"), "--config", str(folder / "c.yaml")]
    made = plan([*argv, "--", "--run.name", HOSTILE], replace(LAPTOP, python=str(python)))
    script = made.script().encode(errors="surrogateescape")
    said = tmp_path / "said"
    subprocess.run(["bash", "-eu"], input=script, cwd=tmp_path, env=os.environ | {"SAID": str(said)}, check=True)
    assert json.loads(said.read_text()) == [list(made.commands[0].argv), "4"]
    assert made.commands[0].argv[-2:] == ("--run.name", HOSTILE)
    for path, text in made.files.items():
        assert Path(path).read_text(encoding="utf-8") == text
    assert len(made.files) == {"torchrun": 0, "accelerate": 2, "deepspeed": 1}[launcher]
    assert not list(tmp_path.rglob("owned"))


def test_gpus_are_counted_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    devices = tmp_path / "dev"
    devices.mkdir()
    for name in ("nvidia0", "nvidia1", "nvidia10", "nvidiactl", "nvidia-uvm"):
        (devices / name).touch()
    assert gpus_here(devices) == 3
    smi = tmp_path / "nvidia-smi"
    smi.write_text(
        "#!/bin/sh\nprintf 'GPU 0: NVIDIA X (UUID: GPU-1)\\n  MIG 1g Device 0: (UUID: MIG-1)\\nGPU 1: Y\\n'\n"
    )
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert gpus_here(tmp_path / "none") == 2
    smi.write_text("#!/bin/sh\necho 'GPU 0: no driver'\nexit 9\n")
    assert gpus_here(tmp_path / "none") == 0


@pytest.mark.parametrize(
    ("visible", "there", "count"),
    [(None, 8, 8), ("", 8, 0), ("0,3", 8, 2), ("7,8,1", 8, 1), ("-1", 8, 0), ("MIG-a,MIG-b", 1, 2), ("0,1", 0, 0)],
)
def test_what_cuda_visible_devices_leaves(visible: str | None, there: int, count: int):
    assert visible_gpus(visible, there) == count


def launch(*argv: str, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "launch", *argv]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=60, check=False)


def test_it_answers_at_once(tmp_path: Path):
    times_s = []
    for _ in range(3):
        start = time.perf_counter()
        done = launch("--dry-run", "--nproc", "4", cwd=tmp_path)
        times_s.append(time.perf_counter() - start)
        assert done.returncode == 0 and done.stdout.endswith("--max-restarts=0 -m dist_train\n") and not done.stderr
    assert min(times_s) < 0.3 and not list(tmp_path.iterdir())


def test_mistakes_end_with_code_2(tmp_path: Path):
    done = launch("--nproc", "0", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("launch: --nproc: got '0'") and not done.stdout
    with socket.socket() as sock:
        sock.bind(("", 0))
        sock.listen()
        port = str(sock.getsockname()[1])
        done = launch("--hosts", "a,b", "--node-rank", "0", "--port", port, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith(f"launch: --port: got {port}, which another program uses")


def test_a_free_port_is_found():
    port = look({}).free_port
    with socket.socket() as sock:
        sock.bind(("", port))
        assert look({}).free_port != port


STOPS = """\
import signal, sys, time
got = []
for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
    signal.signal(getattr(signal, name), lambda number, _: got.append(signal.Signals(number).name))
print("ready", flush=True)
while not got:
    time.sleep(0.01)
time.sleep(0.2)
print(*got, flush=True)
sys.exit(75)
"""
RUN = """\
import sys
from launch.plan import Command, Plan
from launch.run import run
sys.exit(run(Plan((Command(tuple(sys.argv[1:])),))))
"""


@pytest.mark.parametrize(
    ("sent", "got"), [(signal.SIGINT, "SIGINT"), (signal.SIGTERM, "SIGTERM"), (signal.SIGUSR1, "SIGTERM")]
)
def test_a_signal_is_passed_on_once_and_the_end_waited_for(sent: signal.Signals, got: str):
    command = [sys.executable, "-c", RUN, sys.executable, "-c", STOPS]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, sent)  # the whole group, as a terminal does
    assert process.communicate(timeout=20)[0] == f"{got}\n" and process.returncode == 75


@pytest.mark.parametrize(
    ("code", "ends"), [("sys.exit(3)", 3), ("os.kill(os.getpid(), 9)", 137)], ids=["its own", "killed"]
)
def test_the_exit_code_is_the_runs_own(code: str, ends: int):
    command = [sys.executable, "-c", RUN, sys.executable, "-c", f"import os, sys; {code}"]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == ends


def test_what_is_not_installed_is_named():
    done = subprocess.run([sys.executable, "-c", RUN, "no-srun"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (
        done.returncode == 127 and done.stderr == "launch: no-srun: No such file or directory; is it installed here?\n"
    )


# In place of training: who a rank is.
WHO = """\
import json, os, pathlib, sys
from importlib.util import find_spec
names = ("RANK", "WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMP_NUM_THREADS", "ACCELERATE_USE_CPU")
place = {name: os.environ[name] for name in names if name in os.environ}
pathlib.Path(sys.argv[-1], f"{place.get('RANK') or place['OMPI_COMM_WORLD_RANK']}.json").write_text(json.dumps(place))
"""


def start_printed(lines: str, folder: Path) -> list[subprocess.Popen]:
    """A process for each command that `launch` printed, with a module in place of dist_train."""
    (folder / "dist_train.py").write_text(WHO)
    (folder / "out").mkdir()
    env = os.environ | {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    env |= {"OMPI_MCA_rmaps_base_oversubscribe": "1", "OMP_NUM_THREADS": "1"}
    return [subprocess.Popen(["bash", "-euc", text], cwd=folder, env=env) for text in lines]


@pytest.fixture
def free_port() -> int:
    return look({}).free_port


def printed(tmp_path: Path, *argv: str) -> str:
    """What `launch` prints, where it sees the real dist_train."""
    done = launch(*argv, "--dry-run", "--", "--run.dir", "out", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def places(folder: Path) -> dict[str, dict[str, str]]:
    return {path.stem: json.loads(path.read_text()) for path in (folder / "out").iterdir()}


def test_the_commands_of_two_machines_meet(tmp_path: Path, free_port: int):
    script = printed(tmp_path, "--hosts", "localhost,other", "--nproc", "1", "--port", str(free_port))
    comments, commands = [], []
    for line in script.splitlines():
        (comments if line.startswith("#") else commands).append(line)
    assert comments[-2:] == ["# on localhost:", "# on other:"]
    assert [process.wait(60) for process in start_printed(commands, tmp_path)] == [0, 0]
    assert {rank: place["WORLD_SIZE"] for rank, place in places(tmp_path).items()} == {"0": "2", "1": "2"}


@pytest.mark.full
def test_deepspeed_reads_the_hostfile(tmp_path: Path):
    (tmp_path / "host file").write_text("localhost slots=2\n")
    config = ["--config", "configs/deepspeed_zero1.yaml"]
    script = printed(tmp_path, "--hostfile", str(tmp_path / "host file"), *config)
    assert [process.wait(60) for process in start_printed([script], tmp_path)] == [0]
    assert {rank: place["WORLD_SIZE"] for rank, place in places(tmp_path).items()} == {"0": "2", "1": "2"}


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs MPI: Debian's openmpi-bin")
def test_accelerate_reads_its_yaml_and_mpi_its_hosts(tmp_path: Path):
    script = printed(tmp_path, "--launcher", "accelerate", "--nproc", "2")
    assert [process.wait(60) for process in start_printed([script], tmp_path)] == [0]
    assert {rank: place["OMPI_COMM_WORLD_SIZE"] for rank, place in places(tmp_path).items()} == {"0": "2", "1": "2"}
    assert {place["ACCELERATE_USE_CPU"] for place in places(tmp_path).values()} == {"True"}


@pytest.mark.parametrize("name", ["accelerate_gpu", "accelerate_two_boxes"])
def test_accelerate_takes_its_yaml_for_gpus(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its own reading of file and options, where there are no GPUs to start on."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    monkeypatch.chdir(ROOT)
    argv, machine = GOLDEN[name]
    made = plan([*shlex.split(argv), "--files", str(tmp_path)], machine)
    (path,) = made.files
    Path(path).write_text(made.files[path])
    for rank, command in enumerate(made.commands):
        read, _, _ = _validate_launch_command(launch_command_parser().parse_args(command.argv[3:]))
        nodes = len(made.commands)
        assert (read.multi_gpu, read.num_processes, read.num_machines) == (True, 8 * nodes, nodes)
        assert (read.use_cpu, read.mixed_precision, read.dynamo_backend, read.gpu_ids) == (False, "no", "no", "all")
        assert read.training_script == "dist_train" and read.module
        if nodes == 2:
            assert (read.machine_rank, read.main_process_ip, read.main_process_port) == (rank, "box1", 29500)


def test_a_real_run(tmp_path: Path):
    (tmp_path / "c.yaml").write_text("train: {max_steps: 3, eval_every_epochs: null}\n")
    done = launch("--config", "c.yaml", "--nproc", "1", "--", "--run.dir", "a run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "a run/summary.json").read_text())["steps"] == 3
    assert done.stderr.startswith("# OMP_NUM_THREADS=") and " -m dist_train --config c.yaml " in done.stderr
    assert "results in a run" in done.stdout
