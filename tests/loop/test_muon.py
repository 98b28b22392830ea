"""Muon: torch's own bits in one process, and the same under every backend and on any number of ranks, whichever way the
matrices are cut."""

import dataclasses
import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dist_train.backends.matrices import Part
from dist_train.config.tree import OptimConfig
from dist_train.errors import ConfigError
from dist_train.loop.hidden import others_of
from dist_train.loop.muon import orthogonalised
from dist_train.loop.optim import check, factory, set_lr

from muon_cells import MUON, Small, config, exchanged, in_small_exchanges, scaled, with_fault
from optim_cells import Outcome, run, run_all
from parity_cells import BACKENDS, TOLERANCE
from workers import run_ranks

UNUSED = {"unused.weight", "unused.bias"}  # ZeRO does not train them, and so keeps no average


def model() -> nn.Module:
    torch.manual_seed(0)
    return Small((2, 4, 4), 3)


def layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(9, 20), nn.Linear(20, 6), nn.Linear(6, 6), nn.Linear(6, 4))


def apart(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    if a.keys() != b.keys():
        return math.inf
    return max(float(np.linalg.norm(a[n] - b[n]) / max(np.linalg.norm(b[n]), 1e-3)) for n in a)


def distance(found: Outcome, expected: Outcome) -> float:
    averages = [{n: v for n, v in o.averages.items() if n not in UNUSED} for o in (found, expected)]
    losses = [abs(found.evaluations[step] - value) / value for step, value in expected.evaluations.items()]
    return max(apart(found.model, expected.model), apart(*averages), *losses)


# -- one process -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch 2.8 has no Muon")
@pytest.mark.parametrize(
    "args", [{}, {"nesterov": False}, {"adjust_lr_fn": "match_rms_adamw", "ns_steps": 3}, {"eps": 1e-3}]
)
def test_it_gives_torchs_own_bits(args: dict):
    """With the iteration in bfloat16, as torch has it; and those of AdamW beside it."""
    own, theirs = layers(), layers()
    adamw = {"lr": 1e-3, "betas": (0.8, 0.9)}
    optim = OptimConfig(name="Muon", lr=0.02, weight_decay=0.05, args={"ns_dtype": "bfloat16", "adamw": adamw, **args})
    ours = factory(optim, own)(own.named_parameters())
    by_name = dict(theirs.named_parameters())
    hidden = [by_name.pop(f"{i}.weight") for i in range(3)]
    pair = (
        torch.optim.Muon(hidden, lr=0.02, weight_decay=0.05, **args),
        torch.optim.AdamW(by_name.values(), weight_decay=0.05, fused=True, **adamw),
    )
    for step in range(4):
        for (name, p), q in zip(own.named_parameters(), theirs.parameters(), strict=True):
            p.grad = torch.sin(p.detach() * (step + len(name)))
            q.grad = p.grad.clone()
        set_lr(ours, 0.02)
        for optimizer in (ours, *pair):
            optimizer.step()
    for (name, p), q in zip(own.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("shape", [(6, 30), (30, 6), (8, 8)])
def test_singular_values_come_near_to_one(shape: tuple[int, int]):
    matrix = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = orthogonalised(matrix, (3.4445, -4.7750, 2.0315), 5, 1e-7)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    inner = u.T @ found @ v.T  # diagonal, as the iteration keeps the singular vectors
    assert found.dtype == torch.float64 and found.shape == shape
    assert torch.allclose(inner, inner.diagonal().diag(), atol=1e-9)
    assert inner.diagonal().min() > 0.3 and inner.diagonal().max() < 1.3


def test_a_closure_computes_the_gradients():
    """As Lightning steps an optimizer."""
    x, results = torch.randn(4, 9), []
    for by_closure in (False, True):
        trained = layers()
        optimizer = factory(OptimConfig(name="Muon"), trained)(trained.named_parameters())

        def loss(trained=trained):
            found = trained(x).square().mean()
            found.backward()
            return found

        found = optimizer.step(loss) if by_closure else loss()
        if not by_closure:
            assert optimizer.step() is None
        results.append([found.detach(), *(p.detach() for p in trained.parameters())])
    torch.testing.assert_close(*results)  # not to the bit: where a tensor lies in memory decides the last ones


def test_a_kernel_is_the_matrix_of_its_rows():
    """Also where it lies in another order."""
    kernel = nn.Conv2d(3, 4, 2, bias=False).to(memory_format=torch.channels_last)
    matrix = nn.Linear(12, 4, bias=False)
    matrix.weight.data = kernel.weight.detach().reshape(4, 12).clone()
    for layer in (kernel, matrix):
        of = nn.Sequential(layer, nn.Linear(2, 2))
        optimizer = factory(OptimConfig(name="Muon", lr=0.1), of)(of.named_parameters())
        layer.weight.grad = torch.linspace(-1, 1, 48).sin().view(layer.weight.shape)
        optimizer.step()
    assert torch.equal(kernel.weight.reshape(4, 12), matrix.weight)


def test_which_weights_are_matrices():
    others = others_of(dataclasses.replace(MUON, groups=[]), model(), {})
    matrices = {name for name, _ in model().named_parameters()} - set(others)
    assert matrices == {
        "patches.weight", "wide.weight", "encoder.self_attn.in_proj_weight", "encoder.self_attn.out_proj.weight",
        "encoder.linear1.weight", "encoder.linear2.weight", "thin.weight", "thick.weight", "first.weight",
        "frozen.weight", "unused.weight",
    }  # fmt: skip
    embedding, head = nn.Embedding(5, 4), nn.Linear(4, 5)
    head.weight = embedding.weight
    tied = nn.ModuleDict({"embedding": embedding, "inner": nn.Linear(4, 4), "norm": nn.LayerNorm((2, 2)), "head": head})
    tied["grouped"] = nn.Conv1d(4, 4, 3, groups=4)
    found = set(others_of(OptimConfig(name="Muon"), tied, {}))
    assert {name for name, _ in tied.named_parameters()} - found == {"inner.weight"}


def test_groups_decide_otherwise():
    of = model()
    optimizer = factory(MUON, of)(of.named_parameters())
    names = {p: name for name, p in of.named_parameters()}
    found = {names[p]: group for group in optimizer.param_groups for p in group["params"]}
    assert len(found) == len(names)
    kinds = {name: (group["optimizer"], pytest.approx(group["lr_scale"])) for name, group in found.items()}
    assert kinds["places.weight"] == kinds["wide.weight"] == ("Muon", 1.0)
    assert kinds["thin.weight"] == ("Muon", 0.3) and kinds["thin.bias"] == kinds["head.weight"] == ("AdamW", 0.1)
    assert kinds["encoder.linear2.weight"] == ("AdamW", 0.1)  # the learning rate of AdamW
    assert found["encoder.linear2.weight"]["betas"] == [0.8, 0.95] and found["head.weight"]["betas"] == (0.9, 0.999)
    assert (found["encoder.linear1.weight"]["ns_steps"], found["wide.weight"]["ns_steps"]) == (4, 5)
    assert found["head.weight"]["eps"] == 1e-3 and found["wide.weight"]["eps"] == 1e-7
    assert found["wide.bias"]["weight_decay"] == 0.0 and found["head.weight"]["weight_decay"] == 0.1
    assert found["head.weight"]["fused"]


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (
            {"groups": [{"match": "*", "optimizer": "Muon"}]},
            "got optimizer Muon for '\\*', which matches patches.bias of shape \\[5\\], expected matrices",
        ),
        (
            {"groups": [{"match": "*", "optimizer": "AdamW"}]},
            "optim.name: got Muon for a model without a hidden matrix .*; write --optim.name AdamW",
        ),
        ({"args": {"ns_steps": 100}}, "optim: got Muon with .*, which it refuses: ns_steps: got 100, expected a whole"),
        ({"args": {"adjust_lr_fn": "none"}}, "adjust_lr_fn: got 'none', expected one of original, match_rms_adamw"),
        ({"args": {"ns_dtype": "float16"}}, "ns_dtype: got 'float16', expected float32 or bfloat16"),
        ({"args": {"ns_coefficients": [1.0]}}, "ns_coefficients: got \\[1.0\\], expected three numbers"),
    ],
)
def test_what_muon_cannot_take_is_refused(keys: dict, line: str):
    with pytest.raises(ConfigError, match=line):
        check(OptimConfig(name="Muon", **keys), model(), 10)


