"""A real SLURM on this machine for tests: munged, slurmctld, and a slurmd a node, each node with a host name, a network
card and processes of its own.

    def test_something(slurm: Slurm, tmp_path: Path):
        job = slurm.submit("--nodes=2", "script.sbatch", "argument", cwd=tmp_path)
        slurm.wait(job, "COMPLETED")               # polls scontrol; another end state fails at once with the job's log
        slurm.wait_log(job, "text", "more")        # until these stand in its log
        slurm.log(job), slurm.show(job)            # what the job printed; the fields of `scontrol show job`
        slurm.client("scancel", job)               # any of SLURM's commands
        slurm.processes()                          # command lines of what runs on the nodes beside the daemons
        slurm.start_now(job)                       # a requeued job starts within seconds, not after SLURM's own wait
        slurm.cut_power("node2")                   # slurmd, the steps and all that they started are gone
        slurm.cut_network("node2")                 # they live, and nobody hears of them
        slurm.mend("node2")                        # power, network and state as they were

The fixture `slurm` starts the cluster once a session (about a second) and hands each test an idle one: jobs that a test
leaves are cancelled, nodes that it broke are mended. All of it lives in namespaces below one process that dies with
the tests' own, so no port, bridge or process is left, however they end. `needs_slurm` skips a module where it
cannot run: without root, or without Debian's packages slurm-wlm, munge and iproute2.
"""

import contextlib
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

NODES = ("node1", "node2")
CPUS_PER_NODE = 4  # more than this machine may have: SLURM only counts them
GPUS_PER_NODE = 2  # terminals that SLURM counts as GPUs
TIMEOUT_S = 60
PROGRAMS = ("slurmctld", "slurmd", "munged", "ip", "nsenter", "unshare", "setpriv")
END_STATES = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY")

CONF = """\
ClusterName=lab
SlurmctldHost=head(10.77.0.1)
SlurmctldPort=17000
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={lab}/munge/socket,cred_expire=5
StateSaveLocation={lab}/state
SlurmdSpoolDir={lab}/spool.%n
SlurmctldPidFile={lab}/slurmctld.pid
SlurmdPidFile={lab}/slurmd.%n.pid
SlurmctldLogFile={lab}/slurmctld.log
SlurmdLogFile={lab}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=10000,batch_sched_delay=0,bf_interval=1
EpilogMsgTime=1
KillWait=5
MessageTimeout=10
TCPTimeout=2
MinJobAge=300
SlurmdTimeout=10
JobRequeue=1
GresTypes=gpu
{nodes}
PartitionName=debug Nodes=ALL Default=YES MaxTime=60 DefaultTime=5 State=UP
"""
NODE = (
    "NodeName={name} NodeHostname={name} NodeAddr={address} Port={port} CPUs={cpus} RealMemory=4000 Gres=gpu:{gpus}\n"
)


