"""Configs that are refused, each with its line; YAML's traps; what wins over what; a config read back equal."""

import dataclasses
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dist_train.config.load import dump, load
from dist_train.config.tree import Config, DataConfig, OptimConfig, fields_of
from dist_train.errors import ConfigError
from dist_train.ranks.launcher import Launcher
from dist_train.run.check import check


class Bad(NamedTuple):
    """A config that is refused: with a line that begins with `path` and holds every one of `words`.

    Args:
        path: the config path that the line names.
        words: what was got, what is expected, how to mend it.
        argv: words of the command line, split at spaces if it is one text.
        file: contents of a file given as --config f.yaml.
        ranks: how many torchrun started; 0 for a process alone.
    """

    path: str
    words: tuple[str, ...]
    argv: str | list[str] = ""
    file: str | bytes | None = None
    ranks: int = 0


SECTIONS = "run, data, model, task, optim, train, backend, compile, checkpoint, track"

BAD = [
    # names
    Bad(
        "train",
        ("unknown key 'epoch'", "expected one of epochs, max_steps,", "did you mean epochs?"),
        "--train.epoch 3",
    ),
    Bad("train", ("unknown key 'max-steps'", "did you mean max_steps?"), "--train.max-steps 3"),
    Bad("train", ("unknown key 'epochs.x'", "did you mean epochs?"), "--train.epochs.x 3"),
    Bad("model", ("unknown key 'hidden+'", "did you mean hidden?"), "--model.hidden+=3"),
    Bad("train", ("got --train", "expected --train.KEY", "epochs, max_steps"), "--train other.yaml"),
    Bad(
        "command line",
        ("unknown key '--trian.epochs'", "--run, --data", "did you mean --train.epochs?"),
        "--trian.epochs 3",
    ),
    Bad("command line", ("unknown key '--lr'", "one of --run, --data", "did you mean --optim.lr?"), "--lr 0.1"),
    Bad(
        "command line",
        ("got 'digits'", "expected --section.key value, or --config FILE.yaml"),
        "--train.epochs 3 digits",
    ),
    Bad("command line", ("got '-x'", "expected --section.key value"), "-x"),
    Bad("command line", ("got --print_config with a value", "alone"), "--print_config=x"),
    Bad(
        "f.yaml",
        ("unknown section 'trian'", f"expected one of {SECTIONS}", "did you mean train?"),
        file="trian: {epochs: 3}",
    ),
    Bad("f.yaml", ("unknown section 'train.epochs'", SECTIONS), file="train.epochs: 3"),
    Bad("f.yaml", ("unknown section 'config'", SECTIONS), file="config: other.yaml"),
    Bad("optim in f.yaml", ("unknown key 'learning_rate'", "name, lr, weight_decay"), file="optim: {learning_rate: 1}"),
    Bad("train in f.yaml", ("unknown key 'class_path'", "epochs"), file="train: {class_path: os.system}"),
    Bad("train in f.yaml", ("unknown key '1'", "epochs"), file="train: {1: 2}"),
    # types, one for each kind
    Bad("train.epochs", ("got 'ten', expected an integer", "--train.epochs 10"), "--train.epochs ten"),
    Bad("train.epochs", ("got 2.5 in f.yaml, expected an integer",), file="train: {epochs: 2.5}"),
    Bad("train.epochs", ("got true in f.yaml, expected an integer",), file="train: {epochs: true}"),
    Bad("train.epochs", ("got null in f.yaml, expected an integer", "--train.epochs 10"), file="train: {epochs: null}"),
    Bad("train.epochs", ("got no value, expected an integer", "--train.epochs 10"), "--train.epochs"),
    Bad("train.epochs", ("got no value, expected an integer",), "--train.epochs --optim.lr 0.1"),
    Bad("train.epochs", ("got '', expected an integer",), "--train.epochs="),
    Bad(
        "train.max_steps", ("got 'many', expected an integer or null", "--train.max_steps 10"), "--train.max_steps many"
    ),
    Bad("optim.lr", ("got 'fast', expected a number", "--optim.lr 0.1"), "--optim.lr fast"),
    Bad("optim.lr", ("got true in f.yaml, expected a number",), file="optim: {lr: true}"),
    Bad("optim.lr", ("got {'a': 1} in f.yaml, expected a number",), file="optim: {lr: {a: 1}}"),
    Bad("optim.lr", ("got null, expected a number",), "--optim.lr null"),
    Bad("optim.lr", ("got 1000000", "0... in f.yaml, expected a number"), file=f"optim: {{lr: 1{400 * '0'}}}"),
    Bad("optim.lr", ("got 1000000", "0..., expected a number"), f"--optim.lr 1{400 * '0'}"),
    Bad("train.epochs", ("got '3' in f.yaml, expected an integer",), file="train: {epochs: '3'}"),
    Bad(
        "train.drop_last",
        ("got 1 in f.yaml, expected true or false", "--train.drop_last true"),
        file="train: {drop_last: 1}",
    ),
    Bad("data.root", ("got ['a'] in f.yaml, expected text",), file="data: {root: [a]}"),
    Bad(
        "task.loss",
        ("got unknown loss 'l2'", "expected one of cross_entropy, nll, mse"),
        "--task.loss l2",
    ),
    Bad("optim.schedule", ("unknown schedule 'cosin'", "did you mean cosine?"), file="optim: {schedule: cosin}"),
    Bad("optim.groups", ("got {'match': 'a'} in f.yaml, expected a list",), file="optim: {groups: {match: a}}"),
    Bad("optim.groups", ("got [3], expected a list such as [{match",), "--optim.groups [3]"),
    Bad("optim.groups", ("got [{1: 2}] in f.yaml, expected a list",), file="optim: {groups: [{1: 2}]}"),
    Bad("optim.groups[0]", ("got {'lr': 0.1}, expected a pattern",), file="optim: {groups: [{lr: 0.1}]}"),
    Bad(
        "optim.groups[0]",
        ("unknown argument of torch.optim.AdamW 'momentum'", "match, lr, betas, eps"),
        file="optim: {groups: [{match: a, momentum: 0.1}]}",
    ),
    Bad(
        "optim.groups[0]",
        (
            "unknown argument of Muon and AdamW both; with optimizer: Muon",
            "'ns_steps', expected one of match, optimizer",
        ),
        file="optim: {name: Muon, groups: [{match: a, ns_steps: 3}]}",
    ),
    Bad(
        "optim.groups[0]",
        ("unknown argument of AdamW 'momentum', expected one of match, optimizer, lr, betas, eps, weight_decay",),
        file="optim: {name: Muon, groups: [{match: a, optimizer: AdamW, momentum: 0.9}]}",
    ),
    Bad(
        "optim.groups[0].optimizer",
        ("unknown optimizer 'muon', expected one of Muon, AdamW; did you mean Muon?",),
        file="optim: {name: Muon, groups: [{match: a, optimizer: muon}]}",
    ),
    Bad(
        "optim.args.adamw", ("unknown argument of AdamW 'beta'",), file="optim: {name: Muon, args: {adamw: {beta: 1}}}"
    ),
    Bad("optim.args.adamw", ("got 3, expected arguments of AdamW",), file="optim: {name: Muon, args: {adamw: 3}}"),
    Bad(
        "optim.args.adamw.lr",
        ("got -1, expected a finite number of 0 or more",),
        file="optim: {name: Muon, args: {adamw: {lr: -1}}}",
    ),
    Bad("optim.args", ("unknown argument of Muon 'optimizer'",), file="optim: {name: Muon, args: {optimizer: AdamW}}"),
    Bad("optim.groups[0].lr", ("got -1, expected a finite number",), file="optim: {groups: [{match: a, lr: -1}]}"),
    Bad(
        "optim.groups[0].fused",
        ("which is for all parameters; write --optim.args.fused",),
        file="optim: {groups: [{match: a, fused: true}]}",
    ),
    Bad(
        "optim.groups[0].lr",
        ("got 1 with optim.lr 0", "match: '*', lr: 0.0"),
        file="optim: {lr: 0, groups: [{match: a, lr: 1}]}",
    ),
    Bad("optim.no_decay", ("torch.optim.Rprop has no weight_decay",), "--optim.name Rprop --optim.no_decay true"),
    Bad("optim.ema", ("got 1.0, expected 0 or more and below 1", "0.999"), "--optim.ema 1"),
    Bad("optim.ema_start", ("got 5 without optim.ema",), "--optim.ema_start 5"),
    Bad("optim.ema_start", ("less than train.max_steps",), "--optim.ema 0.9 --optim.ema_start 8 --train.max_steps 8"),
    Bad("optim.decay_steps", ("got nothing, expected it or optim.decay_share",), "--optim.schedule wsd"),
    Bad(
        "optim.decay_steps",
        ("got 3 and optim.decay_share 0.1",),
        "--optim.schedule wsd --optim.decay_steps 3 --optim.decay_share 0.1",
    ),
    Bad("optim.decay_share", ("got 1.5, expected 0 or more",), "--optim.schedule wsd --optim.decay_share 1.5"),
    Bad("optim.power", ("got nothing", "schedule polynomial needs it"), "--optim.schedule polynomial"),
    Bad("optim.restart_steps", ("got nothing", "cosine_restarts needs it"), "--optim.schedule cosine_restarts"),
    Bad(
        "optim.warmup_share",
        ("got 0.1 with optim.warmup_steps 3, expected one of them",),
        "--optim.warmup_share 0.1 --optim.warmup_steps 3",
    ),
    Bad("model.hidden", ("got 32, expected a list such as [512, 512]", "or null"), "--model.hidden 32"),
    Bad("model.hidden", ("got [1.5] in f.yaml, expected a list", "an integer each"), file="model: {hidden: [1.5]}"),
    Bad("data.args", ("got 'n' in f.yaml, expected keys with values", "'{key: 1}'"), file="data: {args: n}"),
    Bad("data.args", ("got 3, expected keys with values",), "--data.args 3"),
    Bad("track.profile", ("got 5, expected keys with values", "'{start_step: 10, steps: 5}'"), "--track.profile 5"),
    Bad("track.profile", ("got --track.profile.a.b", "--track.profile.a '{b: VALUE}'"), "--track.profile.a.b 3"),
    Bad("track.profile", ("unknown key 'step'", "start_step, steps", "mean steps?"), "--track.profile.step 3"),
    Bad(
        "track.profile.steps",
        ("got 0, expected an integer of at least 1; for example --track.profile.steps 5",),
        "--track.profile.steps 0",
    ),
    Bad("track.profile.start_step", ("got True, expected an integer",), file="track: {profile: {start_step: true}}"),
    Bad("track.profile.steps", ("got 'few', expected an integer",), "--track.profile.steps few"),
    Bad(
        "track.profile",
        ("got steps 10 to 14, expected them within train.max_steps, which is 12", "'{start_step: 8, steps: 5}'"),
        "--train.max_steps 12 --track.profile.start_step 10",
    ),
    Bad("train", ("unknown key 'epochs.x'",), "--train.epochs.x=3"),
    Bad("optim.args", ("got --optim.args.a.b", "write --optim.args.a '{b: VALUE}'"), "--optim.args.a.b 3"),
    # files
    Bad("--config", ("got 'nope.yaml'", "expected a YAML file that can be read", "No such file"), "--config nope.yaml"),
    Bad("--config", ("got '.'", "expected a YAML file that can be read", "directory"), "--config=."),
    Bad("--config", ("got no value, expected a YAML file; write --config FILE.yaml",), "--config"),
    Bad("--config", ("got f.yaml, expected valid YAML", "line 1, column 8"), file="train: [1\n"),
    Bad("--config", ("expected valid YAML", r"'\t' that cannot start any token line 2"), file="train:\n\tepochs: 1\n"),
    Bad("--config", ("expected valid YAML", "but found another document"), file="train: {}\n---\nrun: {}\n"),
    Bad("--config", ("expected valid YAML", "the key 'epochs' stands twice"), file="train: {epochs: 1, epochs: 2}"),
    Bad(
        "--config", ("expected valid YAML", "the key 'train' stands twice"), file="train: {seed: 1}\ntrain: {epochs: 2}"
    ),
    Bad("--config", ("expected valid YAML", "stands twice"), file="data: {args: {n: 1, n: 2}}"),
    Bad("--config", ("expected valid YAML", "holds itself"), file="data: {args: &a {n: *a}}"),
    Bad("--config", ("expected valid YAML", "found unhashable key"), file="{a: b}: 2"),
    Bad("--config", ("expected valid YAML", "constructor"), file="data: {root: !!python/name:os.system x}"),
    Bad("--config", ("expected valid YAML", "'utf-8' codec can't decode"), file=b"run: {name: \xff}"),
    Bad("--config", ("expected valid YAML", "special characters"), file=b"run\0"),
    Bad("--config", ("got f.yaml with ['a']", "expected sections such as train:"), file="- a\n"),
    Bad("--config", ("got f.yaml with 'epochs 3'", "expected sections"), file="epochs 3\n"),
    Bad("train", ("got 'other.yaml' in f.yaml, expected keys below it: epochs,",), file="train: other.yaml"),
    # ranges
    Bad("train.epochs", ("got 0, expected at least 1", "--train.epochs 1"), "--train.epochs 0"),
    Bad("train.seed", ("got -1, expected at least 0",), "--train.seed -1"),
    Bad("train.seed", ("expected less than 2**63",), f"--train.seed {2**63}"),
    Bad("track.every_steps", ("got 0, expected at least 1",), "--track.every_steps 0"),
    Bad("track.wandb_project", ("got 'mine' with track.wandb false; add --track",), "--track.wandb_project mine"),
    Bad("track.wandb_tags", ("got ['a'] with track.wandb false",), ["--track.wandb_tags", "[a]"]),
    Bad("track.wandb_mode", ("got 'offline' with track.wandb false",), "--track.wandb_mode offline"),
    Bad("track.wandb_mode", ("got 'shared', expected one of auto, online",), "--track.wandb_mode shared"),
    Bad("track.wandb_project", ("got 'a/b', expected 1 to 128",), "--track.wandb true --track.wandb_project a/b"),
    Bad("track.wandb_id", ("got 'a:b'", "none of them of"), "--track.wandb true --track.wandb_id a:b"),
    Bad("track.wandb_tags", ("got '', expected tags of 1",), ["--track.wandb", "true", "--track.wandb_tags", "['']"]),
    Bad("train.eval_every_epochs", ("got 0, expected at least 1",), "--train.eval_every_epochs 0"),
    Bad("data.workers", ("got -1, expected at least 0",), "--data.workers -1"),
    Bad("optim.lr", ("got -0.001, expected a finite number of 0 or more", "--optim.lr 0.1"), "--optim.lr -1e-3"),
    Bad("optim.lr", ("got nan, expected a finite number",), file="optim: {lr: .nan}"),
    Bad("optim.lr", ("got 'nan', expected a number",), "--optim.lr nan"),
    Bad("optim.lr", ("got inf, expected a finite number",), "--optim.lr 1e999"),
    Bad("optim.weight_decay", ("got -1.0, expected a finite number",), "--optim.weight_decay=-1"),
    Bad("train.grad_clip", ("got 0.0, expected a finite number above 0; null turns it off",), "--train.grad_clip 0"),
    Bad("train.grad_clip", ("got inf, expected a finite number",), file="train: {grad_clip: .inf}"),
    Bad("task.args.label_smoothing", ("got 1, expected 0 or more and below 1",), "--task.args.label_smoothing 1"),
    Bad("model.dropout", ("got nan, expected 0 or more and below 1",), file="model: {dropout: .nan}"),
    Bad("model.hidden", ("got [8, 0], expected sizes of at least 1",), "--model.hidden [8,0]"),
    # sizes
    Bad("train.micro_batch_size", ("got 65, expected at most", "which is 64"), "--train.micro_batch_size 65"),
    # contradictions
    Bad("task.loss", ("got mse with data.one_hot false", "add --data.one_hot true"), "--task.loss mse"),
    Bad("task.loss", ("got nll with data.one_hot true", "--data.one_hot false"), "--task.loss nll --data.one_hot true"),
    Bad(
        "task.args.label_smoothing", ("got 0.1 with task.loss nll",), "--task.loss nll --task.args.label_smoothing 0.1"
    ),
    Bad("train.loss", ("train.loss is now task.loss; write --task.loss VALUE",), "--train.loss mse"),
    Bad(
        "train in f.yaml",
        ("train.label_smoothing is now task.args.label_smoothing",),
        file="train: {label_smoothing: 0.1}",
    ),
    Bad("optim.gamma", ("got nothing", "schedule step needs it"), "--optim.schedule step --optim.step_size 5"),
    Bad("optim.step_size", ("got nothing", "schedule step needs it"), "--optim.schedule step --optim.gamma 0.5"),
    Bad("optim.gamma", ("got 0.5 with optim.schedule constant", "leave it out"), "--optim.gamma 0.5"),
    Bad("optim.step_size", ("got 5 with optim.schedule cosine",), "--optim.schedule cosine --optim.step_size 5"),
    Bad("optim.lr_final", ("got 0.1 with optim.schedule constant",), "--optim.lr_final 0.1"),
    Bad(
        "optim.warmup_steps",
        ("got 9, expected at most train.max_steps", "8"),
        "--optim.warmup_steps 9 --train.max_steps 8",
    ),
    # fields that what was chosen does not have
    Bad("optim.momentum", ("got 0.9", "torch.optim.AdamW does not have it"), "--optim.momentum 0.9"),
    Bad("optim.weight_decay", ("torch.optim.Rprop does not have it",), "--optim.name Rprop --optim.weight_decay 0.1"),
    Bad(
        "optim.args",
        ("unknown argument of torch.optim.SGD 'betas'", "dampening"),
        "--optim.name SGD --optim.args.betas 1",
    ),
    Bad("optim.args", ("'nesterow'", "did you mean nesterov?"), "--optim.name SGD --optim.args.nesterow true"),
    Bad("optim.args.lr", ("got 0.1, expected it as optim.lr; write --optim.lr",), "--optim.args.lr 0.1"),
    Bad("optim.name", ("unknown optimizer 'adamw'", "AdamW", "SGD", "did you mean AdamW?"), "--optim.name adamw"),
    Bad("optim.name", ("got LBFGS", "several times a step", "expected one of"), "--optim.name LBFGS"),
    Bad("data.args.n", ("got 5, but digits does not have it", "no arguments", "leave it out"), "--data.args.n 5"),
    Bad("data.args.size", ("but synthetic does not have it", "n, n_test"), "--data.name synthetic --data.args.size 5"),
    Bad("data.args.root", ("set by the package; leave it out",), "--data.args.root x"),
    Bad("data.workers", ("got 2, expected 0", "digits is held in memory"), "--data.workers 2"),
    Bad("model.args.depth", ("but mlp does not have it", "hidden, activation, dropout"), "--model.args.depth 5"),
    Bad("model.args.hidden", ("expected it as model.hidden; write --model.hidden",), "--model.args.hidden [5]"),
    Bad("data.args.root", ("set by the package; leave it out",), "--data.args.root here"),
    Bad("model.args.classes", ("mlp does not have it; it takes hidden",), "--model.args.classes 5"),
    Bad("backend.zero_stage", ("got 1, but backend single does not have it",), "--backend.zero_stage 1"),
    # names of what can be chosen, and a user's own
    Bad(
        "data.name",
        ("unknown name 'mnits'", "digits, mnist,", "module:name", "did you mean mnist?"),
        "--data.name mnits",
    ),
    Bad("data.name", ("got 'nope:f'", "no module 'nope'", "module:name"), "--data.name nope:f"),
    Bad("data.name", ("got 'mine:absent'", "no 'absent' in ", "mine.py"), "--data.name mine:absent"),
    Bad("data.name", ("got 'broken:f'", "broken.py is not valid Python", "mend the file"), "--data.name broken:f"),
    Bad(
        "data.name",
        ("got 'mine.py:data'", "no module 'mine.py'", "did you mean mine:data?"),
        "--data.name mine.py:data",
    ),
    Bad("data.name", ("got 'mine:date'", "no 'date' in ", "did you mean mine:data?"), "--data.name mine:date"),
    Bad(
        "data.name",
        ("got mine:NUMBER, which is of type int, expected a function or a class",),
        "--data.name mine:NUMBER",
    ),
    Bad("model.name", ("got '__main__:Net'", "known there alone", "a module of its own"), "--model.name __main__:Net"),
    Bad("data.name", ("got ['a'] in f.yaml, expected text",), file="data: {name: [a]}"),
    Bad("data.name", ("unknown name 'true'",), file="data: {name: true}"),
    Bad(
        "data.args.n",
        ("got nothing, expected a value", "mine:data needs it", "--data.args.n VALUE"),
        "--data.name mine:data",
    ),
    Bad("model.name", ("unknown name 'mpl'", "did you mean mlp?"), "--model.name mpl"),
    Bad("model.name", ("got 'mine:Model'", "no 'Model' in "), "--model.name mine:Model"),
    Bad("checkpoint.every_steps", ("got 0, expected at least 1",), "--checkpoint.every_steps 0"),
    Bad("checkpoint.every_s", ("got -1.0, expected a finite number above 0", "null"), "--checkpoint.every_s -1"),
    Bad("checkpoint.keep_last", ("got 0, expected at least 1",), "--checkpoint.keep_last 0"),
    Bad("checkpoint.keep_best", ("got 1, but nothing is saved", "every_epochs 1"), "--checkpoint.keep_best 1"),
    Bad("checkpoint.allow", ("got unknown difference 'seed'", "train.seed"), "--checkpoint.allow [seed]"),
    Bad("checkpoint.resume", ("got done, expected auto, never, or the folder",), "--checkpoint.resume done"),
    Bad("model.hidden", ("mine:Linear does not have it", "bias"), "--model.name mine:Linear --model.hidden [5]"),
    Bad("compile.mode", ("got 'on', expected one of off",), "--compile.mode on"),
    # backend and launcher
    Bad("backend.name", ("unknown backend 'dpp'", "auto, single, ddp", "did you mean ddp?"), "--backend.name dpp"),
    Bad("backend.name", ("got single on 4 ranks", "--backend.name ddp"), "--backend.name single", ranks=4),
    Bad("backend.name", ("got ddp in a process that was started alone", "torchrun"), "--backend.name ddp"),
    # the run's folder
    Bad("run.dir", ("done, which holds a finished run", "--run.dir done-2"), "--run.dir done"),
    Bad("run.name", ("done, which holds a finished run", "--run.name done-2"), "--run.dir . --run.name done"),
    Bad("run.dir", ("f.txt is a file", "expected a folder", "--run.dir runs/new"), "--run.dir f.txt"),
    Bad("run.dir", ("f.txt is a file", "expected a folder"), "--run.dir f.txt/below"),
    Bad("run.dir", ("a folder that cannot be made", "--run.dir runs/new"), ["--run.dir", 300 * "a"]),
    Bad("run.dir", ("got '', expected a folder",), "--run.dir="),
    Bad("run.name", ("got 'a/b', expected a plain folder name", "--run.dir"), "--run.name a/b"),
    Bad("run.name", ("got '..', expected a plain folder name",), "--run.name .."),
    Bad("run.name", (r"got 'a\nb', expected a plain folder name",), file='run: {name: "a\\nb"}'),
]

