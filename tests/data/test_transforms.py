"""data.transforms: torchvision.transforms.v2 by name, drawn for each sample."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from dist_train.config.load import load
from dist_train.data.feed import Feed
from dist_train.data.order import Plan
from dist_train.data.randomness import kept_apart, seed_for
from dist_train.data.sets import Columns, Data
from dist_train.data.transforms import Transforms
from dist_train.errors import ConfigError
from dist_train.ranks.launcher import Launcher
from dist_train.run import assemble
from dist_train.run.check import check
from dist_train.tools.agreement import difference

from data_files import made_images, write_images
from parity_cells import TOLERANCE, run_cells, run_single
from workers import run_ranks

CPU = torch.device("cpu")
RANDOM = [
    {"name": "RandomCrop", "size": 6, "padding": 2},
    "RandomHorizontalFlip",
    {"name": "RandomRotation", "degrees": 9},
]
RANDOM_TEXT = "[{name: RandomCrop, size: 8, padding: 2}, RandomHorizontalFlip]"


def masks(root: str) -> Data:
    """Pictures whose target is a picture: whether a pixel is bright."""
    pixels = torch.randint(256, (12, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Data(Columns((pixels, (pixels[:, 0] > 127).long())))


def tenth(image: torch.Tensor) -> torch.Tensor:
    return image.to(torch.float32) / 10


class Brighter:
    def __init__(self, by: int):
        self.by = by

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return image + self.by


def built(*argv: str) -> assemble.Parts:
    config = load(["--train.device", "cpu", *argv])
    check(config, Launcher("none", world_size=1, local_world_size=1), writes=False)
    return assemble.build(config, CPU)


def data_of(*argv: str) -> Data:
    config = load(["--train.device", "cpu", *argv])
    check(config, Launcher("none", world_size=1, local_world_size=1), writes=False)
    return assemble.read_data(config.data, False)


def epoch_of(feed: Feed, n: int, world_size: int, epoch: int) -> dict[int, torch.Tensor]:
    found = {}
    for rank in range(world_size):
        for batch in feed.steps(Plan(n, 0, 16, None, False, rank, world_size), epoch):
            found |= dict(zip(batch.ids.tolist(), batch.tree[0], strict=True)) if batch.size else {}
    return found


def test_it_is_v2s_own():
    """The same numbers as its Compose gives from the same seed."""
    image = torch.arange(192, dtype=torch.uint8).view(3, 8, 8)
    composed = v2.Compose([v2.RandomCrop(6, padding=2), v2.RandomHorizontalFlip(), v2.RandomRotation(9)])
    seen = set()
    for sample in range(8):
        results = []
        for transform in (composed, Transforms(RANDOM, "data.transforms")):
            with kept_apart():
                seed_for(0, 0, sample)
                results.append(transform(image))
        assert torch.equal(*results) and type(results[1]) is torch.Tensor
        seen.add(results[1].numpy().tobytes())
    assert len(seen) > 4


def test_names_within_arguments():
    entries: list[Any] = [{"name": "RandomApply", "transforms": [{"name": "RandomInvert", "p": 1.0}], "p": 1.0}]
    entries += [{"name": "Resize", "size": [4, 4], "interpolation": "nearest"}, {"name": "ToDtype", "dtype": "float32"}]
    entries += [{"name": "Normalize", "mean": [100.0], "std": [2.0]}]
    image = torch.zeros(1, 8, 8, dtype=torch.uint8)
    assert torch.equal(Transforms(entries, "data.transforms")(image), torch.full((1, 4, 4), 77.5))


@pytest.mark.parametrize("workers", [0, 1])
def test_drawn_by_sample_at_any_world_size(workers: int):
    """Of samples in memory too, which are read one by one then."""
    argv = ["--data.transforms", RANDOM_TEXT, "--data.workers", str(workers)]
    feed = built(*argv).feed
    n = len(feed.split)
    whole = epoch_of(feed, n, 1, 0)
    if workers == 0:
        again, later = epoch_of(feed, n, 3, 0), epoch_of(feed, n, 1, 1)
        assert all(torch.equal(whole[i], again[i]) for i in whole) and len(whole) == n
        assert sum(torch.equal(whole[i], later[i]) for i in whole) < n / 10
    plain = built("--data.workers", "0").feed.of(np.arange(n)).tree[0]
    assert sum(torch.equal(whole[i], plain[i]) for i in whole) < n / 10
    assert feed.split.dataset.dataset.leaves and len(built(*argv).data.tests[""]) == 359


def test_parity_of_ranks():
    argv = [
        "--data.transforms",
        RANDOM_TEXT,
        "--train.device",
        "cpu",
        "--track.every_steps",
        "1",
        "--train.threads",
        "1",
    ]
    argv += ["--train.max_steps", "12", "--optim.name", "SGD", "--optim.lr", "0.01", "--model.hidden", "[32]"]
    argv += ["--model.activation", "Tanh", "--train.eval_every_epochs", "null"]
    alone = run_single(load(argv))

    (run,) = run_ranks(run_cells, 2, [load([*argv, "--backend.name", "ddp", "--train.micro_batch_size", "20"])])[0]
    assert difference(run, alone).worst < TOLERANCE["float32"]


def test_a_mask_is_moved_with_its_picture():
    argv = ["--data.name", "test_transforms:masks", "--data.transforms", str(RANDOM[:2]).replace("'", "")]
    found = data_of(*argv)
    moved = 0
    for i in range(12):
        with kept_apart():
            seed_for(0, 0, i)
            image, mask = found.train.dataset[i]
        inside = image[0] > 0  # not of the padding
        assert torch.equal((image[0] > 127).long(), mask) and image.shape == (1, 6, 6) and mask.dtype == torch.int64
        moved += not bool(inside.all())
    assert moved > 3 and found.input_shape == (1, 6, 6) and type(mask) is torch.Tensor


def test_ones_own():
    argv = ["--data.transforms", "[{name: test_transforms:Brighter, by: 5}, test_transforms:tenth]"]
    image = data_of(*argv).train.dataset[3][0]
    assert torch.equal(image, (data_of().train.tree[0][3] + 5).float() / 10)


def test_those_of_csv_images(tmp_path: Path):
    write_images(tmp_path, *made_images(20))
    argv = ["--data.name", "csv_images", "--data.root", str(tmp_path), "--data.args.transform", "user_data:INVERT"]
    crop = "[{name: CenterCrop, size: 10}]"
    found = data_of(*argv, "--data.transforms", crop, "--data.test_transforms", crop)
    assert found.input_shape == (1, 10, 10) and found.tests[""].dataset[0][0].shape == (1, 10, 10)
    inverted = data_of(*argv).train.dataset[0][0]
    assert torch.equal(found.train.dataset[0][0], inverted[:, 9:19, 9:19]) and found.train.draws


@pytest.mark.parametrize(
    ("entries", "line"),
    [
        ("[RandomCorp]", "got unknown transform of torchvision.transforms.v2 'RandomCorp', expected one of"),
        ("[{name: RandomCrop, siez: 3}]", "got {'siez': 3} for RandomCrop, which takes size, padding"),
        ("[{name: RandomHorizontalFlip, p: 3}]", "got {'p': 3} for RandomHorizontalFlip, which refuses them"),
        ("[{name: ToDtype, dtype: float33}]", "ToDtype.dtype: got 'float33', expected one of torch's"),
        ("[{size: 3}]", "got {'size': 3}, expected a name, or one with arguments such as"),
        (
            "[{name: RandomCrop, size: 20}]",
            "RandomCrop does not take the torch.uint8 [1, 8, 8] that it is given: ValueError",
        ),
        ("[{name: test_transforms:Absent}]", "got 'test_transforms:Absent', but there is no 'Absent' in"),
    ],
    ids=["name", "argument", "value", "dtype", "entry", "picture", "own"],
)
def test_refused(entries: str, line: str):
    with pytest.raises(ConfigError) as error:
        built("--data.transforms", entries)
    got = error.value.lines[0]
    assert got.startswith((f"data.transforms: {line}", f"data.transforms {line}")), got
    assert "picture" not in line or got.endswith("sample 0")
