"""What every test gets: workers that end with the session, an environment that is put back, nothing left running."""

import os
from pathlib import Path

import pytest
import torch

from ranks import WORKERS
from slurm_lab import slurm, slurm_cluster  # noqa: F401  (fixtures)

torch.set_num_threads(1)  # as the workers: the number of threads decides the last bits


@pytest.fixture(scope="session", autouse=True)
def workers():
    """Ends the worker processes after the last test, and looks for leftovers."""
    yield
    for pool in WORKERS.values():
        pool.close()
    left = [child for child in _children() if "resource_tracker" not in child]
    assert not left, f"processes left behind: {left}"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch):
    """No launcher's variables from outside; those that a test sets are put back."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def _children() -> list[str]:
    """Command lines of this process's living children."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        for pid in (task / "children").read_text().split():
            found.append(Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " "))
    return found
