"""A training run, described once, with the same result under every backend and at every world size.

In a script or a notebook:

    import dist_train

    outcome = dist_train.fit("config.yaml", train={"epochs": 3})      # the whole run
    with dist_train.session("config.yaml") as run:                    # or a loop of one's own
        for step in run.steps(): ...

Names are imported when they are first used: `import dist_train` takes milliseconds, and imports no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dist_train.config.tree import Config as Config
    from dist_train.data.batch import Batch as Batch
    from dist_train.data.sets import Columns as Columns
    from dist_train.data.sets import Data as Data
    from dist_train.data.sets import Samples as Samples
    from dist_train.errors import ConfigError as ConfigError
    from dist_train.errors import RankError as RankError
    from dist_train.face.fit import fit as fit
    from dist_train.face.launch import launch as launch
    from dist_train.face.session import Session as Session
    from dist_train.face.session import Step as Step
    from dist_train.face.session import session as session
    from dist_train.run.hooks import Hook as Hook
    from dist_train.run.outcome import Outcome as Outcome
    from dist_train.run.running import Run as Run
    from dist_train.tasks.base import Task as Task
    from dist_train.tasks.panels import Plot as Plot
    from dist_train.tasks.panels import Table as Table

__version__ = "0.1.0"

# Where each public name stands.
_HOMES = {
    "fit": "dist_train.face.fit",
    "session": "dist_train.face.session",
    "launch": "dist_train.face.launch",
    "Config": "dist_train.config.tree",
    "Outcome": "dist_train.run.outcome",
    "Session": "dist_train.face.session",
    "Step": "dist_train.face.session",
    "Run": "dist_train.run.running",
    "Hook": "dist_train.run.hooks",
    "Task": "dist_train.tasks.base",
    "Table": "dist_train.tasks.panels",
    "Plot": "dist_train.tasks.panels",
    "Batch": "dist_train.data.batch",
    "Data": "dist_train.data.sets",
    "Columns": "dist_train.data.sets",
    "Samples": "dist_train.data.sets",
    "ConfigError": "dist_train.errors",
    "RankError": "dist_train.errors",
}

__all__ = [
    "Batch",
    "Columns",
    "Config",
    "ConfigError",
    "Data",
    "Hook",
    "Outcome",
    "Plot",
    "RankError",
    "Run",
    "Samples",
    "Session",
    "Step",
    "Table",
    "Task",
    "fit",
    "launch",
    "session",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dist_train' has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
