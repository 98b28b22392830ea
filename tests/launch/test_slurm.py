"""The batch scripts on a real SLURM: real training where it ends well, a stand-in where it is stopped."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from slurm_lab import Slurm, needs_slurm
from zygote import Run, Zygote

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "slurm"
TRAIN, TRAIN_SRUN, SWEEP = (str(SCRIPTS / f"{name}.sbatch") for name in ("train", "train_srun", "sweep"))
# What a job gets: this checkout, this interpreter, and a short patience.
ENV = {
    "DIST_TRAIN_SLURM": str(SCRIPTS),
    "PYTHON": sys.executable,
    "OMP_NUM_THREADS": "1",
    "ASK_EVERY_S": "0.5",
}

# In place of dist_train, in the folder that a job starts in: keeps its side of the contract, without torch. It trains
# until it is asked to stop, at its second start it finishes. Options: --fail RANK, --deaf SECONDS, --dies START,
# --finish START.
STAND_IN = '''
import json, os, signal, sys, time
from pathlib import Path

argv = sys.argv[1:]
options = dict(zip(argv[::2], argv[1::2]))
rank = int(os.environ.get("RANK", os.environ["SLURM_PROCID"]))
world_size = int(os.environ.get("WORLD_SIZE", os.environ["SLURM_NTASKS"]))
start = os.environ.get("SLURM_RESTART_COUNT", "0")
folder = Path(options["--run.dir"])
folder.mkdir(parents=True, exist_ok=True)
(folder / f"argv-{start}-{rank}").write_text(json.dumps(argv))


def end(status, code):
    """Every rank has saved before rank 0 writes the status, and no rank ends before that."""
    (folder / f"saved-{start}-{rank}").touch()
    while len(list(folder.glob(f"saved-{start}-*"))) < world_size:
        time.sleep(0.01)
    if rank == 0:
        (folder / "summary.part").write_text(json.dumps({"status": status}, indent=2))
        (folder / "summary.part").replace(folder / "summary.json")
        (folder / f"written-{start}").touch()
    while not (folder / f"written-{start}").exists():
        time.sleep(0.01)
    os._exit(code)


if options.get("--fail") == str(rank):
    time.sleep(0.5)
    site = os.environ.get("WORD"), os.environ.get("GLOO_SOCKET_IFNAME")
    raise RuntimeError(f"planted on rank {rank} of {world_size}", *site)
if "--fail" in options:
    time.sleep(60)
if options.get("--dies") == start:
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    print("rank dies of a signal", flush=True)
    time.sleep(60)
time.sleep(float(options.get("--deaf", 0)))
asked = []
for name in ("SIGUSR1", "SIGTERM"):
    signal.signal(getattr(signal, name), lambda *_: asked.append(1))
print(f"rank {rank} of {world_size} trains", flush=True)
if start == options.get("--finish", "1"):
    end("finished", 0)
deadline = time.monotonic() + 40
while time.monotonic() < deadline and not asked:
    time.sleep(0.02)
end("preempted", 75) if asked else sys.exit("nobody asked")
'''


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where jobs start, with the stand-in."""
    (tmp_path / "dist_train.py").write_text(STAND_IN)
    return tmp_path


def wait_started(folder: Path, ranks: int) -> None:
    """Until every rank runs; it need not listen yet."""
    deadline = time.monotonic() + 60
    while len(list(folder.glob("argv-0-*"))) < ranks:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def status(folder: Path) -> str:
    return json.loads((folder / "summary.json").read_text())["status"]


