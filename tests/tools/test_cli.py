"""The command line as real processes: exit codes, what is said, by which rank, and what is not imported for it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dist_train.config.tree import fields_of
from dist_train.errors import ConfigError
from dist_train.ranks import ending
from dist_train.ranks.launcher import Launcher

COMMAND = [sys.executable, "-m", "dist_train"]
HEAVY = {"torch", "torchvision", "numpy", "sklearn", "PIL"}


def start(cwd: Path, *argv: str, python: tuple[str, ...] = (), **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, *python, "-m", "dist_train", *argv]
    return subprocess.run(
        command, cwd=cwd, env=os.environ | env, capture_output=True, text=True, timeout=60, check=False
    )


REFUSED = [
    (["--train.epochs", "x"], "train.epochs: got 'x', expected an integer; for example --train.epochs 10"),
    (["--config", "nope.yaml"], "--config: got 'nope.yaml', expected a YAML file that can be read: No such file"),
    (["--backend.name", "ddp"], "backend.name: got ddp in a process that was started alone, expected a launcher"),
    (["evl"], "command line: got unknown command 'evl', expected one of train, bench, doctor, eval"),
    (["eval"], "run.dir: got nothing, expected the folder of a finished run"),
    (["eval", "--run.dir", "nope"], "run.dir: got nope, expected the folder of a finished run"),
    (["train", "--train.device", "abacus"], "train.device: got abacus"),  # torch is needed to know
]


@pytest.mark.parametrize(("argv", "line"), REFUSED, ids=[" ".join(row[0]) for row in REFUSED])
def test_a_mistake_gives_one_line_and_exit_code_2(argv: list[str], line: str, tmp_path: Path):
    done = start(tmp_path, *argv)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith(f"dist_train: {line}"), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_several_mistakes_give_a_line_each(tmp_path: Path):
    done = start(tmp_path, "--train.epochs", "0", "--optim.momentum", "0.9")
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"dist_train: train.epochs: .*\ndist_train: optim.momentum: .*\n", done.stderr)


def test_help_names_every_field(tmp_path: Path):
    done = start(tmp_path, "--help")
    assert done.returncode == 0 and done.stderr == ""
    fields = {f"--{section}.{key}" for section in fields_of("") for key in fields_of(section)}
    options = set(re.findall(r"^  (--\S+)", done.stdout, re.M))
    assert options == fields | {"--config", "--print_config"}
    assert "whose shares differ by one sample at most." in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["--help"], 0),
        (["--print_config", "--optim.args.betas", "[0.9, 0.95]"], 0),
        (["--train.epoch", "3"], 2),
        (["--optim.momentum", "0.9"], 2),  # known from the source of torch.optim, which is read, not imported
        (["--data.name", "mnist", "--data.args.n", "3"], 2),
    ],
)
def test_answers_without_importing_torch(argv: list[str], code: int, tmp_path: Path):
    done = start(tmp_path, *argv, python=("-X", "importtime"))
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert done.returncode == code
    assert "dist_train.config.tree" in imported and not HEAVY & imported


# -- who speaks --------------------------------------------------------------------------------------------------------


def test_torchrun_shows_a_mistake_once(tmp_path: Path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, "-m", "dist_train", "--train.epochs", "x"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0
    assert done.stderr.count("train.epochs: got 'x', expected an integer") == 1, done.stderr
    assert done.stdout == ""


PLACE = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def test_a_rank_that_is_alone_with_its_mistake_speaks(tmp_path: Path):
    """Nobody ends this rank while it waits for rank 0 to speak: rank 0 has no such mistake."""
    done = start(tmp_path, "--train.epochs", "x", RANK="1", LOCAL_RANK="1", TORCHELASTIC_RUN_ID="1", **PLACE)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("dist_train: train.epochs: got 'x'")


def test_a_rank_that_is_ended_while_it_waits_is_silent(tmp_path: Path):
    """Rank 0 speaks and ends, and the launcher ends the others: here the test, when rank 1 has had the same mistake."""
    place = os.environ | PLACE | {"RANK": "1", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "1"}
    code = (
        "import time, dist_train.__main__ as main\n"
        "sleep = time.sleep\n"
        "time.sleep = lambda wait_s: (print('waits', flush=True), sleep(wait_s))\n"
        "main.main()"
    )
    command = [sys.executable, "-c", code, "--train.epochs", "x"]
    with subprocess.Popen(command, cwd=tmp_path, env=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as rank_1:
        assert rank_1.stdout.readline() == b"waits\n"
        rank_0 = start(tmp_path, "--train.epochs", "x", RANK="0", LOCAL_RANK="0", TORCHELASTIC_RUN_ID="1", **PLACE)
        rank_1.send_signal(signal.SIGTERM)
        _, said = rank_1.communicate(timeout=60)
    assert rank_0.returncode == 2 and rank_0.stderr.startswith("dist_train: train.epochs: got 'x'")
    assert said == b"" and rank_1.returncode == -signal.SIGTERM


def test_contradicting_variables_are_the_users_mistake(tmp_path: Path):
    done = start(tmp_path, RANK="2", LOCAL_RANK="0", **PLACE)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("dist_train: environment: got RANK=2, WORLD_SIZE=2") and done.stderr.count("\n") == 1


def interrupted(cwd: Path, *argv: str, again_after_s: float | None = None) -> tuple[int, str, str]:
    """Ctrl-C while it trains, and perhaps once more: the exit code, and what was said."""
    command = [*COMMAND, "--train.epochs", "100000", "--run.dir", "run", *argv]
    with subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        for line in run.stdout:
            if "backend single" in line:  # the loop is next
                break
        time.sleep(0.3)
        run.send_signal(signal.SIGINT)
        if again_after_s is not None:
            time.sleep(again_after_s)
            run.send_signal(signal.SIGINT)
        out, err = run.communicate(timeout=60)
    return run.returncode, out, err


def test_an_interrupt_saves_and_ends_in_a_line(tmp_path: Path):
    code, out, err = interrupted(tmp_path)
    assert (code, err) == (ending.STOPPED, "") and code == 75
    assert re.fullmatch(
        r"stopped by SIGINT on rank 0 after step \d+, and saved; --run.dir run goes on .*", out.split("\n")[-2]
    )
    assert len(list((tmp_path / "run/checkpoints").glob("step-*"))) == 1
    assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "preempted"


SLOW = """
import time
from dist_train.models.mlp import MLP
class Slow(MLP):
    def forward(self, x):
        time.sleep(4)
        return super().forward(x)
