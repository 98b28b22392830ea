"""Reading runs in any state, thinning, the command line, the pictures, and the list of runs."""

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dist_train.errors import ConfigError
from dist_train.ranks.launcher import Launcher
from dist_train.report import png, read
from dist_train.report.images import picture
from dist_train.report.panels import Curve, Lines, panels, thin
from dist_train.report.summary import headlines, rows
from dist_train.report.text import duration, number
from dist_train.tools import report, runs

from report_runs import lines, make, measured, write_evaluation, write_lines, write_masks, write_predictions


@given(st.integers(1, 500), st.integers(10, 60), st.sampled_from([0.0, 0.05, 0.9, 1.0]), st.integers(0, 2**32))
def test_thinning_keeps_the_extremes_of_every_stretch(n: int, most: int, lost: float, seed: int):
    rng = np.random.default_rng(seed)
    y = np.where(rng.random(n) < lost, rng.choice([np.nan, np.inf, -np.inf], n), rng.normal(size=n).round(1))
    keep = thin(y, most)
    assert len(keep) <= most or len(y) <= most
    assert (np.diff(keep) > 0).all() and keep[0] == 0 and keep[-1] == len(y) - 1
    finite = y[np.isfinite(y)]
    assert np.isfinite(y[keep]).any() == bool(len(finite))
    if len(finite):
        kept = y[keep][np.isfinite(y[keep])]
        assert (kept.min(), kept.max()) == (finite.min(), finite.max())
    # A gap may move within its bucket, but none is lost.
    for at in np.flatnonzero(~np.isfinite(y)):
        near = keep[~np.isfinite(y[keep])]
        assert np.abs(near - at).min() < max(1, -(-len(y) // ((most - 2) // 3)))


def test_what_a_killed_run_left_is_read(tmp_path: Path):
    run = make(tmp_path / "run", finished=False)
    whole = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text('nonsense\n[1]\n{"step": "x", "train/loss": "y"}\n' + whole + '{"step": 41, "tr')
    (run / "evaluation.npz").write_bytes(b"PK\3\4 cut off")
    (run / "summary.json").write_text('{"status": "fini')
    (found,) = read.read([run])
    assert (found.status, found.steps, found.total_steps) == ("unfinished", 40, 40)
    assert found.problems[0] == "2 lines of metrics.jsonl cannot be read"
    assert "evaluation.npz cannot be read" in found.problems[1] and found.evaluated.classes is None
    losses = found.series["train/loss"]
    assert np.isnan(losses.value[0]) and np.isnan(losses.step[0])
    recorded = [line["train/loss"] for line in lines() if "train/loss" in line]
    assert losses.value[1:].tolist() == recorded and losses.best(largest=False) == (
        min(recorded), recorded.index(min(recorded)) + 1,
    )  # fmt: skip
    assert found.environment["backend"] == "ddp" and found.environment["host"] == "node<1>"
    assert report.run([str(run)], Launcher()) == 0


def test_a_run_that_has_recorded_nothing_yet(tmp_path: Path, capsys: pytest.CaptureFixture):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").touch()
    before = sorted(run.iterdir())
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (found,) = read.read([run])
        assert (found.status, found.steps, found.total_steps, found.config) == ("running", 0, None, {})
        assert report.run([str(run), "-o", str(tmp_path / "page.html")], Launcher()) == 0
        assert runs.run([str(tmp_path), "--json"], Launcher()) == 0
    listed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (listed[0]["status"], listed[0]["steps"], listed[0]["loss"]) == ("running", 0, None)
    assert sorted(run.iterdir()) == sorted([*before, run / ".lock"])


def test_an_older_run_without_events_and_with_a_growing_world(tmp_path: Path):
    run = make(tmp_path / "run", finished=False)
    both = [line for line in lines(10, ranks=1) + lines(30, ranks=3) if "event" not in line]
    write_lines(run, both)
    (found,) = read.read([run])
    assert found.events == [] and found.ranks.own_ms.shape == (3, 40)
    assert np.isnan(found.ranks.own_ms[1:, :10]).all() and np.isfinite(found.ranks.own_ms[:, 10:]).all()


def test_ranks_are_binned_by_their_mean(tmp_path: Path):
    run = make(tmp_path / "run", finished=False)
    recorded = [line for line in lines(1700) if "ranks/own_ms" in line]
    write_lines(run, recorded)
    times = read.read([run])[0].ranks
    assert times.lines_per_column == 8 and times.own_ms.shape == (2, 213)
    values = np.array([line["ranks/own_ms"] for line in recorded])
    assert np.allclose(times.own_ms[:, 3], values[24:32].mean(0), rtol=1e-12)
    assert (times.first_step[3], times.last_step[3], times.last_step[-1]) == (25, 32, 1700)


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path):
    folders = [make(tmp_path / place / "run", finished=False) for place in ("a", "b")]
    assert [run.name for run in read.read(folders)] == ["a/run", "b/run"]
    with pytest.raises(ConfigError, match="twice"):
        read.read([folders[0], folders[0] / "../run"])


def test_a_hundred_thousand_lines_take_seconds(tmp_path: Path):
    run = make(tmp_path / "run", finished=False)
    write_lines(run, [line for line in lines(100_000) if "train/loss" in line])
    before = os.times()
    done = command("report", str(run))
    after = os.times()
    assert done.returncode == 0, done.stderr
    used_s = after.children_user - before.children_user + after.children_system - before.children_system
    assert used_s < 5, "seconds of one core"
    assert (run / "report.html").stat().st_size < 7e6


def command(*argv: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", "dist_train", *argv]
    return subprocess.run(line, capture_output=True, text=True, timeout=60, check=False, cwd=cwd)


def test_a_mistake_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = make(tmp_path / "run", finished=False)
    (tmp_path / "file").touch()
    for argv, said in (
        ([], "command line: got no run, expected folders of runs"),
        ([str(tmp_path / "nope")], "nope, which holds no metrics.jsonl, expected the folder of a run"),
        ([str(run), "--out", "x"], "command line: got --out"),
        ([str(run), "-o"], "report: got -o without a value"),
        ([str(run), "-o", str(tmp_path)], "which is a folder, expected a file"),
        ([str(run), "-o", str(tmp_path / "file/page.html")], "cannot be written"),
    ):
        with pytest.raises(ConfigError) as error:
            report.run(argv, Launcher())
        assert said in str(error.value) and len(error.value.lines) == 1
    for argv in ([str(tmp_path / "nope")], ["--jsn"], ["a", "b"]):
        with pytest.raises(ConfigError, match="command line: got"):
            runs.run(argv, Launcher())
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install 'dist-train\[report\]'"):
        report.run([str(run)], Launcher())
    with pytest.raises(ConfigError, match=r"pip install 'dist-train\[report\]'"):
        png.png(Lines("a", "a", "x", "y", []))
    assert not list(run.glob("*report*")) and not list(tmp_path.glob(".*"))


def test_a_report_needs_no_torch_and_plots_only_what_is_asked(tmp_path: Path):
    run = make(tmp_path / "run")
    code = (
        "import sys; sys.argv = ['dist_train', 'report', sys.argv[1]]; from dist_train import __main__\n"
        "from dist_train.ranks import ending\n"
        "ending.leave = lambda code: print(code, sorted({'torch', 'matplotlib', 'pandas'} & sys.modules.keys()))\n"
        "__main__.main()"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"report of 1 run: {run / 'report.html'}", "0 []"]


def test_the_pictures(tmp_path: Path, capsys: pytest.CaptureFixture):
    folders = [make(tmp_path / "a"), make(tmp_path / "b$x_{", loss=2.0)]
    long = [line for line in lines() if "train/loss" in line]
    long[3]["train/loss"] = float("nan")
    write_lines(folders[1], long)
    argv = [*map(str, folders), "-o", str(tmp_path / "page.html"), "--png", str(tmp_path / "plots")]
    assert report.run(argv, Launcher()) == 0
    own = [f"{kind}-{run}" for kind in ("confusion", "ranks", "worst") for run in ("a", "b$x_{")]
    expected = sorted([*own, "loss", "accuracy", "lr", "grad_norm", "samples_per_s", "timeline"])
    assert sorted(path.stem for path in (tmp_path / "plots").iterdir()) == expected
    for path in (tmp_path / "plots").iterdir():
        with Image.open(path) as image:
            assert image.size[0] == 1280 and len(set(image.convert("L").resize((80, 60)).tobytes())) > 10, path
    assert f"{len(expected)} plots" in capsys.readouterr().out


def test_a_plot_of_any_curves_is_drawn_as_it_is_given():
    steps = np.arange(5.0)

    def pixels(y: np.ndarray) -> bytes:
        return png.png(Lines("speed", "Speed", "ranks", "samples/s", [Curve("ddp", steps, y)]))

    assert pixels(steps) == pixels(steps) != pixels(steps**2)


@pytest.mark.parametrize(
    ("shape", "size", "mode"),
    [
        ((1, 28, 20), (20, 28), "L"), ((3, 8, 9), (9, 8), "RGB"), ((28, 20), (20, 28), "L"), ((36,), (36, 1), "L"),
        ((5, 4, 4), (4, 4), "L"), ((3, 448, 448), (224, 224), "RGB"),
    ],
)  # fmt: skip
def test_samples_of_any_shape_are_pictures(shape: tuple[int, ...], size: tuple[int, int], mode: str):
    image = picture(np.full(shape, 7, np.uint8))
    assert (image.size, image.mode) == (size, mode) and set(image.convert("L").tobytes()) == {7}


def test_large_confusion_matrices_and_equal_names(tmp_path: Path):
    run = make(tmp_path / "run")
    write_evaluation(run, tuple("same" for _ in range(300)))
    (confusion,) = [panel for panel in panels(read.read([run])) if panel.key == "confusion"]
    assert np.allclose(confusion.shares().sum(1), 1)
    assert report.run([str(run)], Launcher()) == 0
    assert "same (299)" in (run / "report.html").read_text() and png.png(confusion)


def test_runs_lists_them_newest_first(tmp_path: Path, capsys: pytest.CaptureFixture):
    made = [make(tmp_path / "old"), make(tmp_path / "sweep/1", finished=False), make(tmp_path / "sweep/2")]
    (made[2] / "summary.json").write_text('{"status": "preempted", "steps": 40, "by": "SIGTERM"}')
    for age, folder in enumerate(reversed(made)):
        os.utime(folder / "metrics.jsonl", (2e9 - age, 2e9 - age))
    (tmp_path / "no run").mkdir()
    make(made[0] / "checkpoints/looks-like-a-run")
    assert runs.run([str(tmp_path)], Launcher()) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split()[:4] == ["run", "status", "backend", "steps"]
    assert [row.split()[:2] for row in rows] == [
        ["sweep/2", "preempted"],
        ["sweep/1", "unfinished"],
        ["old", "finished"],
    ]
    assert all("ddp x 2" in row and " 40/40 " in row and "accuracy 54.00% at 40" in row for row in rows)
    assert runs.run([str(tmp_path), "--json"], Launcher()) == 0
    first = json.loads(capsys.readouterr().out)[0]
    assert (first["metric"], first["best"], first["best_step"]) == ("eval/accuracy", 0.54, 40)
    assert first["loss"] == lines()[-3]["train/loss"]


ERRORS = {"mae": lambda step: abs(step - 20) / 10, "r2": lambda step: step / 100, "loss": lambda step: 1 / step}


def test_the_best_of_a_metric_is_its_least_where_less_is_better(tmp_path: Path, capsys: pytest.CaptureFixture):
    run, found = make(tmp_path / "run", finished=False), lines()
    measured(found, "eval/mae", ["loss", "mae"], [], **ERRORS)
    write_lines(run, found)
    (one,) = read.read([run])
    assert one.metrics == ["eval/mae", "eval/r2", "eval/loss"] and one.unit == "pixels"
    cells = {row.key: (row.label, row.cells[0].text, row.cells[0].detail) for row in rows([one])}
    assert cells["best_mae"] == ("Best mae", "0", "at step 20") and cells["mae"][1] == "2"
    assert cells["best_r2"] == ("Best r2", "0.4", "at step 40") and "best_accuracy" not in cells
    assert headlines(one) == ["best_mae", "eval_loss", "steps", "train_s", "pixels_per_s"]
    assert [panel.key for panel in panels([one])][:3] == ["loss", "mae", "r2"]
    assert panels([one])[0].y_label == "loss, mean over pixels" and not panels([one])[2].percent
    assert runs.run([str(tmp_path)], Launcher()) == 0
    assert " mae 0 at 20 " in capsys.readouterr().out


def test_several_test_splits_and_parts_of_a_metric_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture):
    folders = [make(tmp_path / name, finished=False) for name in ("one", "two")]
    for i, folder in enumerate(folders):
        found = lines()
        of = {"day__f1": lambda step, i=i: step / 50 - i / 10, "night__f1": lambda _: 0.25}
        of |= {"day__f1__micro": lambda _: 0.5, "day__loss": lambda step: 4 / step, "night__loss": lambda _: 3.0}
        measured(found, "eval/day/f1", ["loss"], ["day", "night"], **of)
        write_lines(folder, found)
    both = read.read(folders)
    table = {row.key: row for row in rows(both)}
    assert table["best_day/f1"].label == "Best f1 of day" and table["best_night/loss"].label.endswith("loss of night")
    assert [(cell.text, cell.best) for cell in table["best_day/f1"].cells] == [("80.00%", True), ("70.00%", False)]
    loss, f1, *_ = panels(both)
    assert [curve.label for curve in loss.curves if "one" in curve.label] == [
        "one, train", "one, evaluation, day", "one, evaluation, night",
    ]  # fmt: skip
    labels = {"one, day", "one, day, micro", "one, night"}
    assert f1.key == "f1" and f1.percent and {curve.label for curve in f1.curves if "one" in curve.label} == labels
    assert runs.run([str(tmp_path)], Launcher()) == 0
    assert "day/f1 80.00% at 40" in capsys.readouterr().out


def test_numbers_that_the_users_code_logs_are_drawn(tmp_path: Path):
    run, found = make(tmp_path / "run", finished=False), lines()
    for line in found:
        if "train/loss" in line:
            line |= {"train/d_loss": 1.5, "gan/score": 2.0, "straggler/rank": 1, "lr": 3}
    write_lines(run, found)
    keys = {panel.key for panel in panels(read.read([run]))}
    assert {"train-d_loss", "gan-score"} <= keys and not {"straggler-rank"} & keys


def test_what_other_tasks_leave_is_drawn_and_a_damaged_file_is_told_of(tmp_path: Path, capsys: pytest.CaptureFixture):
    run = make(tmp_path / "run", finished=False)
    write_predictions(run, 2)
    write_masks(run)
    assert report.run([str(run), "--png", str(tmp_path / "plots")], Launcher()) == 0
    for key in ("predicted-0", "predicted-1", "worst", "masks"):
        with Image.open(tmp_path / f"plots/{key}.png") as image:
            assert image.size[0] == 1280 and len(set(image.convert("L").resize((80, 60)).tobytes())) > 10, key
    for name in ("predictions.npz", "masks.npz", "panels.json"):
        (run / name).write_bytes(b"PK\3\4 cut off")
    (one,) = read.read([run])
    assert [problem.split()[0] for problem in one.problems] == ["panels.json", "predictions.npz", "masks.npz"]
    assert report.run([str(run)], Launcher()) == 0


def test_runs_reads_only_what_it_needs(tmp_path: Path, capsys: pytest.CaptureFixture):
    run = make(tmp_path / "run", finished=False)
    found = lines(30_000)
    found[len(found) // 2]["eval/accuracy"] = 0.99  # of many megabytes
    write_lines(run, found)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99999999, "train/lo')
    before = os.times().user
    assert runs.run([str(tmp_path)], Launcher()) == 0
    assert os.times().user - before < 0.5
    row = capsys.readouterr().out.splitlines()[1]
    assert "99.00% at 15000" in row and " 30000/40 " in row


def test_runs_of_an_empty_folder(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert runs.run([str(tmp_path)], Launcher()) == 0
    assert capsys.readouterr().out == f"no runs in {tmp_path}\n"
    done = command("runs", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("dist_train: command line: got runs, which is no folder")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.02, "20 ms"), (59.9, "59.9 s"), (59.97, "1m 00s"), (125, "2m 05s"), (3599.7, "1h 00m"), (4020, "1h 07m"),
        (86400 * 3 + 4 * 3600, "3d 04h"), (86399, "1d 00h"),
    ],
)  # fmt: skip
def test_durations(seconds: float, text: str):
    assert duration(seconds) == text


def test_numbers():
    assert [number(v) for v in (18780.4, 0.38049, 1e-5, 40, float("nan"))] == ["18,780", "0.3805", "1e-05", "40", "nan"]
