"""What a person sees while a run goes, and what the trackers keep: a real terminal, W&B's own client and reader with a
server of this machine, TensorBoard's own reader."""

import base64
import fcntl
import io
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from pathlib import Path
from typing import Any

import pyte
import pytest
import torch

from dist_train.config.tree import TrackConfig
from dist_train.track.base import Course
from dist_train.track.console import shows_bar
from dist_train.track.status import status_of
from dist_train.track.wandb import run_id

from checkpoint_runs import DDP, SAVE_9, SAVE_12, SINGLE, root, same, weights
from wandb_server import KEY, Kept, Server, serving
from zygote import Ended, Zygote

WANDB = ["--track.wandb", "true", "--track.wandb_project", "proj"]
OFFLINE = [*WANDB, "--track.wandb_mode", "offline"]
SAME = ("train/loss", "train/grad_norm", "train/lr", "eval/loss", "eval/accuracy")  # in any start of a run


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def by_step(folder: Path) -> list[dict[str, float]]:
    """The metrics of metrics.jsonl that are the same in any start, in a row for each step."""
    rows: dict[int, dict[str, float]] = {}
    for line in lines_of(folder):
        if "event" not in line:
            values = {name: line[name] for name in SAME if name in line}
            rows.setdefault(line["step"], {"_step": line["step"]}).update(values)
    return list(rows.values())


def history(kept: Kept) -> list[dict[str, float]]:
    """The same as W&B has it, in its own order."""
    return [{name: row[name] for name in ("_step", *SAME) if name in row} for _, row in sorted(kept.history.items())]


def place(server: Server | None, home: Path, **more: str) -> dict[str, str]:
    """An environment without the network and the keys of this machine."""
    url = server.url if server else "http://127.0.0.1:1"
    return {"WANDB_BASE_URL": url, "HOME": str(home), "NETRC": str(home / "none"), "WANDB_ERROR_REPORTING": "0"} | more


def events(folder: Path) -> list[str]:
    return [line["event"] for line in lines_of(folder) if "event" in line]


# -- Weights & Biases --------------------------------------------------------------------------------------------------


def test_offline_runs_of_a_killed_stopped_and_resumed_run_are_one(zygote: Zygote, references, tmp_path: Path):
    """What W&B's own reader finds in the files of four starts: each step once, in order, with the values that stand in
    metrics.jsonl."""
    run = tmp_path / "run"
    more = ["--track.wandb_group", "g", "--track.wandb_tags", "[a, b]", "--track.wandb_name", "n"]
    argv = [*OFFLINE, *more, "--track.wandb_notes", "some notes"]

    def start(*plant: Any, argv: list[str] = argv) -> Ended:
        return zygote.run(SINGLE.run(run, *argv, plant={0: ("placed", place(None, tmp_path), *plant)}))[0]

    start("eager", "forward", 1, "kill")  # before its first checkpoint
    name = (run / "wandb_id").read_text().strip()
    start("kill_at", root(run), SAVE_9)
    assert start("eager", "forward", 7, "SIGTERM", argv=[]).codes == [75]  # without W&B
    ended = start().check()
    said = f"track.wandb: offline; to upload it: wandb sync {run}/wandb/offline-run-*-{name}"
    assert said in ended.out[0].splitlines() and not ended.err[0]
    assert same(weights(run), references(SINGLE).weights)
    assert events(run) == ["start", "resume", "stop", "resume"]
    with serving() as server:
        files = sorted(run.glob(f"wandb/offline-run-*-{name}"))
        command = [str(Path(sys.executable).parent / "wandb"), "sync", *map(str, files)]
        environment = os.environ | place(server, tmp_path, WANDB_API_KEY=KEY)
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
        )
    assert done.returncode == 0, done.stderr
    assert list(server.runs) == [name]
    kept = server.runs[name]
    assert history(kept) == by_step(run) and [row["_step"] for row in history(kept)] == list(range(1, 13))
    summary = json.loads((run / "summary.json").read_text())
    assert kept.summary.items() >= {k: v for k, v in summary.items() if v is not None}.items()
    assert kept.config["optim"]["name"] == "AdamW" and kept.config["world"]["size"] == 1
    assert kept.config["world"]["backend"] == "single"
    given = {key: kept.given.get(key) for key in ("project", "groupName", "tags", "displayName", "notes")}
    assert given == {
        **{"project": "proj", "groupName": "g", "tags": ["a", "b"], "displayName": "n", "notes": "some notes"},
    }
    assert any(name.startswith("system.") for row in kept.events.values() for name in row)


