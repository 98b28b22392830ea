"""The data set: there, whole, readable. Nothing is downloaded."""

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dist_train.config.tree import Config
from dist_train.data import vision
from dist_train.data.sets import Data, Samples, Split
from dist_train.doctor.report import Line, size
from dist_train.errors import ConfigError


def check(config: Config, data: Data | Exception) -> Iterator[Line]:
    """What is in the folder, then what came of reading it.

    Args:
        config: the run.
        data: the data set, or what reading it raised.
    """
    cfg = config.data
    if cfg.name in vision.KINDS:
        found = list(archives(config))
        yield from found
        if isinstance(data, Exception) and any(line.status != "pass" for line in found):
            return  # the line above is the reason
    if isinstance(data, Exception):
        lines = data.lines if isinstance(data, ConfigError) else (f"data.name: {cfg.name} raises {data!r}",)
        for text in lines:
            yield Line("fail", "data set", text, "--data.root FOLDER   of the data, or mend what the line names")
        return
    tests = "".join(f", {len(split):,} to test{f' as {name}' if name else ''}" for name, split in data.tests.items())
    counts = f"{len(data.train):,} samples to train on{tests}"
    facts: dict[str, Any] = {name: len(split) for name, split in data.splits.items()}
    if data.input_shape is not None:
        counts += f", {list(data.input_shape)}"
        facts["input_shape"] = list(data.input_shape)
    classes = f", {len(data.classes)} classes" if data.classes else ""
    yield Line("pass", "data set", f"{cfg.name}: {counts}{classes}", facts=facts)
    for name, split in data.splits.items():
        yield from _samples(name, split)


def archives(config: Config) -> Iterator[Line]:
    """The checksums of a data set that torchvision downloads, and what was unpacked from it."""
    cfg = config.data
    folder, wanted = vision.archives_of(cfg.name, cfg.root)
    absent, whole, damaged, differing = [], [], [], []
    for name, md5 in wanted.items():
        archive, unpacked = folder / name, folder / name.removesuffix(".gz")
        if not archive.is_file():
            absent += [] if unpacked != archive and unpacked.is_file() else [name]
        elif not vision.check_integrity(archive, md5):
            damaged.append(name)
        elif unpacked != archive and unpacked.is_file() and not _same(archive, unpacked):
            differing.append(unpacked.name)
        else:
            whole.append(archive)
    again = "the next run downloads it" if cfg.download else "get it again, or add --data.download true"
    for name in damaged:
        what = f"{folder / name} has a wrong checksum, expected md5 {wanted[name]}"
        yield Line("fail", "checksums", what, f"rm {folder / name}   {again}")
    for name in differing:
        what = f"{folder / name} is not what {name}.gz beside it holds"
        yield Line("fail", "checksums", what, f"rm {folder / name}   the next run unpacks it again")
    if absent:
        what = f"{', '.join(absent)} not in {folder}"
        if cfg.download:
            get = f"from dist_train.data import vision; vision.{cfg.name}({cfg.root!r}, True)"
            mend = f'python -c "{get}"   downloads it now; or --data.root FOLDER   that has it'
            yield Line("warn", "data set", f"{what}; downloaded when the run starts", mend)
        else:
            mend = "--data.root FOLDER   that has them, or --data.download true"
            yield Line("fail", "data set", f"{what}, and data.download is false", mend)
    elif whole and not damaged and not differing:
        total = sum(path.stat().st_size for path in whole)
        what = f"{len(whole)} archives in {folder}, {size(total)}, all right"
        yield Line("pass", "checksums", what, facts={"bytes": total, "files": len(whole)})


def _same(archive: Path, unpacked: Path) -> bool:
    with gzip.open(archive) as packed, unpacked.open("rb") as file:
        while block := packed.read(1 << 20):
            if block != file.read(len(block)):
                return False
        return not file.read(1)


def _samples(split: str, samples: Split) -> Iterator[Line]:
    """The first and the last of a split from files can be read."""
    if not isinstance(samples, Samples):
        return
    try:
        for index in (0, len(samples) - 1):
            samples.dataset[index]
    except ConfigError as error:
        yield Line("fail", f"{split} samples", error.lines[0], "mend the file, or take its line out")
        return
    yield Line("pass", f"{split} samples", "the first and the last can be read")
