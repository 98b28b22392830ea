"""A node holds its data once. What that means in a rank's memory:

RSS counts a page in every process that has it mapped, so it cannot tell a page that 4 ranks share from 4 copies. Linux
tells them apart: PSS counts a page shared by 4 as a quarter, so that the sum over the ranks is what the node holds;
private memory is what no other process shares.
"""

import json
from pathlib import Path

import pytest
import torch

from dist_train.data import idx

from data_files import idx as packed
from data_files import write_raw
from zygote import Run, Zygote

RANKS = 4
BATCH = 2048
EVALUATED = 1000  # at once on a rank
STEPS = 30  # an epoch of 60,000
LIMIT_BYTES = 20e6
PIXELS_BYTES = 70_000 * 784


def held(zygote: Zygote, root: Path, folder: Path, steps: int = STEPS, copies: bool = False) -> list[dict]:
    """What each rank held in a run that ends with an evaluation and a checkpoint; see `report_memory`."""
    folder.mkdir()
    reports = [folder / f"memory{rank}" for rank in range(RANKS)]
    argv = ["--data.name", "mnist", "--data.root", str(root), "--model.hidden", "[8]", "--run.dir", str(folder / "run")]
    argv += ["--train.device", "cpu", "--train.threads", "1", "--train.global_batch_size", str(BATCH)]
    argv += ["--train.max_steps", str(steps), "--train.epochs", str(steps), "--train.eval_every_epochs", str(STEPS)]
    argv += ["--checkpoint.every_steps", str(steps), "--train.eval_batch_size", str(EVALUATED)]
    plant = {rank: ("report_memory", str(path), copies) for rank, path in enumerate(reports)}
    zygote.run(Run(argv, RANKS, plant))[0].check()
    return [json.loads(path.read_text()) for path in reports]


def peak(ranks: list[dict], kind: str) -> float:
    """Bytes of a kind of memory that a rank held at most, by the mean over the ranks at each moment."""
    moments = zip(*(rank["moments"] for rank in ranks), strict=True)
    return max(sum(rank[kind] for rank in moment) for moment in moments) / len(ranks)


def growth(empty: list[dict], full: list[dict]) -> tuple[float, float, float]:
    """Bytes a rank by which 60,000 images raise PSS, private memory, and the peak of RSS above the mapped pixels."""
    pss, private = (peak(full, kind) - peak(empty, kind) for kind in ("Pss", "Private_Dirty"))
    rss = max(rank["peak_rss"] for rank in full) - max(rank["peak_rss"] for rank in empty)
    return pss, private, rss - PIXELS_BYTES


def test_sixty_thousand_images_are_in_memory_once(zygote: Zygote, tmp_path: Path):
    few, many = tmp_path / "few", tmp_path / "many"
    write_raw(few / "MNIST" / "raw", BATCH, EVALUATED * RANKS)
    write_raw(many / "MNIST" / "raw", 60_000, 10_000)
    empty, full = held(zygote, few, tmp_path / "empty"), held(zygote, many, tmp_path / "full")
    assert max(growth(empty, full)) < LIMIT_BYTES
    assert peak(full, "Pss") - peak(empty, "Pss") > 0.8 * PIXELS_BYTES / RANKS  # PSS does count them
    assert [rank["written"] for rank in full] == [0] * RANKS
    copied = held(zygote, many, tmp_path / "copied", 1, copies=True)
    assert min(growth(empty, copied)[:2]) > 2 * LIMIT_BYTES
    assert [rank["written"] for rank in copied] == [None] * RANKS  # nothing is mapped


def test_writing_to_a_mapped_file_leaves_the_file(tmp_path: Path):
    """It is a mistake of who does it; it neither ends the process nor changes the data of other ranks."""
    pixels = torch.arange(60, dtype=torch.uint8).view(3, 4, 5)
    (tmp_path / "file").write_bytes(packed(pixels))
    tensor, other = (idx.mapped(tmp_path / "file", 3) for _ in range(2))
    tensor += 1
    assert torch.equal(tensor, pixels + 1) and torch.equal(other, pixels)
    assert (tmp_path / "file").read_bytes() == packed(pixels)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "got the first bytes "),
        (packed(torch.zeros(2, 3, dtype=torch.uint8)), "got the first bytes 00 00 08 02, expected 00 00 08 03"),
        (bytes([0, 0, 9]) + packed(torch.zeros(1, 1, 1, dtype=torch.uint8))[3:], "got the first bytes 00 00 09 03"),
        (packed(torch.zeros(2, 3, 4, dtype=torch.uint8))[:-1], "got 39 bytes, expected 40 for [2, 3, 4]"),
        (packed(torch.zeros(2, 3, 4, dtype=torch.uint8)) + b"0", "got 41 bytes, expected 40 for [2, 3, 4]"),
    ],
    ids=["empty", "labels", "another type", "cut off", "too long"],
)
def test_a_file_that_is_no_whole_idx_file(content: bytes, says: str, tmp_path: Path):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError) as error:
        idx.mapped(tmp_path / "file", 3)
    assert says in str(error.value)
