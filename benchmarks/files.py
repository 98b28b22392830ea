"""Images in files with 2 workers: our feed against a bare DataLoader of the same data set, batches and workers.

python benchmarks/files.py [--repeats 5] [--batch_size 64] [--workers 2]

Both read, decode and collate the same 9,000 images of $DIST_TRAIN_DATA/mnist_png.tar.gz in the same order, and make
floats in [0, 1] of the pixels. An epoch is timed whole, with the start and the end of its workers: a bare DataLoader
forks them from the training process, ours come from a small server (data/feed.py says why). `kept` is a bare DataLoader
that keeps its workers between epochs. The sides alternate; ratios are of the medians, of the fastest epochs, which
other programs disturbed least, and of each pair.
"""

import argparse
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from dist_train.data.csv_images import csv_images
from dist_train.data.feed import Feed
from dist_train.data.order import Plan
from dist_train.data.sets import Data

SEED = 0


def batches_of(plan: Plan, epoch: int) -> list[list[int]]:
    """The samples of an epoch."""
    return [batch.tolist() for batch in plan.indices(epoch)]


def ours(data: Data, plan: Plan, workers: int) -> Callable[[int], Iterable]:
    """An epoch of our feed."""
    feed = Feed(data.train, data, torch.device("cpu"), torch.float32, False, False, workers, SEED)
    return lambda epoch: feed(plan.indices(epoch), epoch)


def bare(data: Data, plan: Plan, workers: int) -> Callable[[int], Iterable]:
    """An epoch of a DataLoader."""

    def epoch_of(epoch: int) -> Iterable:
        loader = DataLoader(data.train.dataset, batch_sampler=batches_of(plan, epoch), num_workers=workers)
        return ((images.float().div_(255), labels) for images, labels in loader)

    return epoch_of


def kept(data: Data, plan: Plan, workers: int) -> Callable[[int], Iterable]:
    """An epoch of a DataLoader that keeps its workers."""
    order: list[list[int]] = []
    loader = DataLoader(data.train.dataset, batch_sampler=order, num_workers=workers, persistent_workers=workers > 0)

    def epoch_of(epoch: int) -> Iterable:
        order[:] = batches_of(plan, epoch)
        return ((images.float().div_(255), labels) for images, labels in loader)

    return epoch_of


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(Path(os.environ["DIST_TRAIN_DATA"]) / "mnist_png.tar.gz") as tar:
            tar.extraction_filter = getattr(tarfile, "data_filter", None)  # older than Python 3.11.4
            tar.extractall(folder)
        data = csv_images(str(Path(folder) / "mnist_png"), False)
        plan = Plan(len(data.train), SEED, arguments.batch_size, None, False, 0, 1)
        sides = {side.__name__: side(data, plan, arguments.workers) for side in (bare, kept, ours)}
        times: dict[str, list[float]] = {name: [] for name in sides}
        for repeat in range(arguments.repeats + 1):
            sums = set()
            for name, epoch_of in sides.items():
                begin = time.perf_counter()
                sums.add(sum(float(inputs.sum()) + int(labels.sum()) for inputs, labels in epoch_of(repeat)))
                if repeat:  # the first fills the file caches, and starts our server
                    times[name].append(time.perf_counter() - begin)
            assert len(sums) == 1, "the sides read different samples"
    print(f"{len(data.train):,} images, batches of {arguments.batch_size}, {arguments.workers} workers\n")
    print("| | images/s, median | of bare: medians | fastest | each pair |")
    print("|---|---|---|---|---|")
    for name, seconds in times.items():
        pairs = ", ".join(f"{b / s:.2f}" for b, s in zip(times["bare"], seconds, strict=True))
        of = [f(times["bare"]) / f(seconds) for f in (statistics.median, min)]
        rate = len(data.train) / statistics.median(seconds)
        print(f"| {name} | {rate:,.0f} | {of[0]:.2f} | {of[1]:.2f} | {pairs} |")


if __name__ == "__main__":
    main()
