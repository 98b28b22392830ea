"""The model on paper: the page shows what the scripts say, and it is as near to what others measured as it says."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs/scaling.md"
SPEED, MEMORY = 0.12, 0.01  # as the page says; of rows that nothing was fitted to


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch):
    """The modules scaling and meshes of benchmarks/."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    names = ("scaling", "meshes")
    yield [importlib.import_module(name) for name in names]
    for name in names:
        sys.modules.pop(name)


def test_the_page_has_the_tables_that_the_scripts_print(scripts: list[ModuleType]):
    scaling, meshes = scripts
    measured = json.loads((ROOT / "benchmarks/scaling.json").read_text())
    shown = PAGE.read_text().splitlines()
    for line in [*scaling.tables(measured, scaling.fit(measured)).splitlines(), *meshes.tables().splitlines()]:
        assert line in shown, f"run python benchmarks/scaling.py show: {line}"


def off(rows) -> list[tuple[float, float]]:
    """How far each row's speed and memory are from what was published, relative."""
    found = [(row, row.predicted()) for row in rows]
    return [
        (cost.tokens_per_s / row.tokens_per_s - 1, cost.memory_bytes / (row.memory_bytes or cost.memory_bytes) - 1)
        for row, cost in found
    ]


def test_what_others_published_is_predicted_as_nearly_as_the_page_says(scripts: list[ModuleType]):
    _, meshes = scripts
    text = " ".join(PAGE.read_text().split())
    assert f"at most {SPEED:.0%} in speed" in text and f"is within {MEMORY:.0%}" in text
    held = off(row for row in meshes.PUBLISHED if not row.fitted)
    assert len(held) == 6 and max(abs(speed) for speed, _ in held) < SPEED
    assert max(abs(memory) for _, memory in held) < MEMORY
    fitted = [speed for speed, _ in off(row for row in meshes.PUBLISHED if row.fitted)]
    assert abs(sum(fitted)) / len(fitted) < 0.005, "the fit is in the middle of the rows that it was made to"


@pytest.mark.parametrize("forgets", ["_tensor_s", "_kept", "_compute_s"])
def test_a_model_that_leaves_something_out_is_farther_off(
    forgets: str, scripts: list[ModuleType], monkeypatch: pytest.MonkeyPatch
):
    _, meshes = scripts
    whole = getattr(meshes, forgets)
    monkeypatch.setattr(meshes, forgets, lambda *of: 0.8 * whole(*of) if forgets != "_tensor_s" else 0.0)
    held = off(row for row in meshes.PUBLISHED if not row.fitted)
    assert max(abs(speed) for speed, _ in held) > SPEED or max(abs(memory) for _, memory in held) > MEMORY


def test_a_plan_fits_and_uses_every_rank_and_sample(scripts: list[ModuleType]):
    _, meshes = scripts
    for ranks, batch in ((8, 512), (4096, 512)):
        found = list(meshes.plans(meshes.LLAMA_8B, meshes.H100, ranks, batch))
        best = meshes.fastest(found)
        assert best.cost.step_s == min(plan.cost.step_s for plan in found)
        for plan in found:
            assert plan.mesh.ranks == ranks and plan.mesh.tensor <= meshes.GPUS_A_NODE
            assert plan.mesh.data_ranks * plan.micro_batch * plan.accumulation == batch
            assert plan.cost.memory_bytes <= meshes.FULL * meshes.H100.memory_bytes
            assert sum(plan.cost.shares.values()) == pytest.approx(1) and 0 < plan.cost.utilisation < 1
    assert {plan.mesh.tensor for plan in found} == {8}, "more GPUs than samples"
