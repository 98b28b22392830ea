"""Panels of the user's own: what is in their file, and how one that is none is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dist_train.config.tree import Config, DataConfig, ModelConfig, TaskConfig, TrainConfig
from dist_train.errors import ConfigError, OwnCodeError
from dist_train.run import assemble
from dist_train.tasks.panels import NAME, Plot, Table, encoded, read, write

from zygote import Run, Zygote


def cell(**args) -> Config:
    return Config(
        data=DataConfig(name="user_tasks:classed"), task=TaskConfig("user_tasks:Shown", args=args),
        model=ModelConfig(hidden=[4]), train=TrainConfig(device="cpu"),
    )  # fmt: skip


def test_what_is_written_is_read(tmp_path: Path):
    rows = [["a <b>", 1, 0.5], [None, np.int64(3), torch.tensor(0.25)], ["", float("nan"), True]]
    figure = {"data": [{"y": np.array([1.0, np.nan]), "x": torch.arange(2)}], "layout": {"title": None, "height": 300}}
    write(tmp_path, encoded([Table("T", ("x", "y", "z"), rows, "note"), Plot("P", figure)]))
    table, plot = read(tmp_path)
    assert table == Table("T", ["x", "y", "z"], [["a <b>", 1, 0.5], [None, 3, 0.25], ["", "nan", True]], "note")
    assert plot.figure == {"data": [{"y": [1.0, None], "x": [0, 1]}], "layout": {"height": 300}}
    assert read(tmp_path / "nowhere") == []


def test_a_figure_of_plotly_is_taken_as_it_is():
    objects = pytest.importorskip("plotly.graph_objects")
    figure = objects.Figure(objects.Scatter(x=[1, 2], y=[3.0, 4.0]))
    (found,) = encoded([Plot("P", figure)]).values()
    assert found["data"][0]["type"] == "scatter" and found["data"][0]["x"] == [1, 2]


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"panels": [{"kind": "table"}]}',
        '{"panels": [{"kind": "plot", "title": "a", "note": "", "data": 1, "layout": {}}]}',
    ],
)
def test_a_damaged_file_is_an_error(text: str, tmp_path: Path):
    (tmp_path / NAME).write_text(text)
    with pytest.raises(ValueError):
        read(tmp_path)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("no list", "whose panels are NoneType, expected a list"), ("no panel", "got a panel of type list"),
        ("no figure", "got int as the figure of the plot 'bars'"), ("no traces", "without a list of traces"),
        ("an object", "cannot be written as JSON: Shown is no number"), ("short rows", "got a row of 1 cells"),
        ("a cell", "got a cell of type Tensor in the table 't'"), ("twice", "two panels with the title"),
        ("no title", "got '' as the title"),
    ],
)  # fmt: skip
def test_what_is_no_panel_is_told_before_any_rank_is_joined(what: str, said: str):
    with pytest.raises(ConfigError) as error:
        assemble.build(cell(what=what), torch.device("cpu"))
    assert len(error.value.lines) == 1 and said in str(error.value)
    assert str(error.value).startswith("task.name: ") and "user_tasks:Shown" in str(error.value)


def test_what_its_code_raises_is_shown_with_its_file_and_line():
    with pytest.raises(OwnCodeError) as error:
        assemble.build(cell(what="raises"), torch.device("cpu"))
    assert "asked for its panels" in error.value.lines[0] and "user_tasks.py" in str(error.value)


def test_a_table_too_long_and_a_figure_too_large_are_refused():
    with pytest.raises(ValueError, match="expected at most 2,000"):
        encoded([Table("t", ["a"], [[i] for i in range(2001)])])
    with pytest.raises(ValueError, match="draw fewer points"):
        encoded([Plot("p", {"data": [{"y": np.random.default_rng(0).random(1_000_000)}]})])


HIDDEN = ("--model.hidden", "[4]")
ARGV = (
    *("--data.name", "user_tasks:classed", "--data.args", "{n_test: 11}", "--task.name", "user_tasks:Shown"),
    *("--train.epochs", "2", "--train.global_batch_size", "8", "--train.device", "cpu"),
)


def test_a_run_leaves_those_of_its_task_and_of_its_hooks(zygote: Zygote, tmp_path: Path):
    found = {}
    for ranks in (1, 2, 3):
        folder = tmp_path / str(ranks)
        argv = [*ARGV, *HIDDEN, "--train.hooks", "[user_hooks:Showing]", "--run.dir", str(folder)]
        zygote.run(Run(argv, ranks))[0].check()
        steps, table, bars = read(folder)
        assert steps == Table("Steps", ["rank", "step"], [[0, 4]])
        found[ranks] = table, bars
    assert found[1] == found[2] == found[3]
    table, bars = found[1]
    assert [row[0] for row in table.rows] == list("abcd") and sum(row[1] for row in table.rows) == 11
    assert bars.figure["data"][0]["y"] == [row[1] for row in table.rows]


def test_a_hook_that_shows_no_panel_is_named(zygote: Zygote, tmp_path: Path):
    hooks = "[{name: user_hooks:Showing, wrong: true}]"
    (ended,) = zygote.run(Run([*ARGV, *HIDDEN, "--train.hooks", hooks, "--run.dir", str(tmp_path / "run")]))
    assert ended.codes == [1] and "got a panel of type str" in ended.err[0] and "user_hooks.py" in ended.err[0]


# -- a line before training --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("outputs", "said"), [(6, True), (4, False)])
def test_more_outputs_than_classes_are_told_of(outputs: int, said: bool, zygote: Zygote, tmp_path: Path):
    more = [
        "--task.name",
        "classification",
        "--model.name",
        "user_tasks:Wide",
        "--model.args",
        f"{{outputs: {outputs}}}",
    ]
    (ended,) = zygote.run(Run([*ARGV, *more, "--run.dir", str(tmp_path / "run")]))
    ended.check()
    assert ended.out[0].count("model: gives 6 outputs for 4 classes, so that those after number 3") == said
    recorded = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert recorded[0]["best_metric"] == "eval/accuracy" and recorded[0]["unit"] == "samples"