"""


def test_an_impatient_interrupt_ends_at_once(tmp_path: Path):
    (tmp_path / "slow.py").write_text(SLOW)
    code, _, err = interrupted(tmp_path, "--model.name", "slow:Slow", again_after_s=0.8)
    assert (code, err) == (ending.INTERRUPTED, "interrupted twice: ended without saving\n") and code == 130
    assert not (tmp_path / "run/summary.json").exists()


def test_an_error_of_the_users_code_is_shown_in_the_lines_of_that_code(tmp_path: Path):
    (tmp_path / "mine.py").write_text("def data(root, download):\n    raise RuntimeError('planted')\n")
    done = start(tmp_path, "--data.name", "mine:data", "--run.dir", "run")
    assert done.returncode == ending.BAD_CONFIG == 2 and done.stdout == ""
    assert done.stderr.startswith("dist_train: data.name: got mine:data") and 'mine.py", line 2' in done.stderr
    assert done.stderr.endswith("RuntimeError: planted\n") and "[rank" not in done.stderr


# -- the parts ---------------------------------------------------------------------------------------------------------

RANK_1 = Launcher("torchrun", 1, 2, 1, 2)


def test_rank_0_speaks_at_once(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ending, "ECHO_WAIT_S", 1e9)
    assert ending.refuse(ConfigError("a: b", "c: d"), Launcher()) == ending.BAD_CONFIG == 2
    assert capsys.readouterr() == ("", "dist_train: a: b\ndist_train: c: d\n")


@pytest.mark.parametrize("message", ["Connection closed by peer [127.0.0.1]:1", "Broken pipe"])
def test_the_echo_of_another_ranks_end_is_a_line(message: str, capsys: pytest.CaptureFixture, monkeypatch):
    monkeypatch.setattr(ending, "ECHO_WAIT_S", 0.0)
    assert ending.fail(RuntimeError(message), RANK_1) == ending.FAILED
    assert capsys.readouterr().err == "[rank 1] lost another rank, whose own error stands above or on its node\n"


def test_a_ranks_own_error_is_shown_with_the_rank_on_every_line(capsys: pytest.CaptureFixture, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    monkeypatch.setattr(ending, "ECHO_WAIT_S", 1e9)
    assert ending.fail(RuntimeError("two\nlines"), RANK_1) == ending.FAILED
    lines = capsys.readouterr().err.splitlines()
    assert lines[-2:] == ["[rank 1] RuntimeError: two", "[rank 1] lines"]
    assert all(line.startswith("[rank 1] ") for line in lines)


def test_torchrun_gets_the_error_for_its_own_report(tmp_path: Path):
    file = tmp_path / "error.json"
    code = "from dist_train.ranks import ending, launcher; ending.fail(ValueError('planted'), launcher.Launcher())"
    env = os.environ | {"TORCHELASTIC_ERROR_FILE": str(file)}
    subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, timeout=60, check=True)
    assert "planted" in file.read_text()
