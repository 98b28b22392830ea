"""Parameter groups by name, what has no weight decay, and optimizers of a user's own."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from dist_train.config.tree import OptimConfig
from dist_train.errors import ConfigError
from dist_train.loop.optim import check, factory, set_lr
from dist_train.loop.schedule import lr_at

from optim_cells import ADAMW, Mixed, config, refused, run, run_all
from parity_cells import TOLERANCE
from workers import run_ranks

SCALES = OptimConfig(
    name="optim_cells:Scales", lr=3e-3, weight_decay=0.1, args={"rate": 0.3, "start": 2.0}, no_decay=True,
    groups=[{"match": "head.*", "lr": 9e-3, "rate": 0.6}],
)  # fmt: skip


def model() -> Mixed:
    torch.manual_seed(0)
    return Mixed((2, 4, 4), 3)


def settings_of(optim: OptimConfig, of: nn.Module) -> dict[str, dict]:
    """The settings of the group of each parameter, by name."""
    optimizer = factory(optim, of)(of.named_parameters())
    names = {p: name for name, p in of.named_parameters()}
    return {names[p]: {**group, "params": None} for group in optimizer.param_groups for p in group["params"]}


def test_the_first_pattern_that_matches_decides():
    found = settings_of(ADAMW, model())
    assert found["head.weight"]["lr_scale"] == found["head.bias"]["lr_scale"] == pytest.approx(3)
    assert found["head.bias"]["betas"] == [0.8, 0.95] and found["inner.weight"]["betas"] == (0.9, 0.999)
    assert found["inner.bias"]["lr_scale"] == found["norm.bias"]["lr_scale"] == pytest.approx(1 / 3)
    assert found["inner.weight"]["lr_scale"] == 1.0
    assert len(found) == len(list(model().parameters()))


def test_what_has_no_weight_decay():
    found = {name: settings["weight_decay"] for name, settings in settings_of(ADAMW, model()).items()}
    decayed = {name for name, decay in found.items() if decay == 0.2}
    assert decayed == {f"{name}.weight" for name in ("inner", "frozen", "first", "unused", "head")}
    assert found["norm.weight"] == 0.3  # its group says so
    assert {found[name] for name in found.keys() - decayed - {"norm.weight"}} == {0.0}
    assert found["wide_norm.weight"] == 0.0  # of two dimensions
    plain = settings_of(dataclasses.replace(ADAMW, no_decay=False, groups=[]), model())
    assert {settings["weight_decay"] for settings in plain.values()} == {0.2}


def test_groups_train_as_torchs_own_do():
    """Against torch's optimizer, groups and scheduler, written by hand."""
    optim, own, theirs = dataclasses.replace(ADAMW, no_decay=False), model(), model()
    ours = factory(optim, own)(own.named_parameters())
    by_name = dict(theirs.named_parameters())
    head, norm = (([by_name.pop(f"{of}.{kind}") for kind in ("weight", "bias")]) for of in ("head", "norm"))
    biases = [norm.pop(), *(by_name.pop(name) for name in [n for n in by_name if n.endswith("bias")])]
    reference = torch.optim.AdamW(
        [
            {"params": list(by_name.values())},
            {"params": head, "lr": 9e-3, "betas": (0.8, 0.95)},
            {"params": biases, "lr": 1e-3},
            {"params": norm, "weight_decay": 0.3},
        ],
        lr=3e-3, weight_decay=0.2, eps=1e-3,
    )  # fmt: skip
    schedule = LambdaLR(reference, lambda step: lr_at(optim, step, 12) / 3e-3)
    inputs = torch.linspace(-1, 1, 8 * 32).view(8, 2, 4, 4)
    for step in range(10):
        set_lr(ours, lr_at(optim, step, 12))
        for net, optimizer in ((own, ours), (theirs, reference)):
            optimizer.zero_grad()
            net(inputs).square().sum().backward()
            optimizer.step()
        schedule.step()
    for (name, p), q in zip(own.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-7), name