def test_online_starts_in_two_folders_are_one_run_and_the_key_is_nowhere(zygote: Zygote, references, tmp_path: Path):
    one, two = tmp_path / "one", tmp_path / "two"
    with serving() as server:
        environment = place(server, tmp_path, WANDB_API_KEY=KEY)

        def start(folder: Path, argv: list[str], *plant: Any) -> Ended:
            plants = {0: ("placed", environment, *plant)} | ({1: ("eager",)} if "eager" in plant else {})
            return zygote.run(DDP.run(folder, *WANDB, *argv, plant=plants, kill_all=True))[0]

        killed = start(one, [], "kill_at", root(one), SAVE_12)
        (name,) = server.runs
        on = ["--checkpoint.resume", str(one)]
        stopped = start(two, on, "eager", "forward", 10, "SIGTERM")
        assert stopped.codes == [75, 75] and server.runs[name].preempting and server.runs[name].exit_codes[-1] == 75
        ended = start(two, []).check()
        assert server.runs[name].exit_codes[-1] == 0
    assert list(server.runs) == [name] and (two / "wandb_id").read_text().strip() == name
    assert [row["_step"] for row in history(server.runs[name])] == list(range(1, 13))
    assert history(server.runs[name]) == by_step(one)[:9] + by_step(two)
    assert f"[rank 0] track.wandb: {server.url}/e/proj/runs/{name}" in ended.out[0].splitlines()
    assert same(weights(two), references(DDP).weights)
    sent = base64.b64encode(f"api:{KEY}".encode())
    assert f"Basic {sent.decode()}" in server.keys
    text = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    text += "".join(word for run in (killed, stopped, ended) for word in (*run.out, *run.err)).encode()
    assert name.encode() in text and KEY.encode() not in text and sent not in text


def test_offline_by_itself_and_disabled(zygote: Zygote, tmp_path: Path):
    with serving(401) as server, serving() as unused:
        ways = {
            "key": ([], place(unused, tmp_path)),
            "network": ([], place(None, tmp_path, WANDB_API_KEY=KEY)),
            "server": ([], place(server, tmp_path, WANDB_API_KEY=KEY)),
            "disabled": (["--track.wandb_mode", "disabled"], place(unused, tmp_path, WANDB_API_KEY=KEY)),
            "variable": ([], place(unused, tmp_path, WANDB_API_KEY=KEY, WANDB_MODE="offline")),
        }
        runs = [SINGLE.run(tmp_path / w, *WANDB, *argv, plant={0: ("placed", env)}) for w, (argv, env) in ways.items()]
        ended = dict(zip(ways, zygote.run(*runs), strict=True))
    assert not unused.runs and not unused.keys
    says = {
        "key": f"no key for {unused.url.removeprefix('http://')} (wandb login, or WANDB_API_KEY), so it records off",
        "network": "no way to 127.0.0.1, port 1, so it records offline; ",
        "server": "W&B does not take it (",
        "disabled": None,
        "variable": "offline; ",
    }
    for way, run in ended.items():
        run.check()
        told = [line for line in run.out[0].splitlines() if "track.wandb" in line]
        assert len(told) == (says[way] is not None) and not run.err[0], run
        assert all(line.startswith(f"track.wandb: {says[way]}") and "wandb sync " in line for line in told), told
        files = list((tmp_path / way).glob("wandb/offline-run-*/*.wandb"))
        assert len(files) == (way != "disabled") and KEY not in run.out[0]


