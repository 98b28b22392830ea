"""What every test gets: workers that end with the session, an environment that is put back, nothing left running."""

import functools
import multiprocessing
import os
import subprocess
from pathlib import Path

import pytest
import torch

from checkpoint_runs import cut_off, reference
from slurm_lab import slurm, slurm_cluster  # noqa: F401  (fixtures)
from workers import PARENT, WORKERS
from zygote import Zygote

torch.set_num_threads(1)  # as the workers: the number of threads decides the last bits

# They begin first, so that no process of pytest is left alone with a long one at the end.
LONGEST = (
    *("backends/test_zoo.py", "launch/test_slurm.py", "checkpoint/test_resume.py", "backends/test_compile.py"),
    *("tools/test_parity_command.py", "test_docs.py", "test_users.py", "loop/test_draws.py", "loop/test_muon.py"),
    *("launch/test_launch.py", "checkpoint/test_checkpoint_faults.py", "tools/test_export.py", "tools/test_parity.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]):
    """Puts the longest files first."""
    place = {Path(__file__).parent / name: i for i, name in enumerate(LONGEST)}
    assert all(path.exists() for path in place)
    items.sort(key=lambda item: place.get(item.path, len(place)))


@pytest.fixture(scope="session", autouse=True)
def no_leftovers():
    """Ends the worker processes after the last test, and looks for leftovers."""
    yield
    for pool in WORKERS.values():
        pool.close()
    PARENT.close()
    # What Python keeps as long as this process lives: they end with it.
    kept = "multiprocessing.resource_tracker", "multiprocessing.forkserver"
    left = [child for child in _children() if not any(name in child for name in kept)]
    left += [str(worker) for worker in multiprocessing.active_children()]
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


@pytest.fixture(scope="session")
def zygote():
    """The process that runs are forked from."""
    process = Zygote()
    yield process
    process.close()


@pytest.fixture(scope="session")
def with_libraries():
    """One that has imported Accelerate, DeepSpeed and what users bring; that of the workers."""
    return PARENT


@pytest.fixture(scope="session")
def references(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory):
    """By kind of run, one that nothing disturbed. Each is made once."""
    return functools.cache(lambda kind: reference(zygote, kind, tmp_path_factory.mktemp("reference")))


@pytest.fixture(scope="session")
def cut(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory):
    """By kind of run, the folder of one that was killed after step 9: to be copied. Each is made once."""
    return functools.cache(lambda kind: cut_off(zygote, kind, tmp_path_factory.mktemp("cut") / "run"))


@pytest.fixture
def mounts():
    """Mounts file systems, which are gone after the test."""
    if os.geteuid() != 0:
        pytest.skip("mounting a file system needs root")
    done: list[Path] = []

    def mount(place: Path, *options: str) -> Path:
        place.mkdir(exist_ok=True)
        made = subprocess.run(["mount", *options, str(place)], capture_output=True, text=True)
        if made.returncode:
            pytest.skip(f"no file system can be mounted here: {made.stderr.strip()}")
        if place not in done:
            done.append(place)
        return place

    yield mount
    for place in reversed(done):
        subprocess.run(["umount", "-l", str(place)], check=True)