@pytest.mark.parametrize(
    ("groups", "line"),
    [
        (["haed.*"], "got match 'haed.*', which matches no parameter of the model; .* such as head.*weight"),
        (
            ["*.bias", "head.bias"],
            "got match 'head.bias', but every parameter .* of '\\*.bias'; put it before that one",
        ),
        (["again.weight"], ".*; again.weight is the same parameter as first.weight, .* write match: 'first.weight'"),
    ],
)
def test_a_pattern_that_decides_nothing_is_refused(groups: list[str], line: str):
    optim = OptimConfig(groups=[{"match": match, "lr": 0.1} for match in groups])
    with pytest.raises(ConfigError, match=f"optim.groups: {line}"):
        check(optim, model(), 10)


def test_what_torch_refuses_in_a_group_is_one_line():
    with pytest.raises(ConfigError, match="optim: got AdamW with .* which torch.optim refuses"):
        check(OptimConfig(groups=[{"match": "*", "betas": 3}], args={"betas": 3}), model(), 10)


def test_adagrad_has_its_groups_under_zero(tmp_path: Path):
    """Whose state is made with it, so that ZeRO makes another one."""
    groups = [{"match": "head.*", "lr": 0.05, "initial_accumulator_value": 0.3}]
    cell = [OptimConfig(name="Adagrad", lr=0.02, args={"initial_accumulator_value": 0.1}, groups=groups)]
    of = [(config(name, cell[0]), tmp_path / name.replace(":", ""), None) for name in ("deepspeed:2", "deepspeed:3")]
    alone = run(config(optim=cell[0]), tmp_path / "alone")
    for outcome in run_ranks(run_all, 2, of)[0]:
        assert apart(outcome.model, alone.model) < TOLERANCE["float32"]


def apart(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    return max(float(np.linalg.norm(a[n] - b[n]) / max(np.linalg.norm(b[n]), 1e-3)) for n in b)


# -- optimizers of a user's own ----------------------------------------------------------------------------------------


def test_an_own_optimizer_trains_and_resumes_anywhere(tmp_path: Path):
    alone = run(config(optim=SCALES), tmp_path / "alone")
    for backend, ranks, cut_after in (("ddp", 2, 3), ("deepspeed:2", 3, 5), ("fsdp2", 2, 7), ("deepspeed:3", 2, None)):
        (end,) = run_ranks(run_all, ranks, [(config(backend, SCALES), tmp_path / "run", cut_after)])[0]
        assert not end.lines
    assert apart(end.model, alone.model) < TOLERANCE["float32"]


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("Counting", "changes its own 'count', expected all that changes to be in self.state"),
        ("CountingInGroups", "changes 'k' of its groups, expected"),
        ("CountingAsNumber", "keeps 'count' of a parameter as int, expected a tensor, .* torch.tensor"),
        ("Shared", "keeps state under 'all', expected"),
        ("Failing", r"your own code raises an error when it is asked for a step; mend it there:.*optim_cells.py"),
        ("OwnGroups", "does not keep the groups that it is given; expected it to hand them to super"),
        ("Mixed", "which is of type type, expected a class that is derived from torch.optim.Optimizer"),
        ("Absent", "but there is no 'Absent'"),
    ],
)
def test_an_own_optimizer_that_would_not_resume_is_refused(name: str, line: str):
    with pytest.raises(ConfigError, match=f"(?s)optim.name: got .*{line}"):
        check(OptimConfig(name=f"optim_cells:{name}", lr=0.1), model(), 10)


def test_a_setting_that_a_group_cannot_have_is_refused():
    with pytest.raises(ConfigError, match="optim.groups: got start 2.0, which .* does not keep for each group"):
        check(dataclasses.replace(SCALES, groups=[{"match": "head.*", "start": 2.0}]), model(), 10)


@pytest.mark.parametrize(
    ("name", "backend", "line"),
    [
        ("Whole", "deepspeed:2", "updates parts of a weight otherwise than the whole of it, but ZeRO 2 has"),
        ("Whole", "fsdp2", ""),  # a DTensor knows the norm of the whole
        ("OfShards", "fsdp2", "updates parts of a weight otherwise than the whole of it, but fsdp2 has"),
        ("Whole", "ddp", ""),
    ],
)
def test_an_own_optimizer_that_looks_at_whole_weights(name: str, backend: str, line: str, tmp_path: Path):
    optim = OptimConfig(name=f"optim_cells:{name}", lr=0.01)
    found = run_ranks(refused, 2, config(backend, optim), tmp_path)
    assert all((line in said) if line else not said for said in found), found