def test_a_tracker_that_fails_is_told_of_once_and_changes_nothing(zygote: Zygote, references, tmp_path: Path):
    """W&B's process is killed; where TensorBoard's folder would be is a file."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/tensorboard").touch()
    plant = {0: ("placed", place(None, tmp_path), "without_wandb_core", 4)}
    ended = zygote.run(SINGLE.run(tmp_path / "run", *OFFLINE, "--track.tensorboard", "true", plant=plant))[0].check()
    ours = [line for line in ended.err[0].splitlines() if "training goes on without it" in line]
    assert sorted(line.split(": ")[0] for line in ours) == ["track.tensorboard", "track.wandb"], ended
    assert same(weights(tmp_path / "run"), references(SINGLE).weights) and status_of(tmp_path / "run") == "finished"


def test_the_id_is_the_configs_the_folders_the_checkpoints_or_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    on, off, old = TrackConfig(wandb=True), TrackConfig(), tmp_path / "old"
    assert run_id(off, tmp_path, None, None) is None and not list(tmp_path.iterdir())
    assert run_id(off, tmp_path, "kept", old) == "kept"  # for a later start that records
    assert run_id(on, tmp_path, "other", old) == run_id(on, tmp_path, None, None) == "kept"
    assert run_id(TrackConfig(wandb=True, wandb_id="mine"), tmp_path, "kept", old) == "mine"
    old.mkdir()
    (old / "summary.json").write_text('{"status": "finished"}')
    monkeypatch.setenv("WANDB_RUN_ID", "variable")
    assert run_id(on, old, "kept", old) == "variable"  # what goes on from a finished run is another one


# -- TensorBoard -------------------------------------------------------------------------------------------------------


def test_tensorboard_reads_back_a_run_that_was_killed(zygote: Zygote, tmp_path: Path):
    from tensorboard.backend.event_processing import data_provider
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
    from tensorboard.context import RequestContext
    from tensorboard.plugins.base_plugin import TBContext
    from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups

    argv = ["--track.tensorboard", "true"]
    zygote.run(SINGLE.run(tmp_path / "run", *argv, plant={0: ("kill_at", root(tmp_path / "run"), SAVE_12)}))
    assert lines_of(tmp_path / "run")[-1]["step"] == 12  # and it begins again after step 9
    zygote.run(SINGLE.run(tmp_path / "run", *argv))[0].check()
    seen = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    lines = [line for line in lines_of(tmp_path / "run") if "event" not in line]
    for name in (*SAME, "epoch", "train/samples_per_s"):
        got = [(event.step, event.value) for event in seen.Scalars(name)]
        assert got == [(line["step"], pytest.approx(line[name])) for line in lines if name in line], name
    (image,) = seen.Images("samples")
    assert image.step == 0 and image.width > 4 and image.height > 4
    runs = EventMultiplexer().AddRunsFromDirectory(str(tmp_path / "run"))
    runs.Reload()
    assert list(runs.Runs()) == ["tensorboard"]
    context = backend_context.Context(
        TBContext(data_provider=data_provider.MultiplexerDataProvider(runs, str(tmp_path)))
    )
    request = api_pb2.ListSessionGroupsRequest(
        start_index=0, slice_size=9, allowed_statuses=[api_pb2.STATUS_SUCCESS], include_metrics=True
    )
    (group,) = list_session_groups.Handler(RequestContext(), context, "", request).run().session_groups
    assert group.hparams["optim.lr"].number_value == 0.001 and group.hparams["optim.name"].string_value == "AdamW"
    results = {metric.name.tag: metric.value for metric in group.metric_values}
    last = {name: [line[name] for line in lines if name in line][-1] for name in results}
    assert results == pytest.approx(last) and {"eval/accuracy", "eval/loss"} <= results.keys()


# -- the console -------------------------------------------------------------------------------------------------------


def test_every_line_carries_its_rank_and_the_others_are_silent(zygote: Zygote, tmp_path: Path):
    ended = zygote.run(DDP.run(tmp_path, plant=dict.fromkeys((0, 1), ("warn",))))[0].check()
    lines, errors = ended.out[0].splitlines(), ended.err[0].splitlines()
    assert len(lines) > 12 and all(line.startswith("[rank 0] ") for line in lines), lines
    assert any("planted one" in line for line in errors) and "[rank 0] planted two" in errors
    assert all(line.startswith("[rank 0] ") for line in errors), errors
    assert ended.out[1] == ended.err[1] == ""


def test_what_is_not_asked_for_is_not_imported(zygote: Zygote, tmp_path: Path):
    zygote.run(SINGLE.run(tmp_path / "run", plant={0: ("modules_at_end", str(tmp_path / "modules"))}))[0].check()
    modules = {name.split(".")[0] for name in (tmp_path / "modules").read_text().splitlines()}
    assert "dist_train" in modules and not modules & {"wandb", "tensorboard", "rich"}


class Terminal:
    """A terminal of 80 columns that a run can be started on, and what is on its screen."""

    def __init__(self) -> None:
        self.master, self.slave = pty.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 80, 0, 0))
        self.path = os.ttyname(self.slave)
        self.screen = pyte.Screen(80, 50)
        self.stream = pyte.ByteStream(self.screen)
        self.raw = b""
        self.seen: list[list[str]] = []  # the screen, whenever something came
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        while data := os.read(self.master, 1 << 16):
            self.raw += data
            self.stream.feed(data.partition(END)[0])  # the last of the screen may come with it
            self.seen.append(self.lines())
            if END in self.raw:
                return

    def lines(self) -> list[str]:
        """What is on the screen."""
        return [line.rstrip() for line in self.screen.display if line.strip()]

    def close(self) -> list[str]:
        """What is on the screen at the end."""
        os.write(self.slave, END)
        self.thread.join()
        os.close(self.slave)
        os.close(self.master)
        return self.lines()


END = b"\x00the end"


@pytest.fixture
def terminal():
    """See Terminal. The test closes it."""
    return Terminal()


def test_the_bar_on_a_terminal(terminal: Terminal, zygote: Zygote, tmp_path: Path):
    plant = {0: ("on_terminal", terminal.path)}
    zygote.run(SINGLE.run(tmp_path / "run", "--track.every_steps", "2", plant=plant))[0].check()
    screen, metrics = terminal.close(), lines_of(tmp_path / "run")
    table, _, backend, above, below, *last = screen
    assert table.startswith("rank ") and backend.startswith("backend single")
    assert any(line.startswith("results in ") for line in last)
    assert re.fullmatch(r"epoch 2\.00/2  ━{20,}  step 12/12  ETA 0\.0s", above), above
    loss, accuracy = ([m[name] for m in metrics if name in m][-1] for name in ("train/loss", "eval/accuracy"))
    assert re.fullmatch(rf"loss {loss:.4f}  accuracy {accuracy:.2%}  lr 0\.001  [\d,]+ samples/s", below), below
    assert any("epoch 1.00/2" in line and "step 6/12" in line for lines in terminal.seen for line in lines)
    # Drawn when there are metrics, and once more at the end: between that nothing is.
    assert terminal.raw.count(b"ETA") == len(metrics) + 1


def test_a_kill_leaves_the_terminal_usable_and_warnings_are_above(zygote: Zygote, tmp_path: Path, terminal: Terminal):
    plant = {0: ("on_terminal", terminal.path, "warn", "kill")}
    ended = zygote.run(DDP.run(tmp_path / "run", plant=plant, kill_all=True))[0]
    screen = terminal.close()
    (bar,) = (i for i, line in enumerate(screen) if "ETA" in line)
    (warning,) = (i for i, line in enumerate(screen) if line == "[rank 0] planted two")
    assert warning < bar and ended.codes[0] == -9 and not terminal.screen.cursor.hidden


@pytest.mark.parametrize(
    ("bar", "progress", "is_terminal", "environment"),
    [
        (True, "auto", True, {"TERM": "xterm"}),
        (False, "lines", True, {"TERM": "xterm"}),
        (False, "auto", False, {"TERM": "xterm"}),
        (True, "bar", False, {}),
        (False, "auto", True, {"TERM": "dumb"}),
        (False, "auto", True, {}),
        (False, "auto", True, {"TERM": "xterm", "OMPI_COMM_WORLD_RANK": "0"}),  # one of Open MPI's, before a file
    ],
)
def test_where_there_is_a_bar(
    bar: bool, progress: str, is_terminal: bool, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("TERM", raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: is_terminal)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert shows_bar(progress) == bar


def test_the_bar_fits_into_80_columns(monkeypatch: pytest.MonkeyPatch):
    from rich.console import Console

    from dist_train.track.bar import Bar

    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda device: 75.3 * 2**30)
    bar = Bar(Course(0, 1_000_000, 12_345, 64, None, ("eval/accuracy",)), torch.device("cuda"), str)
    bar.now = {"step": 123_456, "epoch": 10.0005, "train/loss": 12.3456, "eval/accuracy": 1.0, "train/lr": 1.234e-4}
    bar.now["train/samples_per_s"] = 1_234_567.0
    console = Console(width=80, file=io.StringIO())
    console.print(bar._drawn())
    above, below = console.file.getvalue().splitlines()
    assert re.fullmatch(r"epoch 10\.00/81  [━╸╺ ]{20,}  step 123456/1000000  ETA 45\.4s", above), above
    assert below == "loss 12.3456  accuracy 100.00%  lr 0.000123  1,234,567 samples/s  GPU 75.3 GiB"
