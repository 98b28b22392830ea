"""Who may see whom: the rooms of the package, read from its imports."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import dist_train

from data_files import write_raw

ROOT = Path(dist_train.__file__).parent
LAUNCH = sorted((ROOT.parent / "launch").glob("*.py"))
MODULES = {
    "dist_train." + ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
}
# Modules that answer before torch is imported: config, its checks, and what they need.
LIGHT = {
    "errors",
    "config",
    "paths",
    "strict_yaml",
    "check",
    "launcher",
    "lock",
    "lookup",
    "own_code",
    "ending",
    "speech",
    "backends",
    "backends.rules",
    "data",
    "models",
    "checkpoint.allowed",
    "checkpoint.manifest",
    "bench.lead",  # which must not take the cores from the ranks, nor memory
    "bench.machine",
}
# Which of the package's own modules each may import. Only `__main__` and the tools see everything.
MAY_IMPORT = {
    "errors": set(),
    "config": {"data", "errors", "paths", "strict_yaml"},
    "paths": {"errors"},
    "lock": set(),
    "strict_yaml": set(),
    "lookup": {"errors", "own_code"},
    "own_code": {"errors"},
    "launcher": {"errors"},
    "ending": {"errors", "launcher", "own_code", "speech"},
    "speech": {"launcher"},
    "check": {
        *("backends", "backends.rules", "checkpoint.allowed", "checkpoint.manifest", "config", "data", "errors"),
        *("launcher", "lock", "lookup", "models", "paths"),
    },
    "whole": {"errors"},
    "columns": set(),
    "dist": {"columns", "errors", "launcher", "rendezvous"},
    "rendezvous": {"errors", "launcher", "speech"},
    "clock": set(),
    "journal": set(),
    "orphan": set(),
    "order": {"config", "dist"},
    "look": {"backends.probe", "config", "data.feed", "errors", "losses", "order", "precision"},
    "losses": set(),
    "precision": {"errors"},
    "optim": {"config", "errors"},
    "compiled": set(),
    "mistakes": {"data.feed", "dist", "losses", "order", "whole"},
    "flops": {"assemble", "config", "data.randomness", "dist", "order", "precision"},
    "timeline": {"phases"},
    "profiling": {
        "assemble",
        "check",
        "checkpoint.save",
        "config",
        "dist",
        "flops",
        "meter",
        "phases",
        "timeline",
        "whole",
    },
    "meter": {"compiled", "dist", "errors", "order", "phases", "stop"},
    "phases": {"clock", "journal"},
    "stop": {"clock", "ending"},
    "watchdog": {"clock", "dist", "ending", "orphan", "phases", "speech"},
    "weights": {"check", "checkpoint.manifest", "checkpoint.resume", "errors", "precision", "whole"},
    "shards": set(),
    "versions": set(),
    "checkpoint": {"errors"},
    "checkpoint.storage": {"checkpoint.manifest", "errors", "shards"},
    "checkpoint.save": {
        *("backends", "backends.base", "checkpoint", "checkpoint.manifest", "checkpoint.randomness"),
        *("checkpoint.storage", "config", "dist", "errors", "meter", "order", "shards", "versions"),
    },
    "checkpoint.resume": {
        *("backends.base", "checkpoint", "checkpoint.allowed", "checkpoint.manifest", "checkpoint.randomness"),
        *("checkpoint.save", "checkpoint.storage", "config", "data.sets", "dist", "errors", "order", "shards"),
    },
    "folder": {
        "check",
        "checkpoint",
        "checkpoint.manifest",
        "checkpoint.save",
        "config",
        "dist",
        "ending",
        "errors",
        "lock",
        "speech",
        "whole",
    },
    "track": {
        *("backends", "check", "config", "dist", "ending", "folder", "meter", "speech", "versions", "track"),
        *(
            f"track.{name}"
            for name in ("bar", "base", "console", "jsonl", "summary", "tensorboard", "wandb", "wandb_file")
        ),
    },
    "assemble": {
        *("backends.probe", "config", "data", "data.feed", "data.sets", "errors"),
        *("look", "lookup", "models", "optim", "order", "own_code", "precision", "weights"),
    },
    "captured": {
        *("backends.base", "config", "data.feed", "errors", "losses", "meter", "optim", "order", "precision"),
    },
    "train": {
        "backends.base",
        "captured",
        "config",
        "data.feed",
        "dist",
        "losses",
        "meter",
        "optim",
        "order",
        "phases",
        "precision",
    },
    "backends": {
        "backends.base",
        "backends.buckets",
        "backends.fit",
        "backends.probe",
        "config",
        "dist",
        "journal",
        "lookup",
        "shards",
    },
    "backends.buckets": {"backends.fit", "backends.probe", "errors"},
    "backends.deepspeed": {
        *("backends.base", "backends.fit", "backends.gradients", "backends.initial", "backends.probe", "config"),
        *("dist", "errors", "journal", "precision", "shards"),
    },
    "backends.gradients": {"errors"},
    "backends.buffers": {"backends.probe", "dist"},
    "backends.base": {
        *("backends.buffers", "backends.initial", "backends.probe", "config", "dist", "journal", "precision", "shards"),
    },
    "backends.initial": {"backends.fit"},
    "backends.probe": {"data.randomness"},
    "backends.fit": {"backends.probe", "config", "errors"},
    "backends.fsdp2": {"backends.base", "dist", "journal", "precision", "shards"},
    "backends.rules": {"backends", "config", "launcher"},
    "doctor": {
        *("assemble", "backends", "backends.base", "check", "checkpoint", "checkpoint.manifest", "checkpoint.save"),
        *("checkpoint.storage", "config", "data.feed", "data.sets", "data.vision", "dist", "ending", "errors"),
        *("folder", "launcher", "losses", "optim", "order", "precision", "rendezvous", "shards"),
        *("doctor.link", "doctor.machine", "doctor.meeting", "doctor.needs", "doctor.peers", "doctor.report"),
        *("doctor", "doctor.subject"),
    },
    "report": {
        *("check", "checkpoint.manifest", "config", "errors", "lock", "strict_yaml", "report.files"),
        *("report.images",),
        *("report.panels", "report.read", "report.summary", "report.text"),
    },
    "bench": {
        "report.png",
        *("assemble", "backends", "backends.base", "check", "checkpoint.resume", "config", "data.feed", "data.sets"),
        *("dist", "ending", "errors", "launcher", "optim", "order", "paths", "phases", "session", "versions"),
        *("bench", "bench.bare", "bench.ranks", "bench.references", "bench.slices", "bench.table", "bench.turns"),
    },
    "bench.bare": set(),
    "bench.slices": set(),
    "data": {
        *("errors", "whole", "data.decoded", "data.idx", "data.image_files", "data.randomness", "data.sets"),
        *("data.generators", "data.reader", "data.server", "data.workers"),
    },
    "data.agree": {"data.feed", "data.sets", "dist", "errors"},
    "models": {"errors"},
}
HEAVY = {"torch", "numpy", "sklearn", "torchvision"}
FREE = {"__main__", "session", "tools", "__init__", ""}


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


def allowed(module: str) -> set[str]:
    """The rule for a module: its own, else its folder's."""
    name = module.removeprefix("dist_train").lstrip(".")
    return MAY_IMPORT[name] if name in MAY_IMPORT else MAY_IMPORT[name.split(".")[0]]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_in_the_designs_direction(module: str):
    if module.removeprefix("dist_train").lstrip(".").split(".")[0] in FREE:
        return
    own = {name.removeprefix("dist_train.") for name in imports(MODULES[module]) if name.startswith("dist_train.")}
    assert own <= allowed(module), f"{module} imports {own - allowed(module)}"