MINE = """
class Plain:
    def __init__(self): pass
class Linear:
    def __init__(self, input_shape, classes, bias=True): pass
def data(root, download, n): pass
NUMBER = 3
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory of a user, with what the bad configs name."""
    (tmp_path / "done").mkdir()
    (tmp_path / "done/summary.json").write_text('{"status": "finished"}')
    (tmp_path / "f.txt").write_text("")
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "raises").mkdir()
    (tmp_path / "raises/__init__.py").write_text("raise RuntimeError('planted')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in ("mine", "raises"):
        sys.modules.pop(name, None)


def words_of(bad: Bad) -> list[str]:
    """The command line of a bad config, whose file stands in the working directory."""
    words = bad.argv.split() if isinstance(bad.argv, str) else bad.argv
    if bad.file is None:
        return words
    Path("f.yaml").write_bytes(bad.file if isinstance(bad.file, bytes) else bad.file.encode())
    return ["--config", "f.yaml", *words]


def launcher_of(ranks: int) -> Launcher:
    return Launcher("torchrun", 0, ranks, 0, ranks) if ranks else Launcher()


def refusal(argv: list[str], ranks: int = 0) -> tuple[str, ...]:
    """The lines with which a command line is refused."""
    with pytest.raises(ConfigError) as caught:
        check(load(argv), launcher_of(ranks))
    return caught.value.lines


def label(bad: Bad) -> str:
    return f"{bad.path} {bad.words[0]}"


@pytest.mark.parametrize("bad", BAD, ids=label)
def test_a_bad_config_gives_one_line_with_the_path(bad: Bad, place: Path, capfd: pytest.CaptureFixture):
    lines = refusal(words_of(bad), bad.ranks)
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"{bad.path}: ")
    assert [word for word in bad.words if word not in lines[0]] == [], lines[0]
    assert "\n" not in lines[0] and not lines[0].endswith((",", ":"))
    assert capfd.readouterr() == ("", "")


