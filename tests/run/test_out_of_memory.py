"""A run that ends out of memory says what took it, and what would take less."""

import re
from pathlib import Path

import pytest

from zygote import Ended, Run, Zygote

WAITS = {"timeout_s": 120.0}
ARGV = (
    *("--data.name", "synthetic", "--data.args", "{n: 4096, n_test: 9, shape: [1, 6, 6], classes: 5}"),
    *("--model.hidden", "[2048]", "--train.global_batch_size", "4096", "--train.max_steps", "4"),
    *("--train.device", "cpu", "--train.threads", "1", "--optim.name", "AdamW"),
)
SIZE = r"[\d.,]+ (?:bytes|KiB|MiB|GiB)"


def told(ended: Ended, rank: int = 0) -> list[str]:
    """The lines about memory, below the traceback of the error that was first."""
    assert ended.codes[rank] == 1, ended
    text = ended.err[rank]
    assert "The above exception was the direct cause" in text
    lines = [line.removeprefix(f"[rank {rank}] ") for line in text.splitlines()]
    first = next(i for i, line in enumerate(lines) if line.startswith("dist_train.errors.OutOfMemoryError: "))
    return lines[first:]


def number(text: str) -> float:
    count, unit = text.split()
    return float(count.replace(",", "")) * {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}[unit]


def test_a_process_without_memory(zygote: Zygote, tmp_path: Path):
    """A real limit, met by an allocation of 32 MiB in the forward of the third step."""
    plant = {0: ("at_phase", "forward", 2, "memory_is_full")}
    (ended,) = zygote.run(Run([*ARGV, "--run.dir", str(tmp_path / "run")], plant=plant, **WAITS))
    assert "DefaultCPUAllocator: can't allocate memory" in ended.err[0]
    first, second, *others = told(ended)
    found = re.fullmatch(
        rf"dist_train\.errors\.OutOfMemoryError: out of memory in step 3 \(forward\) on cpu\. On this rank: weights "
        rf"({SIZE}), gradients ({SIZE}), optimizer state ({SIZE}), the rest ({SIZE}): activations and what is made of "
        rf"them, and ({SIZE}) that were there before the run began",
        first,
    )
    assert found, first
    weights, gradients, optimizer, rest, program = map(number, found.groups())
    numbers = 4 * (36 * 2048 + 2048 + 2048 * 5 + 5)
    assert weights == pytest.approx(numbers, rel=0.05) and gradients == 0
    assert optimizer == pytest.approx(2 * numbers, rel=0.05)
    assert 0 < program <= rest
    assert second == "no single change frees the 32.0 MiB that were asked for; several together may"
    assert others[0].startswith("or: --train.micro_batch_size 2048 (4096 samples at once now) (frees about ")
    assert others[1].startswith("or: torchrun --nproc_per_node=2 ... --backend.name fsdp2, which shares weights, ")
    assert len(others) == 2, "an MLP has no blocks, and one process no shards to keep on the CPU"


def test_one_rank_of_two(zygote: Zygote, tmp_path: Path):
    """It says so itself; the other has lost it. After the backward, gradients are there."""
    plant = {1: ("at_phase", "optimizer", 1, "device_is_full")}
    argv = ("--model.blocks", "[layers]", "--train.micro_batch_size", "1000", "--backend.name", "fsdp2")
    (ended,) = zygote.run(Run([*ARGV, *argv, "--run.dir", str(tmp_path / "run")], 2, plant, **WAITS))
    assert "stands above" in ended.err[0] and "OutOfMemory" not in ended.err[0]
    assert "torch.OutOfMemoryError: CUDA out of memory" in ended.err[1].replace("torch.cuda.", "torch.")
    first, second, *others = told(ended, 1)
    weights, gradients, optimizer, *_ = map(number, re.findall(SIZE, first))
    assert "out of memory in step 2 (optimizer)" in first
    assert gradients == weights and optimizer == pytest.approx(2 * weights, rel=0.01)
    assert second.startswith("the smallest change that should fit: --train.micro_batch_size 500 (1000 samples at once")
    assert others[0].startswith("or: --backend.recompute blocks, which changes no bit")
    assert others[1].startswith("or: more ranks to share weights, gradients and optimizer state among: 4 (frees about")


def test_another_error_is_none_of_memory(zygote: Zygote, tmp_path: Path):
    plant = {0: ("at_phase", "forward", 1, "raise")}
    (ended,) = zygote.run(Run([*ARGV, "--run.dir", str(tmp_path / "run")], plant=plant, **WAITS))
    assert ended.codes == [1] and "RuntimeError: planted" in ended.err[0] and "OutOfMemory" not in ended.err[0]
