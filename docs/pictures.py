"""python docs/pictures.py [order] [curves] [resume] [report] [--out DIR] [--steps N]

Makes the pictures of docs/ from runs of the project itself, and prints the command of every run. Without a name it
makes all. Needs matplotlib and, for `curves`, deepspeed: pip install 'dist-train[report,deepspeed]'. `report` needs
chromium-headless-shell as well.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

from dist_train.data.order import global_indices, share

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

ROOT = Path(__file__).parent.parent
BROWSER = "chromium-headless-shell"
COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2")
GREY = "#bbbbbb"
TOLERANCE = 1e-5  # of float32; see dist_train/tools/parity.py
# The defaults: AdamW on digits. Each step is a line of metrics; the thread count is fixed, as it changes last bits.
RUN = ("--track.every_steps", "1", "--train.threads", "1", "--train.eval_every_epochs", "null")


def order(out: Path, steps: int) -> None:
    """Which sample goes to which rank: the same rows at every world size."""
    n, batch, seed = 64, 8, 0
    rows = [global_indices(n, seed, epoch=0, step=step, global_batch_size=batch) for step in range(min(steps, 6))]
    fig, panels = plt.subplots(1, 3, figsize=(9, 2.9), sharey=True)
    for axes, world_size in zip(panels, (1, 2, 4), strict=True):
        for y, samples in enumerate(rows):
            for rank in range(world_size):
                part = share(len(samples), rank, world_size)
                axes.barh(y, part.stop - part.start, left=part.start, height=0.9, color=COLOURS[rank], alpha=0.75)
            for x, sample in enumerate(samples):
                axes.text(x + 0.5, y, str(sample), ha="center", va="center", fontsize=9)
        axes.set_title(f"{world_size} rank{'s' if world_size > 1 else ''}", fontsize=11)
        axes.set_xticks([])
        axes.set_yticks(range(len(rows)), [f"step {step}" for step in range(len(rows))], fontsize=9)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_xlim(0, batch)
        axes.margins(y=0.02)
    panels[0].invert_yaxis()
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour, alpha=0.75) for colour in COLOURS]
    fig.legend(handles, [f"rank {rank}" for rank in range(4)], loc="lower center", ncols=4, frameon=False, fontsize=9)
    fig.tight_layout(rect=(0, 0.08, 1, 1))
    _save(fig, out / "order.png")


def curves(out: Path, steps: int) -> None:
    """The loss of one config under several backends, and how far each is from one process."""
    cells = [
        ("DDP, 2 ranks", ("--backend.name", "ddp"), ("float32", "float64")),
        ("FSDP2, 2 ranks", ("--backend.name", "fsdp2"), ("float32", "float64")),
        ("DeepSpeed ZeRO 2, 2 ranks", ("--backend.name", "deepspeed", "--backend.zero_stage", "2"), ("float32",)),
    ]
    with tempfile.TemporaryDirectory() as folder:
        common = (*RUN, "--train.max_steps", str(steps), "--train.epochs", str(steps))
        alone = {}
        for precision in ("float32", "float64"):
            argv = (*common, "--train.precision", precision)
            alone[precision] = _losses(_run(folder, f"single-{precision}", 1, *argv))
        fig, (top, below) = plt.subplots(2, 1, figsize=(8, 5.6), sharex=True, height_ratios=(1, 1.2))
        top.plot(*_line(alone["float32"]), color=GREY, linewidth=6, label="one process")
        styles = zip(COLOURS, ("-", "--", ":"), ("o", "s", "^"), strict=False)
        for (name, argv, precisions), (colour, dash, shape) in zip(cells, styles, strict=True):
            for precision in precisions:
                argv_all = (*common, *argv, "--train.precision", precision)
                losses = _losses(_run(folder, f"{argv[1]}-{precision}", 2, *argv_all))
                label = name if precision == "float32" else None
                marks = {"color": colour, "linestyle": "none", "marker": shape, "markersize": 3.5, "markeredgewidth": 0}
                below.plot(*_difference(losses, alone[precision]), **marks, alpha=0.8, label=label)
                if label is not None:
                    top.plot(*_line(losses), color=colour, linestyle=dash, label=label)
    top.set_ylabel("loss of the step")
    top.legend(frameon=False, fontsize=9)
    below.set_yscale("symlog", linthresh=1e-17, linscale=0.3)
    below.set_yticks([0, 1e-16, 1e-14, 1e-12, 1e-10, 1e-8, 1e-6, 1e-4])
    for tolerance, precision in ((TOLERANCE, "float32"), (1e-9, "float64")):
        below.axhline(tolerance, color="black", linewidth=0.8, linestyle="--")
        below.text(
            0,
            tolerance * 1.5,
            f" tolerance of {precision}: {tolerance:.0e}".replace("e-0", "e-"),
            fontsize=8,
            va="bottom",
        )
    below.text(0, 1e-14, " in float64", fontsize=9, va="bottom")
    below.text(0, 1e-6, " in float32", fontsize=9, va="bottom")
    below.set_ylim(-4e-18, 1e-3)
    below.set_ylabel("relative difference from\none process")
    below.set_xlabel("optimizer step")
    below.legend(frameon=False, fontsize=9, loc="center right", bbox_to_anchor=(1, 0.42))
    fig.align_ylabels()
    fig.tight_layout()
    _save(fig, out / "curves.png")


def resume(out: Path, steps: int) -> None:
    """A run that is killed, and goes on elsewhere, beside one that was left alone."""
    with tempfile.TemporaryDirectory() as folder:
        common = (*RUN, "--train.max_steps", str(steps), "--train.epochs", str(steps))
        saving = (*common, "--checkpoint.every_steps", str(max(1, steps // 8)))
        ddp = ("--backend.name", "ddp")
        whole = _losses(_run(folder, "whole", 4, *saving, *ddp))
        killed = _run(folder, "killed", 4, *saving, *ddp, kill_after=steps * 9 // 16)
        before = _losses(killed)
        shutil.copytree(killed, Path(folder, "again"))
        elsewhere = _losses(_run(folder, "killed", 2, *saving, "--backend.name", "fsdp2"))
        again = _losses(_run(folder, "again", 4, *saving, *ddp))
        assert len(elsewhere) == len(again) == steps
        resumed_at = _resumed_at(Path(folder, "killed.out"))
    fig, (top, below) = plt.subplots(2, 1, figsize=(8, 5), sharex=True)
    after = {step: loss for step, loss in elsewhere.items() if step > resumed_at}
    top.plot(*_line(whole), color=GREY, linewidth=6, label="left alone: DDP, 4 ranks")
    top.plot(*_line(before), color=COLOURS[0], label="DDP, 4 ranks, killed")
    top.plot(*_line(after), color=COLOURS[1], label="goes on: FSDP2, 2 ranks")
    top.legend(frameon=False, fontsize=9)
    top.set_ylabel("loss of the step")
    below.plot(*_difference(again, whole), color=COLOURS[0], linewidth=2, label="goes on: DDP, 4 ranks (no difference)")
    there, far = _difference(elsewhere, whole)
    assert not far[:resumed_at].any()
    below.plot(there[resumed_at:], far[resumed_at:], color=COLOURS[1], linewidth=1, label="goes on: FSDP2, 2 ranks")
    below.set_yscale("symlog", linthresh=1e-8, linscale=0.4)
    below.set_yticks([0, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4])
    below.set_ylim(-2e-9, 1e-4)
    below.axhline(TOLERANCE, color="black", linewidth=0.8, linestyle="--")
    below.text(0, TOLERANCE * 1.2, " tolerance of float32: 1e-5", fontsize=8, va="bottom")
    below.set_ylabel("relative difference from\nthe run left alone")
    below.set_xlabel("optimizer step")
    for axes in (top, below):
        axes.axvline(resumed_at, color="black", linewidth=0.8, linestyle=":")
        axes.axvline(max(before), color="#d62728", linewidth=0.8, linestyle=":")
    height = top.get_ylim()[1]
    top.text(resumed_at, height * 0.6, f"checkpoint {resumed_at} ", fontsize=8, ha="right", va="top")
    top.text(max(before), height * 0.6, f" killed at {max(before)}", fontsize=8, ha="left", va="top", color="#d62728")
    below.legend(frameon=False, fontsize=8, loc="center left")
    fig.align_ylabels()
    fig.tight_layout()
    _save(fig, out / "resume.png")


def report(out: Path, steps: int) -> None:
    """The page that the report command makes, of a run that was killed and went on, and of one with another rate."""
    with tempfile.TemporaryDirectory() as folder:
        common = ("--track.every_steps", "2", "--train.threads", "1", "--train.max_steps", str(steps))
        common = (*common, "--train.epochs", str(steps), "--checkpoint.every_steps", str(max(1, steps // 8)))
        _run(folder, "ddp", 2, *common, kill_after=steps // 3)
        _run(folder, "ddp", 2, *common)
        _run(folder, "slower", 1, *common, "--optim.lr", "0.0003")
        _dist_train(folder, "report", "ddp", "slower")
        page = ["--window-size=1100,1500", "--screenshot=page.png", "report.html"]
        quiet = ["--no-sandbox", "--hide-scrollbars", "--virtual-time-budget=5000"]
        subprocess.run([BROWSER, *quiet, *page], cwd=folder, check=True, capture_output=True)
        with Image.open(Path(folder, "page.png")) as image:
            small = image.convert("RGB").resize((825, 1125), Image.Resampling.LANCZOS)
            small.quantize(128).save(out / "report.png", optimize=True)
    print(f"{out / 'report.png'}  {(out / 'report.png').stat().st_size / 1e3:.0f} kB", flush=True)


PICTURES = {"order": order, "curves": curves, "resume": resume, "report": report}


def _dist_train(folder: str, *argv: str) -> None:
    """A command of dist_train that starts no ranks."""
    print(shlex.join(("python", "-m", "dist_train", *argv)), flush=True)
    subprocess.run([sys.executable, "-m", "dist_train", *argv], cwd=folder, env=_environment(), check=True)


def _environment() -> dict[str, str]:
    """In which this project is found from any folder."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def _run(folder: str, name: str, ranks: int, *argv: str, kill_after: int | None = None) -> Path:
    """A run of dist_train to its end, or killed with all its processes after a step; its folder, within `folder`."""
    start = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}") if ranks > 1 else ()
    words = ("-m", "dist_train", *argv, "--run.dir", name)
    shown = shlex.join((f"torchrun --nproc_per_node={ranks}" if ranks > 1 else "python").split() + list(words))
    print(shown + (f"   # killed after step {kill_after}" if kill_after else ""), flush=True)
    with Path(folder, f"{name}.out").open("w+") as output:
        process = subprocess.Popen(
            [sys.executable, *start, *words], cwd=folder, env=_environment(), stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        while process.poll() is None:
            if kill_after is not None and len(_losses(Path(folder, name))) >= kill_after:
                for group in _groups_below(process.pid):
                    os.killpg(group, signal.SIGKILL)
                process.wait()
                return Path(folder, name)
            time.sleep(0.005)
        output.seek(0)
        assert process.returncode == 0 and kill_after is None, f"{shown}: {process.returncode}\n{output.read()}"
    return Path(folder, name)


def _groups_below(pid: int) -> list[int]:
    """The process groups of a process and of its children: torchrun gives each rank one of its own."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return list(dict.fromkeys([os.getpgid(pid), *(os.getpgid(int(child)) for child in children)]))


def _losses(run: Path) -> dict[int, float]:
    """The loss of each step, by metrics.jsonl."""
    path = run / "metrics.jsonl"
    found = {}
    for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
        if line.endswith("\n") and "train/loss" in (metrics := json.loads(line)):
            found[metrics["step"]] = metrics["train/loss"]
    return found


def _resumed_at(output: Path) -> int:
    line = next(line for line in output.read_text().splitlines() if "resumed from" in line)
    return int(line.partition(": step ")[2].partition(",")[0])


def _line(losses: dict[int, float]) -> tuple[list[int], list[float]]:
    return list(losses), list(losses.values())


def _difference(losses: dict[int, float], expected: dict[int, float]) -> tuple[list[int], np.ndarray]:
    assert losses.keys() == expected.keys()
    a, b = (np.array(list(values.values())) for values in (losses, expected))
    print(f"    largest relative difference {np.max(np.abs(a - b) / np.abs(b)):.1e} in {len(a)} steps", flush=True)
    return list(losses), np.abs(a - b) / np.abs(b)


def _save(fig: plt.Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    for axes in fig.axes:
        _plain(axes)
    fig.savefig(path, dpi=110, metadata={"Software": None})  # the same bytes whatever made them
    plt.close(fig)
    print(f"{path}  {path.stat().st_size / 1e3:.0f} kB", flush=True)


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="of the pictures: " + ", ".join(PICTURES))
    parser.add_argument("--out", type=Path, default=ROOT / "docs/images")
    parser.add_argument("--steps", type=int, default=160, help="of a run")
    given = parser.parse_args()
    if not set(given.names) <= PICTURES.keys():
        parser.error(f"got {' '.join(given.names)}, expected some of {', '.join(PICTURES)}")
    for name in given.names or PICTURES:
        PICTURES[name](given.out, given.steps)


if __name__ == "__main__":
    main()