def test_a_package_that_fails_when_it_is_imported(place: Path):
    """It was asked for, though not by its own name: it is no module that is not there."""
    said = refusal(["--data.name", "raises.inner:f"])
    assert (
        said[0]
        == "data.name: got raises.inner:f, and your own code raises an error when it is imported; mend it there:"
    )
    assert said[1:] == (
        f'  File "{place}/raises/__init__.py", line 1, in <module>',
        "    raise RuntimeError('planted')",
        "RuntimeError: planted",
    )


def test_what_another_module_defines_is_found(place: Path):
    (place / "mine.py").write_text(
        "from functools import partial\nfrom other import Net\nhalf = partial(Net, width=2)\n"
    )
    (place / "other.py").write_text(
        "class Net:\n    def __init__(self, input_shape, classes, width, *, depth=1): pass\n"
    )
    check(load(["--model.name", "mine:Net", "--model.args.width", "3"]), Launcher())
    check(load(["--model.name", "mine:half"]), Launcher())
    assert "mine:Net needs it" in refusal(["--model.name", "mine:Net"])[0]
    assert "it takes width, depth" in refusal(["--model.name", "mine:half", "--model.args.heigth", "1"])[0]


def test_the_table_is_large_and_has_no_row_twice():
    assert len({str(bad) for bad in BAD}) == len(BAD) >= 40


