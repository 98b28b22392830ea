"""Start to first step, on the CPU: our package against `import torch` alone, and against a bare script of each library.

python benchmarks/startup.py [--repeats 3] [--libraries alone ddp fsdp2 accelerate deepspeed]

`alone` is one process of ours beside one that imports torch and ends. The libraries have 2 ranks on gloo, and a bare
script of each beside ours. A time runs from the start of the command until rank 0 says that its first step is done. The
sides alternate, so that what else the machine does falls on all. CPU seconds, which a busy machine changes less, count
all of a run, and ours also evaluates, saves and writes a summary after its one step. Fashion-MNIST is measured where
$DIST_TRAIN_DATA has it.
"""

import argparse
import gzip
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from bare import DONE, LIBRARIES

HERE = Path(__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
LIMIT_S = 300
MARK = "step 1/1"
# Both sides leave without taking Python down, as our package does.
IMPORTED = "imported"
IMPORT = f"import os, torch; print({IMPORTED!r}, flush=True); os._exit(0)"
Command = tuple[list[str], str]  # and what its line about the first step holds


def bare(library: str, folder: str) -> Command:
    """The bare script."""
    return [*TORCHRUN, str(HERE / "bare.py"), library], DONE


def ours(library: str, folder: str) -> Command:
    """Our package: the default model and data, digits."""
    stage = ["--backend.zero_stage", "2"] if library == "deepspeed" else []
    return [*TORCHRUN, *one_step(folder, "--backend.name", library, *stage)], MARK


def one_step(folder: str, *options: str) -> list[str]:
    """What follows `python` or torchrun for one step of ours."""
    more = ["--track.every_steps", "1", "--train.max_steps", "1", "--train.device", "cpu", "--run.dir", folder]
    return ["-m", "dist_train", *options, *more]


def alone(data: Path | None) -> dict[str, Callable[[str], Command]]:
    """The commands of one process, by name, each from the folder that it may write in."""
    python = sys.executable
    sides: dict[str, Callable[[str], Command]] = {
        "import torch": lambda folder: ([python, "-c", IMPORT], IMPORTED),
        "digits": lambda folder: ([python, *one_step(folder)], MARK),
    }
    if data is not None:
        of = ("--data.name", "fashion_mnist", "--data.root", str(data))
        sides["fashion_mnist"] = lambda folder: ([python, *one_step(folder, *of)], MARK)
    return sides


def unpacked(folder: Path) -> Path | None:
    """A data.root with Fashion-MNIST as it is after a first run; None where there is none to unpack."""
    packed = Path(os.environ.get("DIST_TRAIN_DATA", "")) / "FashionMNIST/raw"
    raw = folder / "FashionMNIST/raw"
    raw.mkdir(parents=True)
    for file in packed.glob("*.gz"):
        (raw / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
    return folder if any(raw.iterdir()) else None


def seconds(command: list[str], mark: str) -> tuple[float, float]:
    """Runs a command to its end. Raises RuntimeError where no line of its output holds `mark`.

    Returns:
        Seconds from its start to that line, and the CPU seconds of all its processes until their end.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    words = ["timeout", str(LIMIT_S), *command]
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


def measure(sides: dict[str, Callable[[str], Command]], repeats: int) -> dict[str, list[tuple[float, float]]]:
    """What `seconds` gave on all sides, after one run of each that is not counted: it fills the file caches."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, side in sides.items():
            with tempfile.TemporaryDirectory() as folder:
                taken = seconds(*side(f"{folder}/run"))
            if repeat:
                times[name].append(taken)
    return times


def row(times: dict[str, list[tuple[float, float]]], base: str, name: str, ranks: int) -> str:
    """Medians, each pair, and CPU seconds of a rank, as cells of a table."""
    (a, a_cpu), (b, b_cpu) = (map(statistics.median, zip(*times[side], strict=True)) for side in (base, name))
    pairs = [y - x for (x, _), (y, _) in zip(times[base], times[name], strict=True)]
    each = ", ".join(f"{pair:+.1f}" for pair in pairs)
    return f"{a:.1f} | {b:.1f} | {statistics.median(pairs):+.2f} | {each} | {(b_cpu - a_cpu) / ranks:+.2f}"


def main() -> None:
    """Prints the tables of medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    names = ["alone", *LIBRARIES]
    parser.add_argument("--libraries", nargs="+", choices=names, default=names)
    arguments = parser.parse_args()
    if "alone" in arguments.libraries:
        print("| one process | import torch, s | ours, s | median of pairs, s | of each pair, s | CPU s |")
        print("|---|---|---|---|---|---|")
        with tempfile.TemporaryDirectory() as folder:
            times = measure(alone(unpacked(Path(folder))), arguments.repeats)
        for name in [side for side in times if side != "import torch"]:
            print(f"| {name} | {row(times, 'import torch', name, 1)} |", flush=True)
    libraries = [name for name in arguments.libraries if name != "alone"]
    if libraries:
        print("\n| library | bare, s | ours, s | median of pairs, s | of each pair, s | CPU s of a rank |")
        print("|---|---|---|---|---|---|")
    for library in libraries:
        times = measure({"bare": partial(bare, library), "ours": partial(ours, library)}, arguments.repeats)
        print(f"| {library} | {row(times, 'bare', 'ours', 2)} |", flush=True)


if __name__ == "__main__":
    main()
