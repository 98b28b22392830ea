"""Start to first step: our package against a bare script of each library, 2 ranks on gloo and the CPU.

python benchmarks/startup.py [--repeats 3] [--libraries ddp fsdp2 accelerate deepspeed]

A time runs from the start of torchrun until rank 0 says that its first step is done. The two sides alternate, so that
what else the machine does falls on both. CPU seconds, which a busy machine changes less, count all of a run, and ours
also evaluates, saves and writes a summary after its one step.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bare import DONE, LIBRARIES

HERE = Path(__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
LIMIT_S = 300


def bare(library: str, folder: str) -> tuple[list[str], str]:
    """The command of the bare script, and what its line about the first step holds."""
    return [str(HERE / "bare.py"), library], DONE


def ours(library: str, folder: str) -> tuple[list[str], str]:
    """The same of our package: the default model and data, digits."""
    options = ["--backend.name", library, *(["--backend.zero_stage", "2"] if library == "deepspeed" else [])]
    options += ["--track.every_steps", "1", "--train.max_steps", "1", "--train.device", "cpu", "--run.dir", folder]
    return ["-m", "dist_train", *options], "step 1/1"


def seconds(command: list[str], mark: str) -> tuple[float, float]:
    """Runs a command to its end. Raises RuntimeError where no line of its output holds `mark`.

    Returns:
        Seconds from its start to that line, and the CPU seconds of all its processes until their end.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    words = ["timeout", str(LIMIT_S), *TORCHRUN, *command]
    begin, cpu_begin = time.perf_counter(), cpu_s()
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as process:
            taken = [time.perf_counter() - begin for line in process.stdout if mark in line]
        if process.returncode != 0 or not taken:
            errors.seek(0)
            got = f"code {process.returncode} and {len(taken)} lines with {mark!r}"
            raise RuntimeError(f"{' '.join(words)}: got {got}, expected 0 and one\n{errors.read()}")
    return taken[0], cpu_s() - cpu_begin


def cpu_s() -> float:
    """CPU seconds of all processes that this one has started and seen end."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def measure(library: str, repeats: int) -> dict[str, list[tuple[float, float]]]:
    """What `seconds` gave on both sides, after one run of each that is not counted: it fills the file caches."""
    times: dict[str, list[tuple[float, float]]] = {"bare": [], "ours": []}
    for repeat in range(repeats + 1):
        for name, side in (("bare", bare), ("ours", ours)):
            with tempfile.TemporaryDirectory() as folder:
                taken = seconds(*side(library, f"{folder}/run"))
            if repeat:
                times[name].append(taken)
    return times


def main() -> None:
    """Prints the table of medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--libraries", nargs="+", choices=list(LIBRARIES), default=list(LIBRARIES))
    arguments = parser.parse_args()
    print("| library | bare, s | ours, s | ours - bare, s | of each pair, s | ours - bare, CPU s of a rank |")
    print("|---|---|---|---|---|---|")
    for library in arguments.libraries:
        times = measure(library, arguments.repeats)
        (a, a_cpu), (b, b_cpu) = (map(statistics.median, zip(*times[side], strict=True)) for side in ("bare", "ours"))
        pairs = ", ".join(f"{y - x:+.1f}" for (x, _), (y, _) in zip(times["bare"], times["ours"], strict=True))
        print(f"| {library} | {a:.1f} | {b:.1f} | {b - a:+.1f} | {pairs} | {(b_cpu - a_cpu) / 2:+.1f} |", flush=True)


if __name__ == "__main__":
    main()