def test_every_mistake_gets_a_line(place: Path):
    lines = refusal(["--train.epochs=0", "--optim.name=sgd", "--task.loss=mse", "--run.dir=done"])
    assert [line.split(":")[0] for line in lines] == ["train.epochs", "optim.name", "task.loss", "run.dir"]
    Path("f.yaml").write_text("trian: {}\noptim: {lrr: 1, wd: 2}\n")
    lines = refusal(["--config", "f.yaml"])
    assert [line.split(":")[0] for line in lines] == ["f.yaml", "optim in f.yaml", "optim in f.yaml"]


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_tracker_that_is_not_installed_is_refused(name: str, place: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("dist_train.track.rules.find_spec", lambda package: None)
    install = f"{name} is not installed; pip install 'dist-train[{name}]', or leave it out"
    assert refusal([f"--track.{name}", "true"]) == (f"track.{name}: got true, but {install}",)


def test_a_line_stays_one_line():
    assert ConfigError("train: got 'a\nb'").lines == ("train: got 'a b'",)


# -- the traps of YAML, and the forms of a command line ----------------------------------------------------------------


def value_at(config: Config, path: str) -> Any:
    section, key = path.split(".")
    return getattr(getattr(config, section), key)


@pytest.mark.parametrize(
    ("file", "path", "value"),
    [
        ("compile: {mode: off}", "compile.mode", "off"),  # YAML 1.1 reads off as false
        ("optim: {lr: 1e-3}", "optim.lr", 0.001),  # and 1e-3 as text
        ("optim: {args: {eps: 1e-6}}", "optim.args", {"eps": 1e-6}),
        ("optim: {lr: 1}", "optim.lr", 1.0),
        ("optim: {lr: .5}", "optim.lr", 0.5),
        ("run: {name: 12}", "run.name", "12"),
        ("run: {name: 010}", "run.name", "010"),  # YAML 1.1 reads 8
        ("run: {name: 1e3}", "run.name", "1e3"),
        ("run: {name: yes}", "run.name", "yes"),
        ("run: {name: 2024-01-02}", "run.name", "2024-01-02"),  # a date
        ("run: {name: null}", "run.name", None),
        ("run: {name: 'null'}", "run.name", "null"),
        ("data: {args: {a: '1e-3', b: 'null', c: '[1]'}}", "data.args", {"a": "1e-3", "b": "null", "c": "[1]"}),
        ("data: {args: {a: 2024-01-02, b: 08}}", "data.args", {"a": "2024-01-02", "b": "08"}),
        ("data:\n  args:\n", "data.args", {}),
        ("optim: {groups: [{match: '*.bias', lr: 1e-3}]}", "optim.groups", [{"match": "*.bias", "lr": 0.001}]),
        ("track:\n  profile:\n", "track.profile", {}),
        ("track: {profile: {steps: 3}}", "track.profile", {"steps": 3}),
        ("train:\n", "train.epochs", 20),
        ("", "train.epochs", 20),
        ("# nothing yet\n", "train.epochs", 20),
        ("\ufefftrain: {epochs: 3}\n", "train.epochs", 3),
        ("model: {hidden: []}", "model.hidden", []),
        ("train: {drop_last: yes}", "train.drop_last", True),
        ("train: {drop_last: off}", "train.drop_last", False),
        ("optim: &o {lr: 0.5}\nrun: {}\n", "optim.lr", 0.5),
        ("run: &r {name: a}\ndata: {args: {<<: *r, n: 1}}\n", "data.args", {"name": "a", "n": 1}),
        ("data:\n  <<: {root: here}\n  name: digits\n", "data.root", "here"),
    ],
)
def test_what_a_file_means(file: str, path: str, value: Any, place: Path):
    Path("f.yaml").write_text(file, encoding="utf-8")
    got = value_at(load(["--config", "f.yaml"]), path)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    ("argv", "path", "value"),
    [
        (["--optim.lr", "1e-3"], "optim.lr", 0.001),
        (["--optim.lr=1e-3"], "optim.lr", 0.001),
        (["--optim.lr", "-1e-3"], "optim.lr", -0.001),
        (["--optim.lr", "-.5"], "optim.lr", -0.5),
        (["--train.seed", "-1"], "train.seed", -1),
        (["--train.epochs", "3", "--train.epochs", "4"], "train.epochs", 4),
        (["--compile.mode", "off"], "compile.mode", "off"),
        (["--run.name", "12"], "run.name", "12"),
        (["--run.name", "null"], "run.name", None),
        (["--run.name", "-x"], "run.name", "-x"),
        (["--run.name=--x"], "run.name", "--x"),
        (["--run.name=a=b"], "run.name", "a=b"),
        (["--data.root", "a: b #c"], "data.root", "a: b #c"),
        (["--data.root", "Größe/数 据"], "data.root", "Größe/数 据"),
        (["--train.max_steps", "null"], "train.max_steps", None),
        (["--model.hidden", "[]"], "model.hidden", []),
        (["--model.hidden=[8, 8]"], "model.hidden", [8, 8]),
        (["--optim.args.betas", "[0.9, 0.95]"], "optim.args", {"betas": [0.9, 0.95]}),
        (
            ["--optim.args.betas=[0.9,0.95]", "--optim.args.eps", "1e-6"],
            "optim.args",
            {"betas": [0.9, 0.95], "eps": 1e-6},
        ),
        (["--optim.args", "{eps: 1e-6}"], "optim.args", {"eps": 1e-6}),
        (["--optim.args.eps", "1", "--optim.args", "{amsgrad: true}"], "optim.args", {"amsgrad": True}),
        (
            ["--data.args.a", "x: 1", "--data.args.b", "*.png", "--data.args.c", "#1"],
            "data.args",
            {"a": "x: 1", "b": "*.png", "c": "#1"},
        ),
        (
            ["--data.args.a", "'1'", "--data.args.b", "null", "--data.args.c="],
            "data.args",
            {"a": "1", "b": None, "c": ""},
        ),
        (["--data.args.a", "-3", "--data.args.b", "{c: [1]}"], "data.args", {"a": -3, "b": {"c": [1]}}),
        (["--track.profile", "{start_step: 10, steps: 5}"], "track.profile", {"start_step": 10, "steps": 5}),
        (
            ["--track.profile.start_step=10", "--track.profile.steps", "5"],
            "track.profile",
            {"start_step": 10, "steps": 5},
        ),
    ],
)
def test_what_a_command_line_means(argv: list[str], path: str, value: Any):
    got = value_at(load(argv), path)
    assert got == value and type(got) is type(value)