# -- several ranks -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory):
    """A function from a precision to what a run of one process leaves, each run once."""
    place = tmp_path_factory.mktemp("muon")

    @cache
    def of(precision: str) -> Outcome:
        return run(config("single", precision=precision), place / precision)

    return of


SOME = {
    1: ("fsdp2", "deepspeed:3"),
    2: ("ddp", "accelerate", "deepspeed:2"),
    3: ("fsdp2", "deepspeed:1", "deepspeed:3"),
}


def agree(backends: tuple[str, ...], ranks: int, expected: Outcome, place: Path, precision: str = "float32") -> None:
    cells = [(config(name, precision=precision), place / name.replace(":", ""), None) for name in backends]
    for name, outcome in zip(backends, run_ranks(run_all, ranks, cells)[0], strict=True):
        assert distance(outcome, expected) < TOLERANCE[precision], name


@pytest.mark.parametrize("ranks", SOME)
def test_the_same_as_in_one_process(ranks: int, reference, tmp_path: Path):
    agree(SOME[ranks], ranks, reference("float32"), tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_the_same_as_in_one_process_in_full(ranks: int, reference, tmp_path: Path):
    agree(BACKENDS, ranks, reference("float32"), tmp_path)


def test_the_same_in_float64(reference, tmp_path: Path):
    agree(("ddp", "fsdp2"), 3, reference("float64"), tmp_path, "float64")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_parts_of_any_length_make_the_whole_and_come_back(dtype: str):
    """Cut within rows, of ranks that have none, whole on one rank, by columns, of which two ranks have a copy."""
    shapes = [(3, 5), (7, 2), (1, 4), (2, 6), (5, 5), (4, 5), (3, 6), (3, 4)]
    parts_of = [
        [(0, 4), (4, 8), (12, 3)],
        [(0, 14), (14, 0), (14, 0)],
        [(0, 0), (0, 3), (3, 1)],
        [(0, 5), (5, 0), (5, 7)],
        [(0, 10), (10, 10), (20, 5)],
        [(0, 2, 4), (2, 2, 4), (4, 1, 4)],
        [(0, 2, 3), (2, 4, 3), (0, 2, 3)],
        [(4, 8), (0, 4), (4, 8)],
    ]
    everywhere = [[(0, rows * columns)] * 3 for rows, columns in shapes]
    for held in (parts_of, everywhere):
        found = run_ranks(exchanged, 3, shapes, held, dtype)
        for i, (rows, columns) in enumerate(shapes):
            whole = torch.linspace(-1, 1 + i, rows * columns).to(getattr(torch, dtype))
            for rank, parts in enumerate(found):
                assert parts[i] == Part(*held[i][rank]).of(scaled(whole).view(rows, columns)).flatten().tolist()


@pytest.mark.parametrize(("backend", "dtype"), [("ddp", "float32"), ("fsdp2", "float64")])
def test_a_model_of_more_than_is_exchanged_at_once(backend: str, dtype: str, reference, tmp_path: Path):
    found = run_ranks(in_small_exchanges, 2, config(backend, precision=dtype), tmp_path)[0]
    assert distance(found, reference(dtype)) < TOLERANCE[dtype]


# Where each is cut off; the last goes on to the end.
CHAIN = (("single", 0, 1), ("fsdp2", 2, 3), ("deepspeed:2", 3, 5), ("ddp", 2, 6), ("deepspeed:3", 2, 8))
CHAIN += (("fsdp2", 3, None),)


def test_it_goes_on_under_other_backends(reference, tmp_path: Path):
    for backend, ranks, cut_after in CHAIN:
        of = [(config(backend), tmp_path / "run", cut_after)]
        end = (run_ranks(run_all, ranks, of)[0] if ranks else run_all(of))[0]
        assert not end.lines
    assert distance(end, reference("float32")) < TOLERANCE["float32"]


@pytest.mark.parametrize(
    "backend",
    ["fsdp2", *(pytest.param(name, marks=pytest.mark.full) for name in ("ddp", "deepspeed:2", "deepspeed:3"))],
)
def test_the_same_ranks_give_the_same_bits(backend: str, tmp_path: Path):
    cell = config(backend)
    cells = [(cell, tmp_path / "alone", None), (cell, tmp_path / "cut", 5), (cell, tmp_path / "cut", None)]
    alone, _, resumed = run_ranks(run_all, 2, cells)[0]
    assert apart(alone.model, resumed.model) == apart(alone.averages, resumed.averages) == 0


# -- planted faults ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "backend"),
    [("OfShards", "fsdp2"), ("OfShards", "deepspeed:2"), ("OthersShare", "fsdp2"), ("NotShown", "ddp")],
)
def test_planted_faults_are_seen(fault: str, backend: str, reference, tmp_path: Path):
    found = run_ranks(with_fault, 2, fault, config(backend), tmp_path)[0]
    assert distance(found, reference("float32")) > 10 * TOLERANCE["float32"]
