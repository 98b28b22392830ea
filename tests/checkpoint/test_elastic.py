"""torchrun's own signals, restarts and comings and goings, with real kills: the run ends as one that was left alone."""

import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dist_train.checkpoint import manifest

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
# Some milliseconds a step, some hundred steps, a save every tenth.
RUN = (
    *("-m", "dist_train", "--train.global_batch_size", "16", "--train.threads", "1", "--train.epochs", "6"),
    *(
        "--train.eval_every_epochs",
        "null",
        "--checkpoint.every_steps",
        "10",
        "--optim.name",
        "SGD",
        "--optim.lr",
        "0.01",
    ),
)

# So that training does not amplify the last bit, in which other numbers of ranks differ.
GENTLE = ("--train.epochs", "60", "--optim.lr", "0.0003", "--train.precision", "float64")


def start(cwd: Path, *argv: str, **more: str) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | more
    return subprocess.Popen(
        [*TORCHRUN, *argv], cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


def finished(process: subprocess.Popen) -> None:
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out


def newest(folder: Path) -> int:
    return max((m.step for _, m in manifest.listed(folder)[0]), default=0)


def wait_step(process: subprocess.Popen, folder: Path, step: int) -> None:
    deadline = time.monotonic() + 60
    while newest(folder) < step:
        assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
        time.sleep(0.02)


def ranks_of(agent: int) -> dict[int, int]:
    """Processes of the ranks that an agent has started, by rank."""
    found = {}
    for task in Path(f"/proc/{agent}/task").iterdir():
        for child in (task / "children").read_text().split():
            try:
                environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            except OSError:
                continue  # it has ended
            for word in environment:
                if word.startswith(b"RANK="):
                    found[int(word[5:])] = int(child)
    return found


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "weights.pt", weights_only=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("undisturbed")
    done = start(folder, "--standalone", "--nproc_per_node=2", *RUN, "--run.dir", "run")
    finished(done)
    return weights(folder / "run")


def kill_and_restart(place: Path, kills: int) -> Path:
    """A run without a folder of its own choosing, with a rank killed that often; the folder that it has found again."""
    run = [*RUN, "--train.epochs", str(6 if kills == 1 else 40)]
    process = start(place, "--standalone", "--nproc_per_node=2", f"--max-restarts={kills}", *run)
    draw, folder = random.Random(kills), None
    for i in range(kills):
        while folder is None:
            folder = (
                next((path for path in (place / "runs").glob("digits-*")), None) if (place / "runs").exists() else None
            )
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.02)
        wait_step(process, folder, newest(folder) + draw.choice([10, 20, 30]))
        time.sleep(draw.random() * 0.05)
        ranks = ranks_of(process.pid)
        os.kill(ranks[draw.choice([0, 1])], signal.SIGKILL)
        while set(ranks_of(process.pid).values()) & set(ranks.values()):
            time.sleep(0.02)
        assert process.poll() is None, f"after kill {i + 1}: {process.stdout.read()}"
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    assert len(list((place / "runs").glob("digits-*"))) == 1 and out.count("resumed from") == kills
    return folder


def test_a_killed_rank_is_started_again_where_it_was(undisturbed, tmp_path: Path):
    final = weights(kill_and_restart(tmp_path, 1))
    assert all(torch.equal(final[name], value) for name, value in undisturbed.items())


@pytest.mark.full
def test_twenty_kills_in_a_row(tmp_path: Path):
    alone = start(tmp_path, "--standalone", "--nproc_per_node=2", *RUN, "--train.epochs", "40", "--run.dir", "alone")
    finished(alone)
    final = weights(kill_and_restart(tmp_path, 20))
    assert all(torch.equal(final[name], value) for name, value in weights(tmp_path / "alone").items())


@pytest.mark.parametrize("backend", [pytest.param("deepspeed", marks=pytest.mark.full), "accelerate"])
def test_a_stop_of_torchrun_itself_saves(backend: str, tmp_path: Path):
    more = ["--backend.name", backend, *(["--backend.zero_stage", "2"] if backend == "deepspeed" else [])]
    argv = ["--standalone", "--nproc_per_node=2", *RUN, "--train.epochs", "1000", "--run.dir", "run", *more]
    process = start(tmp_path, *argv)
    wait_step(process, tmp_path / "run", 20)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["status"] == "preempted" and summary["steps"] == newest(tmp_path / "run"), out
    assert re.search(r"stopped by SIGTERM on rank \d after step", out)


@pytest.mark.full
def test_a_node_leaves_and_another_comes(tmp_path: Path):
    """Two agents stand for two nodes: the second is killed, and later one joins again."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{probe.getsockname()[1]}"
    argv = [
        "--nnodes=1:2",
        "--nproc_per_node=1",
        "--max-restarts=3",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={endpoint}",
    ]
    argv += ["--rdzv-id=one", *RUN, *GENTLE, "--run.dir", "run"]

    def agent(host: int) -> subprocess.Popen:
        conf = f"--rdzv-conf=last_call_timeout=2,is_host={host}"
        # Without it torch 2.14 does not tell a node that joins later where the others meet.
        return start(tmp_path, conf, *argv, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")

    agents = [agent(1), agent(0)]
    try:
        comes_and_goes(agents, lambda: agent(0), tmp_path / "run")
    finally:
        for agent in agents:
            cut_power(agent)
    alone = start(tmp_path, "--standalone", "--nproc_per_node=1", *RUN, *GENTLE, "--run.dir", "alone")
    finished(alone)
    final = weights(tmp_path / "run")
    for name, value in weights(tmp_path / "alone").items():
        assert torch.linalg.norm(final[name] - value) / torch.linalg.norm(value) < 1e-9


def comes_and_goes(agents: list[subprocess.Popen], join: Callable[[], subprocess.Popen], folder: Path) -> None:
    """The one that holds the rendezvous stays, as a real cluster's would."""
    first, second = agents
    wait_step(first, folder, 20)
    cut_power(second)
    wait_step(first, folder, newest(folder) + 100)
    assert manifest.listed(folder)[0][0][1].world_size == 1
    agents.append(join())
    while manifest.listed(folder)[0][0][1].world_size == 1:
        wait_step(first, folder, newest(folder) + 10)
    for agent in (first, agents[-1]):
        finished(agent)


def cut_power(agent: subprocess.Popen) -> None:
    """The agent and its ranks are gone at once."""
    for process in (*(ranks_of(agent.pid).values() if agent.poll() is None else ()), agent.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    agent.stdout.close()
    agent.wait()