ENVIRONMENT = {"HOME": "/home/me", "SCRATCH": "/fast/me", "EMPTY": "", "HERE": "~/here"}


@pytest.mark.parametrize(
    ("written", "path"),
    [
        ("~/", "/home/me/"),
        ("~/runs/a", "/home/me/runs/a"),
        ("~root/a", "/root/a"),
        ("$SCRATCH/a", "/fast/me/a"),
        ("${SCRATCH}a/$SCRATCH", "/fast/mea//fast/me"),
        ("$HERE/a", "/home/me/here/a"),
        ("a~/~", "a~/~"),
        ("a$$SCRATCH/$5/$", "a$SCRATCH/$5/$"),
        ("$~/a", "~/a"),
        ("runs/größe", "runs/größe"),
    ],
)
def test_home_and_variables_in_paths(written: str, path: str, place: Path, monkeypatch: pytest.MonkeyPatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    keys = ["run.dir", "data.root", "model.init_from", "backend.config", "checkpoint.resume"]
    keys += ["data.args.annotations", "data.args.test_annotations", "data.args.image_dir"]
    Path("f.yaml").write_text("data:\n  name: csv_images\n", encoding="utf-8")
    config = load(["--config", "f.yaml", *(word for key in keys for word in (f"--{key}", written))])
    assert [value_at(config, ".".join(key.split(".")[:2])) for key in keys[:5]] == 5 * [path]
    assert config.data.args == dict.fromkeys(("annotations", "test_annotations", "image_dir"), path)
    for name in ("HOME", "SCRATCH", "HERE"):  # what is recorded means the same to another user
        monkeypatch.setenv(name, "/elsewhere")
    Path("f.yaml").write_text(dump(config), encoding="utf-8")
    assert load(["--config", "f.yaml"]) == config


def test_a_variable_without_a_value_is_one_line(place: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("EMPTY", "")
    Path("f.yaml").write_text("run: {dir: $NOT_SET/a}\ndata: {root: '${EMPTY}/b'}\n")
    lines = refusal(["--config", "f.yaml", "--checkpoint.resume", "~nobody.here/a"])
    assert [line.split(":")[0] for line in lines] == ["run.dir", "data.root", "checkpoint.resume"]
    assert "got $NOT_SET/a, but the variable NOT_SET is not set" in lines[0] and "EMPTY is empty" in lines[1]
    assert "there is no home folder of ~nobody.here" in lines[2]
    load(["--config", "f.yaml", "--run.dir", "a", "--data.root", "b"])  # only what is used must have a value
    assert refusal(["--config", "$NOT_SET/f.yaml"])[0].startswith("--config: got $NOT_SET/f.yaml")


def test_a_path_that_is_no_text(place: Path):
    path = os.fsdecode(b"runs/\xff")
    config = load(["--run.dir", path])
    Path("f.yaml").write_text(dump(config), encoding="utf-8")
    assert load(["--config", "f.yaml"]).run.dir == path
    Path("f.yaml").write_text('run: {dir: "\\uD800"}')
    assert refusal(["--config", "f.yaml"])[0].startswith("run.dir: got '\\ud800', which no file can be called")


def test_the_command_line_wins_over_files_and_a_later_file_over_an_earlier(place: Path):
    Path("a.yaml").write_text(
        "train: {epochs: 5, seed: 1, max_steps: 7}\noptim: {args: {betas: [0.8, 0.9], eps: 1e-3}}\n"
    )
    Path("b.yaml").write_text("train: {epochs: 6}\n")
    config = load(["--train.seed", "9", "--config", "a.yaml", "--optim.args.eps", "0.5", "--config=b.yaml"])
    assert config.train.seed == 9  # though --config stands last
    assert config.train.epochs == 6 and config.train.max_steps == 7  # key by key
    assert config.optim.args == {"betas": [0.8, 0.9], "eps": 0.5}
    assert config.train.global_batch_size == Config().train.global_batch_size
    assert load(["--config=b.yaml", "--config=a.yaml"]).train.epochs == 5
    Path("b.yaml").write_text("optim: {args: {eps: 1.0}}\ntrain:\n")
    config = load(["--config=a.yaml", "--config=b.yaml"])
    assert config.optim.args == {"eps": 1.0} and config.train.epochs == 5  # a null section takes nothing away


def test_the_defaults_are_a_good_config(place: Path):
    assert load([]) == Config()
    check(load([]), Launcher())
    check(load([]), Launcher("torchrun", 3, 4, 3, 4))


def test_a_file_whose_path_has_spaces_and_other_scripts(place: Path):
    path = place / "my runs" / "größe 数据.yaml"
    path.parent.mkdir()
    path.write_text("run: {dir: 'out put/数据'}\n", encoding="utf-8")
    config = load(["--config", str(path)])
    check(config, Launcher())
    assert config.run.dir == "out put/数据"
    path.write_text(dump(config), encoding="utf-8")
    assert load([f"--config={path}"]) == config


# -- read back equal ---------------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT
VALUE = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3))
OF_TYPE = {
    str: TEXT
    | st.sampled_from(["off", "1e-3", "010", "null", "~", "12", "2024-01-02", "<<", "=", "- a", "a: b", "", "$HOME"]),
    int: st.integers(),
    float: st.floats(allow_nan=False),
    bool: st.booleans(),
    type(None): st.none(),
    list[Any]: st.lists(VALUE, max_size=3),
    list[int]: st.lists(st.integers(), max_size=4),
    list[str]: st.lists(TEXT, max_size=3),
    dict[str, Any]: st.dictionaries(TEXT, VALUE, max_size=4),
    dict[str, str]: st.dictionaries(TEXT, TEXT, max_size=3),
    dict[str, int]: st.dictionaries(TEXT, st.integers(), max_size=3),
    list[dict[str, Any]]: st.lists(st.dictionaries(TEXT, VALUE, max_size=2), max_size=2),
}


