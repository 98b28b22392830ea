"""Images in folders, one for each class: the layout of torchvision's ImageFolder."""

import os
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from dist_train.data.csv_images import held_out, identity
from dist_train.data.image_files import MODES, ImageFiles, Row
from dist_train.data.randomness import kept_apart
from dist_train.data.sets import Data, Samples
from dist_train.errors import ConfigError

TESTS = ("test", "val")


def image_folder(
    root: str,
    download: bool,
    folder: str = ".",
    train: str = "train",
    test: str | None = None,
    test_fraction: float = 0.1,
    mode: str = "RGB",
    upright: bool = True,
    mean: tuple[float, ...] = (0.0,),
    std: tuple[float, ...] = (1.0,),
    transforms: Callable | None = None,
    test_transforms: Callable | None = None,
) -> Data:
    """Your own images, in a folder for each class.

    `train/cat/1.png` is an image of the class cat. Files that are no images by their name are left out, and so is what
    begins with a dot. Classes are numbered in the sorted order of their names.

    Args:
        root: folder that `folder` starts from.
        download: not used.
        folder: with the folders `train` and `test`, or with those of the classes.
        train: the folder of the training images. Where it is not there, `folder` has the folders of the classes.
        test: the folder of the test images (null: test or val, if there is one; else a part of the others is held out).
        test_fraction: the share of images that is held out, the same ones in every run.
        mode: how images are decoded: UNCHANGED, GRAY, GRAY_ALPHA, RGB or RGB_ALPHA.
        upright: turn photographs as their EXIF orientation says; false leaves them as stored.
        mean: subtracted from pixels in [0, 1] (data.normalize): a number per channel, or one for all.
        std: what they are then divided by, likewise.
        transforms: data.transforms.
        test_transforms: data.test_transforms.

    Raises:
        ConfigError: a folder without images, or an image that cannot be read, which is named.
    """
    if mode not in MODES:
        raise ConfigError(f"data.args.mode: got {mode!r}, expected one of {', '.join(MODES)}")
    base = Path(root) / folder
    home = base / train if (base / train).is_dir() else base
    found = [name for name in TESTS if (base / name).is_dir()]
    tests = base / test if test is not None else base / found[0] if found and home != base else None
    names = _classes(home)
    rows = _rows(home, names)
    if tests is None:
        rows, test_rows = held_out(rows, test_fraction, "give data.args.test")
    else:
        test_rows = _rows(tests, names)
    number = {name: i for i, name in enumerate(names)}

    def files(some: list[Row], image: Callable | None, shape: tuple[int, ...] | None) -> ImageFiles:
        return ImageFiles(some, Path("."), mode, upright, image, None, number, shape)

    with kept_apart():  # transforms may draw
        shape = tuple(files(rows[:1], transforms, None)[0][0].shape)
    train, test = files(rows, transforms, shape), files(test_rows, test_transforms, shape)
    return Data(
        Samples(train, _named(rows, base), draws=transforms is not None, describe=train.path),
        Samples(test, _named(test_rows, base), draws=test_transforms is not None, describe=test.path),
        input_shape=shape,
        classes=names,
        mean=tuple(mean),
        std=tuple(std),
    )


def _classes(home: Path) -> tuple[str, ...]:
    """The folders of a folder. Raises ConfigError."""
    try:
        names = sorted(path.name for path in home.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise ConfigError(
            f"data.root: got {home}, which cannot be read: {error.strerror}; expected a folder for each class in it, "
            f"or in its folder train"
        ) from None
    if len(names) < 2:
        raise ConfigError(
            f"data.root: got {home} with {len(names)} folders, expected one for each class, such as {home / 'cat'} and "
            f"{home / 'dog'}; or the place of train by --data.args.train"
        )
    return tuple(names)


def _rows(home: Path, names: tuple[str, ...]) -> list[Row]:
    """The images of a split, in an order that is the same everywhere. Raises ConfigError."""
    strange = sorted(set(_classes(home)) - set(names))
    if strange:
        raise ConfigError(
            f"data.root: got the folder {home / strange[0]}, a class without training images; expected folders named "
            f"{', '.join(names[:10])}; move it, or add images to train on"
        )
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    rows = []
    for name in names:
        files = sorted(
            path
            for path in (home / name).rglob("*")
            if path.suffix.lower() in endings and not path.name.startswith(".") and path.is_file()
        )
        rows += [Row(str(home / name), str(path), name) for path in files]
    if not rows:
        raise ConfigError(
            f"data.root: got {home} without images in its folders, expected files such as {names[0]}/1.png"
        )
    return rows


def _named(rows: list[Row], base: Path) -> str:
    """The same wherever the folder lies."""
    return identity([row._replace(path=os.path.relpath(row.path, base)) for row in rows])
