"""Optimizers by name, the schedule as a pure function of the step, losses as sums, and when the model is evaluated."""

import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.optim import lr_scheduler

from dist_train.config.lookup import parameters, torch_optimizers
from dist_train.config.tree import OptimConfig, TrainConfig
from dist_train.errors import ConfigError
from dist_train.loop.optim import FUSED, OURS, factory
from dist_train.loop.rules import UNFIT_OPTIMIZERS
from dist_train.loop.schedule import check_schedule, lr_at
from dist_train.loop.train import evaluation_due
from dist_train.loop.work import total_steps
from dist_train.tasks.classification import Classification

TOTAL = 40
OF_TORCH = sorted(torch_optimizers().keys() - UNFIT_OPTIMIZERS.keys() - OURS.keys())
# Each schedule beside the scheduler of torch that has its name.
THEIRS = {
    "constant": ({}, lambda o: lr_scheduler.ConstantLR(o, factor=1.0)),
    "linear": ({"lr_final": 0.02}, lambda o: lr_scheduler.LinearLR(o, 1.0, 0.1, TOTAL)),
    "cosine": ({"lr_final": 0.02}, lambda o: lr_scheduler.CosineAnnealingLR(o, TOTAL, eta_min=0.02)),
    "step": ({"step_size": 7, "gamma": 0.5}, lambda o: lr_scheduler.StepLR(o, 7, 0.5)),
    "polynomial": ({"power": 2.0}, lambda o: lr_scheduler.PolynomialLR(o, TOTAL, 2.0)),
    "cosine_restarts": (
        {"restart_steps": 5, "restart_factor": 2, "lr_final": 0.02},
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5, 2, eta_min=0.02),
    ),
    "wsd": (
        {"decay_steps": 8, "lr_final": 0.02},
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.ConstantLR(o, 1.0), lr_scheduler.LinearLR(o, 1.0, 0.1, 8)], [TOTAL - 8]
        ),
    ),
}


def one_weight() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(2, 2))]


def build(config: OptimConfig, weights: list[torch.nn.Parameter] | None = None, **how) -> torch.optim.Optimizer:
    named = [(f"weights.{i}", weight) for i, weight in enumerate(weights or one_weight())]
    return factory(config, **how)(named)


@pytest.mark.parametrize("schedule", THEIRS)
def test_schedules_are_torchs_own(schedule: str):
    settings, scheduler_of = THEIRS[schedule]
    optimizer = torch.optim.SGD(one_weight(), lr=0.2)
    scheduler = scheduler_of(optimizer)
    for step in range(TOTAL):
        ours = lr_at(OptimConfig(lr=0.2, schedule=schedule, **settings), step, TOTAL)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9), step
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("schedule", THEIRS)
def test_the_warm_up_rises_to_lr_and_the_schedule_starts_there(schedule: str):
    settings, _ = THEIRS[schedule]
    config = OptimConfig(lr=0.2, schedule=schedule, warmup_steps=9, **settings)
    rates = [lr_at(config, step, TOTAL + 9) for step in range(TOTAL + 9)]
    assert rates[:10] == pytest.approx([0.02 * (step + 1) for step in range(10)])
    alone = OptimConfig(lr=0.2, schedule=schedule, **settings)
    assert rates[9:] == pytest.approx([lr_at(alone, step, TOTAL) for step in range(TOTAL)])


def test_a_share_of_the_run():
    shares = OptimConfig(lr=0.2, schedule="wsd", warmup_share=0.1, decay_share=0.25)
    steps = OptimConfig(lr=0.2, schedule="wsd", warmup_steps=4, decay_steps=10)
    assert [lr_at(shares, step, TOTAL) for step in range(TOTAL)] == [lr_at(steps, step, TOTAL) for step in range(TOTAL)]


def test_restarts_of_one_length():
    config = OptimConfig(lr=0.2, schedule="cosine_restarts", restart_steps=7)
    assert lr_at(config, 0, TOTAL) == lr_at(config, 7, TOTAL) == lr_at(config, 35, TOTAL) == 0.2


def halves(step: int, total_steps: int) -> float:
    return 1.0 if 2 * step < total_steps else 0.5


def fails(step: int, total_steps: int) -> float:
    return 1 / (total_steps - step - 1)


def negative(step: int, total_steps: int) -> float:
    return -1.0


draws = iter(range(1000))


def impure(step: int, total_steps: int) -> float:
    return next(draws)


def test_a_schedule_of_ones_own_runs_from_the_warm_up_on():
    config = OptimConfig(lr=0.2, schedule=f"{__name__}:halves", warmup_steps=2)
    assert [lr_at(config, step, 6) for step in range(6)] == pytest.approx([0.2 / 3, 0.4 / 3, 0.2, 0.2, 0.1, 0.1])
    check_schedule(config, 6)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("fails", r"called with \(5, 6\); mend it there:.*ZeroDivisionError"),
        ("negative", r"got -1.0 from .*:negative\(\d+, 6\), expected a finite number of 0 or more"),
        ("impure", "which gives .* and then .*, expected a function of"),
        ("absent", "but there is no 'absent'"),
    ],
)
def test_a_bad_schedule_of_ones_own_is_refused_before_the_run(name: str, line: str):
    with pytest.raises(ConfigError, match=f"(?s)optim.schedule: .*{line}"):
        check_schedule(OptimConfig(schedule=f"{__name__}:{name}"), 6)