def values_of(hint: Any) -> st.SearchStrategy:
    """Any value of a field's type."""
    if hint in OF_TYPE:
        return OF_TYPE[hint]
    return st.one_of(*[values_of(part) if not isinstance(part, str) else st.just(part) for part in hint.__args__])


CONFIGS = st.builds(
    Config,
    **{
        name: st.builds(section, **{key: values_of(hint) for key, hint in fields_of(name).items()})
        for name, section in fields_of("").items()
    },
)


# What YAML's writers and readers get wrong, in fields that are text and in those that may be anything.
HARD = [
    "\x85",
    "\u2028",
    "\ufeff",
    "\0",
    "a\n\n b\r\n ",
    " a ",
    "1e-3",
    ".5",
    "08",
    "1:30",
    "0x1F",
    "1_0",
    "=",
    "<<",
    "~",
    "$HOME",
    "$$",
    "No",
    "&a",
]
HARD += ["- a", "#", "2024-01-02", "!!x", "%a", "@", "{", "", "ä 数", 50 * "long  words "]
HARD_CONFIG = Config(
    data=DataConfig(root="\x85".join(HARD), args={"texts": HARD} | {text: text for text in HARD}),
    optim=OptimConfig(lr=5e-324, weight_decay=1e16, momentum=-0.0, lr_final=math.inf, gamma=1e-7),
)


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(config=CONFIGS)
@example(config=HARD_CONFIG)
def test_what_is_dumped_reads_back_equal(config: Config, tmp_path: Path):
    path = tmp_path / "config.yaml"
    path.write_text(dump(config), encoding="utf-8", newline="")
    again = load(["--config", str(path)])
    assert repr(again) == repr(config)  # repr tells 1 from 1.0 and -0.0 from 0.0
    assert json.dumps(dataclasses.asdict(again)) == json.dumps(dataclasses.asdict(config))


def test_print_config_reads_back_equal(place: Path, capsys: pytest.CaptureFixture):
    argv = ["--optim.lr", repr(0.1 + 0.2), "--run.name", "1e-3", "--optim.args.betas", "[0.9, 0.95]"]
    with pytest.raises(SystemExit) as ended:
        load([*argv, "--print_config"])
    assert ended.value.code == 0
    Path("f.yaml").write_text(capsys.readouterr().out)
    assert load(["--config", "f.yaml"]) == load(argv)
    assert math.isclose(load(argv).optim.lr, 0.3) and load(argv).optim.lr != 0.3
