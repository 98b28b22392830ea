"""A map-style data set of image files, in which a bad image is named with its row."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset

from dist_train.errors import ConfigError, TransformError

# Pillow's name of each way to decode. Not torchvision.io.decode_image, which has the same names: a damaged PNG makes it
# end the process by a segmentation fault, and torchvision 0.29 says that it will be removed.
MODES = {"UNCHANGED": None, "GRAY": "L", "GRAY_ALPHA": "LA", "RGB": "RGB", "RGB_ALPHA": "RGBA"}
# Pillow gives 32-bit integers for some files of 16-bit pixels (PNG before Pillow 11, PGM).
SIXTEEN_BIT_AS_I = ("PNG", "PPM")
ORIENTATION = 0x0112  # EXIF's tag
# How a viewer turns what is stored, by the tag's value.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Pillow's usual formats, now: the workers of every epoch are forked from a process that has this module, and would each
# import them at their first image.
Image.preinit()


class Row(NamedTuple):
    """A row of an annotations file.

    Args:
        source: the annotations file and the row's line in it.
        path: of the image.
        label: as it stands there.
    """

    source: str
    path: str
    label: str


class Rows(Sequence[Row]):
    """Rows as text in one tensor, a quarter of the size of objects. A worker is given the tensor's memory: to send it
    the objects, at the start of every epoch, would take longer than to start the worker.

    Args:
        rows: whose texts hold no NUL, as no CSV file does.
    """

    def __init__(self, rows: Iterable[Row]):
        lines = ["\0".join(row).encode() for row in rows]
        self.text = torch.frombuffer(bytearray(b"".join(lines)), dtype=torch.uint8)
        self.ends = torch.tensor([0, *map(len, lines)]).cumsum(0)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> Row:  # type: ignore[override]  (no slices)
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        start, end = self.ends.numpy()[[index % len(self), index % len(self) + 1]]
        return Row(*self.text.numpy()[start:end].tobytes().decode().split("\0"))


class ImageFiles(Dataset[tuple[torch.Tensor, Any]]):
    """Item i is (image, target) of row i.

    Args:
        rows: the samples.
        folder: where the rows' paths start.
        mode: how images are decoded, a key of MODES.
        upright: turn images as their EXIF orientation says.
        transform: of the decoded image, as `read_image` gives it; None leaves it as it is.
        target_transform: of the class number; None leaves it as it is.
        number: class number by label.
        shape: what every image must have after its transform; None for any.
    """

    def __init__(
        self,
        rows: list[Row],
        folder: Path,
        mode: str,
        upright: bool,
        transform: Callable | None,
        target_transform: Callable | None,
        number: dict[str, int],
        shape: tuple[int, ...] | None,
    ):
        self.rows, self.folder, self.mode, self.number, self.shape = Rows(rows), folder, mode, number, shape
        self.upright, self.transform, self.target_transform = upright, transform, target_transform

    def __len__(self) -> int:
        return len(self.rows)

    def path(self, index: int) -> str:
        """Of the image's file."""
        return str(self.folder / self.rows[index].path)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Any]:
        row = self.rows[index]
        path = self.folder / row.path
        try:
            image = read_image(path, self.mode, self.upright)
        except Exception as error:  # damaged files raise OSError, SyntaxError, struct.error, zlib.error, ...
            raise ConfigError(
                f"{row.source}: got {path}, expected an image that can be decoded: {_reason(error)}; "
                f"mend the file, or take it out"
            ) from error
        if self.transform:
            try:
                image = self.transform(image)
            except TransformError as error:
                raise ConfigError(f"{error}; {row.source}: {path}") from error
            if not isinstance(image, torch.Tensor):
                raise ConfigError(
                    f"data.args.transform: got {type(image).__name__} from it, expected a tensor; "
                    f"give an object that takes an image, not its class"
                )
        elif image.dtype not in (torch.uint8, torch.float32):
            deep = image.dtype == torch.uint16
            mend = "write --data.args.mode GRAY for the upper 8 of them, or " if deep else ""
            raise ConfigError(
                f"{row.source}: got {path} with {16 if deep else 32} bits a pixel, expected 8; {mend}give a "
                f"data.args.transform that makes floats in [0, 1] of them"
            )
        if self.shape is not None and tuple(image.shape) != self.shape:
            raise ConfigError(
                f"{row.source}: got {path} of shape {tuple(image.shape)}, expected {self.shape} as "
                f"the first image has; resize it, or set data.transforms and data.test_transforms, or data.args.mode"
            )
        target = self.number[row.label]
        return image, self.target_transform(target) if self.target_transform else target


def read_image(path: Path, mode: str, upright: bool = True) -> torch.Tensor:
    """The image, uint8 [channels, height, width].

    With UNCHANGED, images of more than 8 bits are uint16, int32 or float32, with the values that the file has. The
    other modes give the upper 8 bits of 16, as Pillow itself does for 16-bit colours.

    Args:
        path: of a file in any format that Pillow reads.
        mode: a key of MODES. UNCHANGED leaves the channels as they are, and gives a palette's colours.
        upright: turn it as its EXIF orientation says.

    Raises:
        Exception: the file cannot be read or decoded; Pillow has no class for it.
    """
    with Image.open(path) as image:
        return pixels_of(image, mode, upright)


def pixels_of(image: Image.Image, mode: str = "UNCHANGED", upright: bool = False) -> torch.Tensor:
    """The pixels of a picture of Pillow; see `read_image`."""
    wanted = MODES[mode] or {"1": "L", "P": "RGBA" if "transparency" in image.info else "RGB"}.get(image.mode)
    turn = _turn(image) if upright else None
    if wanted:
        image = _eight_bits(image).convert(wanted)
    array = np.array(image if turn is None else image.transpose(turn))
    if _sixteen_bits(image):
        array = array.astype(np.uint16)  # also of the other byte order
    pixels = torch.from_numpy(array)
    return pixels.unsqueeze(0) if pixels.dim() == 2 else pixels.permute(2, 0, 1).contiguous()


def _turn(image: Image.Image) -> Image.Transpose | None:
    image.load()  # which turns a TIFF, and takes the tag away
    try:
        return TURNS.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # EXIF data that cannot be read say nothing: a viewer shows the image all the same
        return None


def _sixteen_bits(image: Image.Image) -> bool:
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in SIXTEEN_BIT_AS_I)


def _eight_bits(image: Image.Image) -> Image.Image:
    """The same, or the upper 8 bits of its 16; Pillow's `convert` would make white of all that is above 255."""
    if _sixteen_bits(image):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        kind = "floats" if image.mode == "F" else "integers"
        raise ValueError(
            f"it has {kind} of 32 bits, of which nothing says what is white; write --data.args.mode UNCHANGED with a "
            f"data.args.transform that makes floats in [0, 1] of them"
        )
    return image


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, UnidentifiedImageError):  # its text has the path again
        return "it is not in an image format, or cut off"
    return " ".join(str(error).split())