def test_every_optimizer_that_is_offered_works():
    names = OF_TORCH
    assert {"SGD", "Adam", "AdamW", "RMSprop", "Adagrad"} <= set(names)
    for name in names:
        weights = one_weight()
        optimizer = build(OptimConfig(name=name, lr=0.1), weights)
        assert type(optimizer).__mro__[1] is getattr(torch.optim, name) and type(optimizer).__name__ == name
        weights[0].sum().backward()
        optimizer.step()
        assert (weights[0] < 1).all(), name


@pytest.mark.parametrize("name", OF_TORCH)
def test_an_optimizer_gives_torchs_own_bits(name: str):
    """Ours are without what torch wraps around their methods for the compiler."""

    def trained(optimizer: torch.optim.Optimizer, resumed: torch.optim.Optimizer, weights: list[list]) -> list:
        seen = []
        optimizer.register_step_post_hook(lambda *_: seen.append("hook"))
        for step in range(6):
            if step == 3:
                resumed.load_state_dict(optimizer.state_dict())
                weights[1][0].data = weights[0][0].data.clone()
                optimizer, weights = resumed, weights[1:]
            optimizer.zero_grad()
            (weights[0][0] ** 2).sum().backward()
            optimizer.step()
            assert torch.is_grad_enabled() and weights[0][0].requires_grad and weights[0][0].is_leaf
        return [weights[0][0].tolist(), len(seen), optimizer.state_dict()["param_groups"]]

    def draw() -> list[torch.nn.Parameter]:
        return [torch.nn.Parameter(torch.linspace(-1, 2, 12).view(3, 4))]

    fused = {"fused": True} if name in FUSED else {}
    plain, ours = [draw(), draw()], [draw(), draw()]
    theirs = trained(*(getattr(torch.optim, name)(w, lr=0.1, **fused) for w in plain), plain)
    found = trained(*(build(OptimConfig(name=name, lr=0.1), w) for w in ours), ours)
    assert found[2][0].pop("lr_scale") == 1
    assert found == theirs
    assert theirs[1] == 3


def test_a_differentiable_optimizer_is_torchs_own():
    optimizer = build(OptimConfig(name="SGD", lr=0.1, args={"differentiable": True}))
    assert type(optimizer) is torch.optim.SGD


def test_arguments_are_read_from_source_as_they_are():
    """The check of a config knows them without importing torch."""
    import inspect

    for name, path in torch_optimizers().items():
        theirs = inspect.signature(getattr(torch.optim, name)).parameters
        assert parameters(path, name) == {k: p.default is inspect.Parameter.empty for k, p in theirs.items()}, name


def test_settings_reach_the_optimizer():
    config = OptimConfig(name="SGD", lr=0.1, momentum=0.9, weight_decay=0.01, args={"nesterov": True})
    group = build(config).param_groups[0]
    assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.9, 0.01, True)
    assert build(OptimConfig(name="AdamW")).param_groups[0]["weight_decay"] == 0.01  # torch's own


def test_what_torch_refuses_is_one_line():
    with pytest.raises(ConfigError, match="optim: got SGD with .*nesterov.*Nesterov momentum requires a momentum"):
        build(OptimConfig(name="SGD", args={"nesterov": True}))


def test_losses_are_sums_over_samples():
    out, labels = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)), torch.arange(7) % 5
    soft = F.one_hot(labels, 5).float()
    for name, target, mean in (
        ("cross_entropy", labels, F.cross_entropy(out, labels)),
        ("cross_entropy", soft, F.cross_entropy(out, soft)),
        ("nll", labels, F.nll_loss(out, labels)),
        ("mse", soft, F.mse_loss(out, soft)),
    ):
        loss = partial(Classification(name, classes=5).loss_of, reduction="sum")
        assert loss(out, target) == pytest.approx(7 * float(mean), rel=1e-6), name
        assert loss(out[:3], target[:3]) + loss(out[3:], target[3:]) == pytest.approx(7 * float(mean), rel=1e-6), name
        assert loss(out[:0], target[:0]) == 0, f"{name} of no samples"
    smooth = F.cross_entropy(out, labels, label_smoothing=0.1)
    smoothed = Classification(label_smoothing=0.1, classes=5).loss_of(out, labels, "sum")
    assert smoothed == pytest.approx(7 * float(smooth), rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [10, 20, 30]),
        ({"eval_every_epochs": 2}, [20, 30]),
        ({"eval_every_epochs": None}, [30]),
        ({"eval_every_epochs": None, "eval_every_steps": 12}, [12, 24, 30]),
        ({"eval_every_steps": 15}, [10, 15, 20, 30]),
        ({"max_steps": 13}, [10, 13]),
    ],
)
def test_when_the_model_is_evaluated(settings: dict, expected: list[int]):
    cfg = TrainConfig(**{"epochs": 3, **settings})
    total = total_steps(cfg, 10)
    due = [
        done
        for done in itertools.takewhile(lambda d: d <= total, itertools.count(1))
        if evaluation_due(cfg, done, total, 10)
    ]
    assert due == expected


def test_sparse_gradients_are_not_for_the_fused_kernel():
    assert build(OptimConfig(name="SGD", lr=0.1)).param_groups[0]["fused"]
    assert not build(OptimConfig(name="SGD", lr=0.1), unfused=True).param_groups[0]["fused"]