def _missing() -> str:
    """Why SLURM cannot run here; empty if it can."""
    if os.geteuid() != 0:
        return "a SLURM cluster of its own needs root"
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    absent = [program for program in PROGRAMS if shutil.which(program, path=path) is None]
    if absent:
        return f"{', '.join(absent)} not installed: apt-get install slurm-wlm munge iproute2"
    done = subprocess.run(["unshare", "-mnup", "--fork", "true"], capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else f"no namespaces here: {done.stderr.strip()}"


needs_slurm = pytest.mark.skipif(bool(_missing()), reason=_missing() or "-")


class Slurm:
    """The cluster. Its face is described above; everything that it starts ends with `close`."""

    def __init__(self) -> None:
        self.lab = Path(tempfile.mkdtemp(prefix="slurm", dir="/tmp"))  # short: sockets' paths may have 108 characters
        self.env = os.environ | {
            "SLURM_CONF": str(self.lab / "slurm.conf"),
            "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin",
        }
        self.daemons: list[subprocess.Popen] = []
        self.logs: dict[str, Path] = {}
        self.broken: set[str] = set()
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    # -- jobs --------------------------------------------------------------------------------------------------------

    def submit(self, *argv: str, cwd: Path, env: dict[str, str] | None = None) -> str:
        """The id of the job that `sbatch ARGV` makes, started in `cwd`. Its log is `cwd/slurm-ID.out`."""
        done = self.client("sbatch", "--parsable", *argv, cwd=cwd, env=env)
        job = done.stdout.strip()
        self.logs[job] = cwd
        return job

    def client(
        self, *argv: str, cwd: Path | None = None, env: dict[str, str] | None = None, check: bool = True
    ) -> subprocess.CompletedProcess:
        """Runs a command where the cluster can be reached: one of SLURM's, or one that starts them."""
        done = subprocess.run(
            [*self._inside("-n", "-m", "-u", f"--wd={cwd or '/'}"), *argv],
            env=self.env | (env or {}),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0 or not check, f"{argv} gave {done.returncode}: {done.stderr}{done.stdout}"
        return done

    def show(self, job: str) -> dict[str, str]:
        """The fields of `scontrol show job`, such as JobState, ExitCode (`1:0`), Restarts."""
        text = self.client("scontrol", "-o", "show", "job", job).stdout
        return dict(re.findall(r"(\w+)=(\S*)", text))

    def wait(self, job: str, *states: str, timeout_s: float = TIMEOUT_S) -> dict[str, str]:
        """Waits until the job is in one of `states`, and returns its fields. Fails with its log after `timeout_s`, or
        as soon as it has ended in another state."""
        deadline = time.monotonic() + timeout_s
        while True:
            fields = self.show(job)
            if fields["JobState"] in states:
                return fields
            assert fields["JobState"] not in END_STATES, f"job {job}: {fields}\n{self.log(job)}"
            assert time.monotonic() < deadline, f"job {job} not {states}: {fields}\n{self.log(job)}\n{self._tails()}"
            time.sleep(0.2)  # to ask costs a process

    def wait_log(self, job: str, *texts: str, timeout_s: float = TIMEOUT_S) -> str:
        """Waits until all the texts stand in the job's log, and returns the log."""
        deadline = time.monotonic() + timeout_s
        while any(text not in self.log(job) for text in texts):
            state = self.show(job)["JobState"]
            assert time.monotonic() < deadline and state not in END_STATES, f"job {job} {state}:\n{self.log(job)}"
            time.sleep(0.2)  # to ask costs a process
        return self.log(job)

    def log(self, job: str) -> str:
        """What the job has printed so far; of `ID_TASK`, what that task of an array has."""
        path = self.logs[job.split("_")[0]] / f"slurm-{job}.out"
        return path.read_text(errors="replace") if path.exists() else ""

    def start_now(self, job: str) -> None:
        """Waits until the job is back in the queue, and takes away the time for which SLURM would leave it there."""
        self.wait(job, "PENDING")
        # `now` itself could fail the job.
        self.client("scontrol", "update", f"JobId={job}", "StartTime=now+2", check=False)

    def processes(self) -> list[str]:
        """Command lines of all that runs on the nodes beside slurmd and slurmstepd."""
        found = []
        roots = {Path(f"/proc/{pid}/ns/pid").readlink() for pid in self._node_pids()}
        for status in Path("/proc").glob("[0-9]*/status"):
            with contextlib.suppress(OSError):
                if status.parent.joinpath("ns/pid").readlink() in roots and "State:\tZ" not in status.read_text():
                    words = status.parent.joinpath("cmdline").read_text(errors="replace").split("\0")
                    daemon = words[0].startswith(("slurmd", "slurmstepd")) or any("slurmd -D" in w for w in words)
                    if not daemon:
                        found.append(" ".join(words).strip())
        return found

    # -- nodes -------------------------------------------------------------------------------------------------------

    def cut_power(self, node: str) -> None:
        """Ends everything on a node at once."""
        self.broken.add(node)
        self._kill_node(node)

    def cut_network(self, node: str) -> None:
        """Pulls a node's network cable."""
        self.broken.add(node)
        self._head("ip", "link", "set", f"to-{node}", "down")

    def mend(self, node: str) -> None:
        """Gives a node its power, network and state back, and waits until SLURM has it idle."""
        self._kill_node(node)
        self._head("ip", "link", "set", f"to-{node}", "up")
        self._power_on(node)
        self.client("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=mended", check=False)
        self.client("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)
        self._wait_idle()
        self.broken.discard(node)

    def tidy(self) -> None:
        """What the fixture does between tests."""
        self.client("scancel", "--user=root", check=False)
        for node in sorted(self.broken):
            self.mend(node)
        self._wait_idle()

    # -- inside ------------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        lab = self.lab
        for name in ("munge", "state", "run"):
            (lab / name).mkdir(mode=0o755)
        addresses = {"head": "10.77.0.1"} | {node: f"10.77.0.{11 + i}" for i, node in enumerate(NODES)}
        # c10d looks a peer's name up by its IPv6 address as well.
        rows = [f"{address} {name}\n::ffff:{address} {name}\n" for name, address in addresses.items()]
        (lab / "hosts").write_text("127.0.0.1 localhost\n" + "".join(rows))
        (lab / "munge/key").write_bytes(os.urandom(1024))
        (lab / "munge/key").chmod(0o600)
        (lab / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (lab / "gres.conf").write_text(f"Name=gpu File=/dev/tty[0-{GPUS_PER_NODE - 1}]\n")
        nodes = "".join(
            NODE.format(name=node, address=addresses[node], port=17100 + i, cpus=CPUS_PER_NODE, gpus=GPUS_PER_NODE)
            for i, node in enumerate(NODES)
        )
        (lab / "slurm.conf").write_text(CONF.format(lab=lab, nodes=nodes))

        # The first process of the cluster's world. bash, as it reaps what others leave to it.
        world = f"mount --bind {lab}/hosts /etc/hosts; mount -t tmpfs none /run; hostname head; touch {lab}/up; "
        self.world = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--net", "--uts", "--pid", "--fork"]
            + ["--kill-child", "--mount-proc", "bash", "-c", world + "sleep infinity & wait"],
            env=self.env,
        )
        self._until(lambda: (lab / "up").exists() and self._first_pid(), "namespaces")
        network = ["ip link set lo up", "ip link add bridge type bridge", "ip link set bridge up"]
        network += ["ip address add 10.77.0.1/24 dev bridge"]
        for node in NODES:
            network += [
                f"ip netns add {node}",
                f"ip link add to-{node} type veth peer name eth0 netns {node}",
                f"ip link set to-{node} master bridge up",
                f"ip -n {node} link set lo up",
                f"ip -n {node} address add {addresses[node]}/24 dev eth0",
                f"ip -n {node} link set eth0 up",
            ]
        self._head("sh", "-ec", "\n".join(network))
        munge = [
            f"--{name}={lab}/munge/{name.split('-')[0]}" for name in ("socket", "key-file", "pid-file", "seed-file")
        ]
        self._daemon("munged", "--foreground", "--force", f"--log-file={lab}/munge/log", *munge)
        self._until((lab / "munge/socket").exists, "munged")
        self._daemon("slurmctld", "-D", "-c", "-f", f"{lab}/slurm.conf")
        for node in NODES:
            self._power_on(node)
        self._wait_idle()

    def _until(self, ready, what: str, timeout_s: float = 30) -> None:
        deadline = time.monotonic() + timeout_s
        while not ready():
            assert time.monotonic() < deadline, f"{what}: not ready within {timeout_s} s\n{self._tails()}"
            time.sleep(0.02)

    def _wait_idle(self) -> None:
        def idle() -> bool:
            done = self.client("sinfo", "-h", "-N", "-o", "%T", check=False)
            return done.stdout.split() == ["idle"] * len(NODES)

        self._until(idle, "nodes", timeout_s=40)

    def _first_pid(self) -> int:
        """The cluster's first process, as this namespace counts."""
        text = Path(f"/proc/{self.world.pid}/task/{self.world.pid}/children").read_text().split()
        return int(text[0]) if text else 0

    def _inside(self, *namespaces: str) -> list[str]:
        return ["nsenter", "-t", str(self._first_pid()), *namespaces, "--"]

    def _head(self, *argv: str) -> str:
        """Runs a command on the machine that slurmctld is on."""
        command = [*self._inside("-n", "-m", "-u", "-p"), *argv]
        return subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=30, check=True).stdout

    def _daemon(self, *argv: str) -> None:
        command = [*self._inside("-n", "-m", "-u", "-p"), *argv]
        with (self.lab / f"{argv[0]}.out").open("ab") as log:
            process = subprocess.Popen(command, env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.daemons.append(process)

    def _power_on(self, node: str) -> None:
        boot = (
            f"mount --bind {self.lab}/hosts /etc/hosts; hostname {node}; rm -f {self.lab}/slurmd.{node}.pid; "
            f"slurmd -D -N {node} -f {self.lab}/slurm.conf & wait"
        )
        unshare = "unshare --uts --mount --pid --fork --kill-child --mount-proc sh -c"
        start = f'echo $$ > {self.lab}/run/{node}; exec ip netns exec {node} {unshare} "$0"'
        self._daemon("sh", "-c", start, boot)

    def _kill_node(self, node: str) -> None:
        file = self.lab / "run" / node
        if file.exists():
            self._head("sh", "-c", f"kill -KILL {file.read_text().strip()} || true")
            file.unlink()

    def _node_pids(self) -> list[int]:
        """The first process of each node that has power, as this namespace counts."""
        pids = []
        for daemon in self.daemons:
            with contextlib.suppress(OSError, IndexError):
                words = Path(f"/proc/{daemon.pid}/cmdline").read_text()
                if "slurmd -D" in words:
                    child = daemon.pid
                    for _ in range(2):  # nsenter, then unshare, each with one child
                        child = int(Path(f"/proc/{child}/task/{child}/children").read_text().split()[0])
                    pids.append(child)
        return pids

    def _tails(self) -> str:
        return "\n".join(
            f"--- {path.name}\n" + path.read_text(errors="replace")[-1500:] for path in sorted(self.lab.glob("*.log"))
        )

    def close(self) -> None:
        """Ends everything, and removes the cluster's folder."""
        if hasattr(self, "world"):
            self.world.kill()
            self.world.wait()
        for daemon in self.daemons:
            daemon.wait(timeout=10)
        shutil.rmtree(self.lab, ignore_errors=True)


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[Slurm]:
    """The cluster of the session; tests take `slurm`."""
    cluster = Slurm()
    yield cluster
    cluster.close()


@pytest.fixture
def slurm(slurm_cluster: Slurm) -> Iterator[Slurm]:
    """An idle cluster."""
    yield slurm_cluster
    slurm_cluster.tidy()
