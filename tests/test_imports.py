"""Who may see whom: the rooms of the package, read from its imports."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import dist_train
from dist_train.backends import BACKENDS

from data_files import write_raw

ROOT = Path(dist_train.__file__).parent
LAUNCH = sorted((ROOT.parent / "launch").glob("*.py"))
MODULES = {
    ".".join(["dist_train", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
}
# The rooms, from the ground up: a room sees those before it, and itself.
ROOMS = (
    *("config", "ranks", "models", "data", "backends", "tasks", "loop", "checkpoint", "track", "run", "face"),
    *("report", "bench", "doctor", "tools", "__main__"),
)
SEEN_BY_ALL = {"errors", "whole", "columns", "versions"}
# Modules that answer before torch is imported: config, its rules, and what they need.
LIGHT = {
    "errors",
    "config.given",
    "config.tree",
    "config.load",
    "config.values",
    "config.arguments",
    "config.paths",
    "config.strict_yaml",
    "config.lookup",
    "config.own_code",
    "ranks.launcher",
    "ranks.ending",
    "ranks.speech",
    "run.check",
    "run.lock",
    "run.outcome",
    "face.fit",
    "face.given",
    "face.launch",
    "backends",
    "backends.rules",
    "data",
    "data.rules",
    "models",
    "models.rules",
    "tasks",
    "tasks.metric_items",
    "tasks.rules",
    "loop.rules",
    "checkpoint.allowed",
    "checkpoint.manifest",
    "checkpoint.places",
    "checkpoint.rules",
    "checkpoint.urls",
    "track.rules",
    "track.status",
    "bench.lead",  # which must not take the cores from the ranks, nor memory
    "bench.machine",
}
# What of the package `launch` sees.
CONFIG = {f"dist_train.config.{name}" for name in ("load", "tree", "values")}
HEAVY = {"torch", "numpy", "sklearn", "torchvision"}


def imports(path: Path) -> set[str]:
    """Every module that a file imports, at its top or in a function."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
            if node.module == "dist_train" or f"{node.module}.{node.names[0].name}" in MODULES:
                found.discard(node.module)
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room_of(module: str) -> str:
    """The room of a module; of one in no room, its own name."""
    return module.removeprefix("dist_train.").split(".")[0]


def wrong(module: str, seen: set[str]) -> set[str]:
    """Of the package's own modules that `module` imports, those that are in a room after its own."""
    own = {name for name in seen if name.startswith("dist_train.") and room_of(name) not in SEEN_BY_ALL}
    if module == "dist_train":  # names what it gives, for type checkers; each is imported when it is first used
        return set()
    if room_of(module) in SEEN_BY_ALL:
        return own
    above = ROOMS[: ROOMS.index(room_of(module)) + 1]
    return {name for name in own if room_of(name) not in above}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_room_sees_only_the_rooms_before_it(module: str):
    assert not wrong(module, imports(MODULES[module]))


def of_ours(module: str) -> set[str]:
    return {name for name in imports(MODULES[module]) if name.split(".")[0] == "dist_train"}


@pytest.mark.parametrize("name", ["bare", "slices"])
def test_what_a_run_is_measured_beside_knows_nothing_of_the_package(name: str):
    assert not of_ours(f"dist_train.bench.{name}")


def test_a_backend_is_imported_by_its_name_alone():
    """Only the registry names them, as text: the library of one that is not chosen is not needed."""
    backends = {row.partition(":")[0] for row in BACKENDS.values()}
    assert backends < MODULES.keys()
    assert not {module: seen for module in MODULES if (seen := of_ours(module) & backends)}


def test_no_module_imports_itself_in_a_circle():
    left = {module: imports(path) & MODULES.keys() for module, path in MODULES.items()}
    # A backend, a data set and a model are named in the rows of their room, as text: no import leads back.
    while done := {module for module, seen in left.items() if not seen & left.keys()}:
        left = {module: seen for module, seen in left.items() if module not in done}
    assert not left


def test_launch_sees_the_config_alone():
    ours = {"dist_train", "launch"}
    seen = {name for path in LAUNCH for name in imports(path) if name.split(".")[0] not in sys.stdlib_module_names}
    others = {name for name in seen if not name.startswith("launch")}
    assert len(LAUNCH) > 5 and others == {*CONFIG, "dist_train.errors", "yaml"}
    assert not [path for path in MODULES.values() if any(name.split(".")[0] == "launch" for name in imports(path))]
    code = f"import sys, launch.__main__; print(sorted({HEAVY} & sys.modules.keys()), {ours} <= sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] True"


def test_the_rule_sees_a_wrong_import(tmp_path: Path):
    planted = tmp_path / "train.py"
    planted.write_text("def f():\n    from dist_train.backends import ddp\n    import dist_train.track.base\n")
    assert imports(planted) == {"dist_train.backends.ddp", "dist_train.track.base"}
    assert wrong("dist_train.loop.train", imports(planted)) == {"dist_train.track.base"}


def test_the_loop_tells_no_rank_and_no_backend_apart():
    words = {n.id for n in ast.walk(ast.parse((ROOT / "loop" / "train.py").read_text())) if isinstance(n, ast.Name)}
    names = {
        n.attr for n in ast.walk(ast.parse((ROOT / "loop" / "train.py").read_text())) if isinstance(n, ast.Attribute)
    }
    assert not {"is_main", "launcher"} & names and not {"single", "DDP", "isinstance"} & words


def test_the_light_modules_do_not_import_torch():
    names = ", ".join(f"dist_train.{name}" for name in sorted(LIGHT))
    code = f"import sys, {names}; print(sorted({HEAVY} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# What a run on one process and the CPU does without.
NOT_NEEDED = (
    *("torchvision", "sklearn", "accelerate", "deepspeed", "wandb", "rich", "plotly", "matplotlib", "sympy"),
    *("tensorboard", "torch.utils.tensorboard", "torch._dynamo", "torch._inductor", "torch.distributed.checkpoint"),
)
# Runs in forks of one process that has imported torch. Each prints its exit code, and what it has imported of a list.
RUNS = """
import json, os, sys
import torch
looked_for, runs = json.loads(sys.argv[1])
for argv in runs:
    if not os.fork():
        from dist_train import __main__
        from dist_train.ranks import ending
        def leave(code):
            print(json.dumps([code, sorted(set(looked_for) & sys.modules.keys())]), file=sys.stderr, flush=True)
            os._exit(0)
        ending.leave = leave
        sys.argv = ["dist_train", *argv]
        __main__.main()
    os.wait()
"""


def test_a_run_imports_nothing_that_it_does_not_need(tmp_path: Path):
    write_raw(tmp_path / "FashionMNIST" / "raw", 60, 20)
    common = ["--train.device", "cpu", "--train.max_steps", "3", "--track.every_steps", "1", "--model.hidden", "[8]"]
    fashion = ["--data.name", "fashion_mnist", "--data.root", str(tmp_path)]
    saves = ["--checkpoint.every_steps", "3"]
    runs = [[*common, *more, "--run.dir", str(tmp_path / f"run{i}")] for i, more in enumerate(([], fashion, saves))]
    control = ["dist_train.data.vision", "dist_train.data.digits"]
    given = json.dumps([[*NOT_NEEDED, *control], runs])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT.parent)}
    done = subprocess.run([sys.executable, "-c", RUNS, given], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    digits, pictures, saved = map(json.loads, done.stderr.splitlines())
    assert digits == [0, ["dist_train.data.digits"]]
    assert pictures == [0, ["dist_train.data.vision"]]
    assert saved[0] == 0 and "torch.distributed.checkpoint" in saved[1]  # the list is of names that can be found
