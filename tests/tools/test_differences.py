"""A checkpoint of another run is refused with a line for each difference; harmless ones pass by name."""

import dataclasses
from pathlib import Path

import pytest

from dist_train.config.tree import Config, DataConfig
from dist_train.errors import ConfigError

from parity_cells import config
from resume_cells import run_once, saving


def cell(**changes) -> Config:
    """The config with fields changed, as `section__key=value`."""
    out = config("single", "AdamW")
    for path, value in changes.items():
        section, key = path.split("__")
        out = dataclasses.replace(out, **{section: dataclasses.replace(getattr(out, section), **{key: value})})
    return out


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("differences")
    run_once(saving(cell(), folder), 7)
    return folder


def refused(changed: Config, cut: Path, folder: Path, allow: list[str]) -> tuple[str, ...]:
    """What a resume under the changed config says; nothing if it trains."""
    try:
        run_once(saving(changed, folder, resume=str(cut), allow=allow))
    except ConfigError as error:
        return error.lines
    return ()


SYNTHETIC = {"n": 131, "n_test": 101, "shape": (1, 6, 6), "noise": 0.7}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model__hidden": [50, 40]}, ["model: got layers.3.weight [40, 50], expected [30, 50]"]),
        (
            {"model__hidden": [50]},
            ["model: got layers.3.weight [10, 50], expected [30, 50]", "got layers.5.bias nothing"],
        ),
        ({"train__global_batch_size": 32}, ["train.global_batch_size: got 32, expected 64"]),
        ({"train__drop_last": True}, ["train.drop_last: got True, expected False"]),
        ({"optim__name": "Adam"}, ["optim.name: got Adam, expected AdamW"]),
        (
            {"data__args": SYNTHETIC | {"n": 130}, "train__seed": 3},
            ["data: training samples: got 130, expected 131", "train.seed: got 3, expected 0"],
        ),
    ],
)
def test_another_run_is_refused_whatever_is_allowed(changes: dict, said: list[str], cut: Path, tmp_path: Path):
    lines = refused(cell(**changes), cut, tmp_path, [])
    for expected in said:
        assert any(expected in line and "step-00000005" in line for line in lines), lines
    assert refused(cell(**changes), cut, tmp_path / "again", ["train.seed", "data"])


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"data__args": SYNTHETIC | {"noise": 0.8}}, "data"),
        ({"train__seed": 1}, "train.seed"),
        ({"optim__lr": 0.1}, "optim.lr"),
        ({"optim__schedule": "linear"}, "optim.schedule"),
        ({"model__activation": "ReLU"}, "model.activation"),
        ({"train__precision": "float64"}, "train.precision"),
    ],
)
def test_a_harmless_difference_passes_by_name(changes: dict, name: str, cut: Path, tmp_path: Path):
    lines = refused(cell(**changes), cut, tmp_path / "a", [])
    needed = [line.split(":")[0] for line in lines]
    assert name in needed and all(f"--checkpoint.allow '[{', '.join(needed)}]'" in line for line in lines)
    assert refused(cell(**changes), cut, tmp_path / "b", needed) == ()


def test_a_longer_run_goes_on_where_the_schedule_does_not_depend_on_it(cut: Path, tmp_path: Path):
    assert refused(cell(train__max_steps=30, train__epochs=30), cut, tmp_path / "a", []) == ()
    run_once(saving(cell(optim__schedule="linear"), tmp_path / "linear"), 7)
    longer = cell(optim__schedule="linear", train__max_steps=30)
    (line,) = refused(longer, tmp_path / "linear", tmp_path / "b", [])
    assert line.startswith("train.max_steps: got 30, expected 24")


def test_where_data_lie_does_not_matter(cut: Path, tmp_path: Path):
    moved = dataclasses.replace(cell(), data=DataConfig(name="synthetic", root="elsewhere", args=SYNTHETIC))
    assert refused(moved, cut, tmp_path, []) == ()
