"""What a run was computed with."""

import functools
import platform
import sys
from importlib.metadata import version

ALWAYS = ("dist-train", "torch", "torchvision", "numpy")
IF_USED = ("accelerate", "deepspeed")


@functools.cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a run depends on, by name."""
    used = [name for name in IF_USED if name in sys.modules]
    return {"python": platform.python_version()} | {name: version(name) for name in (*ALWAYS, *used)}
