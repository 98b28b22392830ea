"""The promise on other processors: this one with fewer of its vector instructions, which round otherwise."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# As torch, oneDNN and MKL are told.
SETS = {
    "default": {},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "avx512": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
    },
}
FILES = ("tools/test_parity.py", "launch/test_launch.py", "tools/test_kinks.py")


@pytest.mark.full
@pytest.mark.parametrize("name", SETS)
def test_parity_holds_under_other_instruction_sets(name: str):
    if name not in ("default", *(flag.replace("avx512f", "avx512") for flag in flags())):
        pytest.skip(f"this processor has no {name}")
    tests = Path(__file__).parents[1]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
        *(str(tests / file) for file in FILES),
    ]
    done = subprocess.run(
        command,
        cwd=tests.parent,
        env=os.environ | SETS[name],
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]


def flags() -> set[str]:
    """What this processor has."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return set(next((line for line in lines if line.startswith("flags")), "").split())