def test_the_scripts_pass_shellcheck():
    files = [str(path) for path in sorted(SCRIPTS.glob("*.*")) if path.name != "site.env"]
    assert len(files) == 5
    shellcheck = Path(sys.executable).with_name("shellcheck")
    command = [str(shellcheck) if shellcheck.exists() else "shellcheck", "-x", "-P", str(SCRIPTS), *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_outside_of_a_job_they_say_so(tmp_path: Path):
    env = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    done = subprocess.run(["bash", TRAIN], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        2,
        "slurm: got no SLURM job, expected one; submit this script with sbatch\n",
    )
    done = subprocess.run(["bash", TRAIN], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "submit from the repository's root" in done.stderr


# Smooth: at a kink rounding would decide.
REAL = ["--train.max_steps", "12", "--train.eval_every_epochs", "null", "--track.every_steps", "1"]
REAL += ["--model.activation", "Tanh"]


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


@needs_slurm
@pytest.mark.full
def test_both_scripts_train_on_two_nodes_alike(slurm: Slurm, tmp_path: Path):
    env = ENV | {"PYTHONPATH": str(ROOT)}
    launch = [sys.executable, "-m", "launch", "--slurm", "--nodes", "2", "--nproc", "2"]
    done = slurm.client(*launch, "--", *REAL, "--run.dir", "runs/by torchrun", cwd=tmp_path, env=env)
    first = done.stdout.split()[-1]
    slurm.logs[first] = tmp_path
    slurm.wait(first, "COMPLETED")
    args = ["--nodes=2", "--ntasks-per-node=2", TRAIN_SRUN, *REAL, "--backend.name", "fsdp2"]
    second = slurm.submit(*args, cwd=tmp_path, env=env)
    slurm.wait(second, "COMPLETED")

    for job, runs, backend in ((first, "by torchrun", "ddp"), (second, f"dist_train-{second}", "fsdp2")):
        summary = json.loads((tmp_path / "runs" / runs / "summary.json").read_text())
        assert (summary["world_size"], summary["backend"], summary["threads"]) == (4, backend, 1)
        table = re.findall(r"^(?:\d: )?\[rank 0\] (\d) +(\S+) +(\d) ", slurm.log(job), re.M)
        assert sorted(table) == sorted([(str(2 * n + r), f"node{n + 1}", str(r)) for n in (0, 1) for r in (0, 1)])
    mine, theirs = losses(tmp_path / "runs/by torchrun"), losses(tmp_path / f"runs/dist_train-{second}")
    assert len(mine) == 12 and mine == pytest.approx(theirs, rel=1e-5)


@needs_slurm
def test_a_stop_saves_requeues_and_finishes(slurm: Slurm, folder: Path):
    """By srun: the ranks' own code, 75, tells. They are asked before they listen. Then the finished job is put back by
    hand, and does not train again."""
    words = ["--deaf", "0.5", "--a b", "it's \n$x"]
    job = slurm.submit("--nodes=2", "--ntasks-per-node=2", TRAIN_SRUN, *words, cwd=folder, env=ENV)
    run = folder / f"runs/dist_train-{job}"
    wait_started(run, 4)
    slurm.client("scancel", "--batch", "--signal=USR1", job)
    slurm.start_now(job)
    assert status(run) == "preempted"
    assert slurm.wait(job, "COMPLETED")["Restarts"] == "1"
    assert status(run) == "finished"
    own = ["--run.dir", f"runs/dist_train-{job}", "--run.name", "null"]
    assert {path.name: json.loads(path.read_text()) for path in run.glob("argv-*")} == {
        f"argv-{start}-{rank}": [*words, *own] for start in "01" for rank in range(4)
    }
    slurm.client("scontrol", "requeue", job)
    slurm.start_now(job)
    assert slurm.wait(job, "COMPLETED")["Restarts"] == "2"
    log = slurm.log(job)
    assert f"slurm: the run in runs/dist_train-{job} has finished before" in log and log.count("rank 3 of 4") == 2
    assert "got USR1, asking the ranks to save and stop" in log


@needs_slurm
def test_a_stop_during_the_start_reaches_the_ranks_of_torchrun(slurm: Slurm, folder: Path):
    """By torchrun, whose own code is 1: summary.json tells. The ranks do not listen yet when they are asked first."""
    env = ENV | {"NPROC": "2"}
    job = slurm.submit("--nodes=2", TRAIN, "--run.dir", "my run", "--deaf", "1", cwd=folder, env=env)
    wait_started(folder / "my run", 4)
    slurm.client("scancel", "--batch", "--signal=USR1", job)
    slurm.start_now(job)
    assert status(folder / "my run") == "preempted" and len(list((folder / "my run").glob("saved-0-*"))) == 4
    assert slurm.wait(job, "COMPLETED")["Restarts"] == "1" and status(folder / "my run") == "finished"


@needs_slurm
def test_a_stop_that_kills_what_does_not_listen_yet_is_no_failure(slurm: Slurm, folder: Path):
    job = slurm.submit(TRAIN_SRUN, "--dies", "0", cwd=folder, env=ENV)
    slurm.wait_log(job, "rank dies of a signal")
    slurm.client("scancel", "--batch", "--signal=USR1", job)
    slurm.start_now(job)
    assert slurm.wait(job, "COMPLETED")["Restarts"] == "1"
    assert "slurm: the ranks ended of the signal before they could save" in slurm.log(job)


@needs_slurm
def test_a_failing_rank_ends_the_job_with_its_error(slurm: Slurm, folder: Path):
    """Under torchrun, a process a GPU, in the repository of a site with settings. An earlier start's status does not
    send it back to the queue."""
    shutil.copytree(SCRIPTS, folder / "slurm")
    words = "CONTAINER=(env 'WORD=a  b')\nSRUN_ARGS=(--label)\n: ${INTERFACE:=eth0} ${RETRIES:=0}\n"
    (folder / "slurm/site.env").write_text(words)
    (folder / "old").mkdir()
    (folder / "old/summary.json").write_text(json.dumps({"status": "preempted"}, indent=2))
    env = {key: value for key, value in ENV.items() if key != "DIST_TRAIN_SLURM"}
    args = ["--nodes=2", "--gpus-per-node=2", TRAIN, "--run.dir", "old", "--fail", "1"]
    job = slurm.submit(*args, cwd=folder, env=env)
    fields = slurm.wait(job, "FAILED")
    assert fields["Restarts"] == "0" and fields["ExitCode"] != "0:0"
    assert "RuntimeError: ('planted on rank 1 of 4', 'a  b', 'eth0')" in slurm.log(job) and not slurm.processes()
    assert any(line.startswith(("0: ", "1: ")) for line in slurm.log(job).splitlines())  # srun --label


@needs_slurm
def test_a_failed_job_starts_again_as_often_as_was_asked(slurm: Slurm, folder: Path):
    args = ["--ntasks-per-node=2", TRAIN_SRUN, "--fail", "1"]
    job = slurm.submit(*args, cwd=folder, env=ENV | {"RETRIES": "1"})
    slurm.wait_log(job, "start 1 of at most 1 more")
    slurm.start_now(job)
    assert slurm.wait(job, "FAILED")["Restarts"] == "1"
    assert slurm.log(job).count("RuntimeError: ('planted on rank 1 of 2'") == 2


@needs_slurm
def test_scancel_ends_all_processes_for_good(slurm: Slurm, folder: Path):
    """The ranks save when SLURM ends them, as they would for a stop; a cancelled job stays cancelled all the same."""
    job = slurm.submit("--nodes=2", "--ntasks-per-node=2", TRAIN_SRUN, cwd=folder, env=ENV)
    slurm.wait_log(job, *(f"rank {rank} of 4 trains" for rank in range(4)))
    assert len([line for line in slurm.processes() if "-m dist_train" in line and "srun" not in line]) == 4
    slurm.client("scancel", job)
    assert slurm.wait(job, "CANCELLED")["Restarts"] == "0" and not slurm.processes()
    assert status(folder / f"runs/dist_train-{job}") == "preempted"


@needs_slurm
def test_a_sweep_gives_each_task_its_own_line_and_folder(slurm: Slurm, folder: Path):
    """And each stops and goes on without the others: the last one's job has the id of the whole array."""
    (folder / "lines.txt").write_text('--optim.lr 0.1\n--run.dir \'a $HOME; "b"\' --optim.lr="0.2"\n')
    lines = slurm.submit("--array=1-2", SWEEP, "lines.txt", "--finish", "0", cwd=folder, env=ENV)
    seeds = slurm.submit("--array=7-8", SWEEP, cwd=folder, env=ENV)
    for task in ("7", "8"):
        slurm.wait_log(f"{seeds}_{task}", "rank 0 of 1 trains")
    slurm.client("scancel", "--batch", "--signal=USR1", f"{seeds}_8")
    slurm.start_now(f"{seeds}_8")
    for task in (f"{lines}_1", f"{lines}_2", f"{seeds}_8"):
        slurm.wait(task, "COMPLETED")
    assert slurm.show(f"{seeds}_8")["Restarts"] == "1"
    assert (slurm.show(f"{seeds}_7")["Restarts"], slurm.show(f"{seeds}_7")["JobState"]) == ("0", "RUNNING")
    expected = {
        f"runs/sweep-{lines}_1": ["--finish", "0", "--optim.lr", "0.1"],
        'a $HOME; "b"': ["--finish", "0", "--run.dir", 'a $HOME; "b"', "--optim.lr=0.2"],
        f"runs/sweep-{seeds}_7": ["--train.seed", "7"],
    }
    for run, words in expected.items():
        argv = json.loads((folder / run / "argv-0-0").read_text())
        assert argv == [*words, "--run.dir", run, "--run.name", "null"]


@needs_slurm
def test_a_job_outlives_its_node(slurm: Slurm, folder: Path):
    job = slurm.submit("--nodes=2", "--ntasks-per-node=1", TRAIN_SRUN, cwd=folder, env=ENV)
    slurm.wait_log(job, "rank 0 of 2 trains", "rank 1 of 2 trains")
    slurm.cut_power("node2")
    assert not [line for line in slurm.processes() if "srun" not in line and "rank 1" in line]
    slurm.client("scontrol", "update", "NodeName=node2", "State=DOWN", "Reason=power")
    slurm.start_now(job)
    slurm.mend("node2")
    assert slurm.wait(job, "COMPLETED")["Restarts"] == "1"


@needs_slurm
@pytest.mark.full
@pytest.mark.parametrize("backend", ["accelerate", "deepspeed"])
def test_the_libraries_train_under_both_scripts(slurm: Slurm, backend: str, tmp_path: Path):
    env, of = ENV | {"PYTHONPATH": str(ROOT)}, []
    more = ["--backend.zero_stage", "2"] if backend == "deepspeed" else []
    for script, args in ((TRAIN, ["--nodes=2"]), (TRAIN_SRUN, ["--nodes=2", "--ntasks-per-node=2"])):
        run = tmp_path / Path(script).stem
        words = [*REAL, "--backend.name", backend, *more, "--run.dir", str(run)]
        job = slurm.submit(*args, script, *words, cwd=tmp_path, env=env | {"NPROC": "2"})
        slurm.wait(job, "COMPLETED")
        summary = json.loads((run / "summary.json").read_text())
        assert (summary["world_size"], summary["backend"]) == (4, backend)
        of.append(losses(run))
    assert len(of[0]) == 12 and of[0] == pytest.approx(of[1], rel=1e-5)


LONG = ["--train.epochs", "24", "--train.eval_every_epochs", "null", "--optim.name", "SGD", "--optim.lr", "0.01"]
LONG += ["--train.threads", "1", "--train.device", "cpu"]


def wait_step(slurm: Slurm, job: str, run: Path, step: int) -> None:
    """Until the metrics of a run have come to a step."""
    deadline = time.monotonic() + 60
    while not (run / "metrics.jsonl").exists() or f'"step": {step},' not in (run / "metrics.jsonl").read_text():
        assert time.monotonic() < deadline and slurm.show(job)["JobState"] in ("PENDING", "RUNNING"), slurm.log(job)
        time.sleep(0.2)


@needs_slurm
def test_a_real_run_is_stopped_requeued_and_ends_with_the_same_bits(slurm: Slurm, zygote: Zygote, tmp_path: Path):
    """Two nodes, DDP by torchrun, no checkpoints but the one of the stop."""
    env = ENV | {"PYTHONPATH": str(ROOT), "NPROC": "1"}
    job = slurm.submit("--nodes=2", TRAIN, *LONG, "--run.dir", "run", cwd=tmp_path, env=env)
    wait_step(slurm, job, tmp_path / "run", 50)
    slurm.client("scancel", "--batch", "--signal=USR1", job)
    slurm.start_now(job)
    stopped = json.loads((tmp_path / "run/summary.json").read_text())
    assert stopped["status"] == "preempted" and stopped["by"].startswith("SIGUSR1")
    assert slurm.wait(job, "COMPLETED")["Restarts"] == "1"
    assert f"resumed from run/checkpoints/step-{stopped['steps']:08d}" in slurm.log(job)
    alone = Run([*LONG, "--run.dir", str(tmp_path / "alone"), "--backend.name", "ddp"], ranks=2)
    zygote.run(alone)[0].check()
    final, expected = (torch.load(tmp_path / name / "weights.pt", weights_only=True) for name in ("run", "alone"))
    assert all(torch.equal(final[name], value) for name, value in expected.items())
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and steps[-1] == 552


@needs_slurm
def test_a_cut_cable_is_noticed_and_named(slurm: Slurm, tmp_path: Path):
    env = ENV | {"PYTHONPATH": str(ROOT)}
    args = ["--nodes=2", "--ntasks-per-node=1", TRAIN_SRUN, *LONG, "--train.epochs", "4000", "--run.dir", "run"]
    job = slurm.submit(*args, cwd=tmp_path, env=env)
    wait_step(slurm, job, tmp_path / "run", 50)
    slurm.cut_network("node2")
    begin = time.monotonic()
    slurm.wait_log(job, "[watchdog] rank 1 on node2", "is gone")
    assert time.monotonic() - begin < 9  # 4 s of keepalive, 5 s to say it
    slurm.mend("node2")


@needs_slurm
def test_the_labs_own_network_can_be_cut(slurm: Slurm):
    reach = ["timeout", "1", "bash", "-c", "exec 3<>/dev/tcp/10.77.0.12/17101"]
    assert slurm.client(*reach, check=False).returncode == 0
    slurm.cut_network("node2")
    assert slurm.client(*reach, check=False).returncode != 0
    slurm.mend("node2")
    assert slurm.client(*reach, check=False).returncode == 0