def test_launch_sees_the_config_alone():
    ours = {"dist_train", "launch"}
    seen = {name for path in LAUNCH for name in imports(path) if name.split(".")[0] not in sys.stdlib_module_names}
    others = {name for name in seen if not name.startswith("launch")}
    assert len(LAUNCH) > 5 and others == {"dist_train.config", "dist_train.errors", "yaml"}
    assert not [path for path in MODULES.values() if any(name.split(".")[0] == "launch" for name in imports(path))]
    code = f"import sys, launch.__main__; print(sorted({HEAVY} & sys.modules.keys()), {ours} <= sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] True"


def test_the_rule_sees_a_wrong_import(tmp_path: Path):
    planted = tmp_path / "train.py"
    planted.write_text("def f():\n    from dist_train.backends import ddp\n    import dist_train.track\n")
    assert imports(planted) == {"dist_train.backends.ddp", "dist_train.track"}
    assert not imports(planted) <= {f"dist_train.{name}" for name in MAY_IMPORT["train"]}


def test_the_loop_tells_no_rank_and_no_backend_apart():
    words = {n.id for n in ast.walk(ast.parse((ROOT / "train.py").read_text())) if isinstance(n, ast.Name)}
    names = {n.attr for n in ast.walk(ast.parse((ROOT / "train.py").read_text())) if isinstance(n, ast.Attribute)}
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
        from dist_train import __main__, ending
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
