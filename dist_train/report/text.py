"""Numbers as people read them."""

import math

from dist_train.track.words import is_share


def number(value: float) -> str:
    """Four significant digits: 18,780, 0.3805, 1.2e-05."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 or float(value).is_integer() else f"{value:.4g}"


def percent(share: float) -> str:
    """A share of 0.8905 as 89.05%."""
    return f"{share:.2%}"


def figure(metric: str, value: float) -> str:
    """A metric: a share as a percentage."""
    return percent(value) if is_share(metric, [value]) and math.isfinite(value) else number(value)


def duration(seconds: float) -> str:
    """Seconds in the two largest units: 12 ms, 3.2 s, 2m 05s, 1h 07m, 3d 04h."""
    if seconds < 1:
        return f"{seconds * 1e3:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    for unit, below, lower, size in (("d", "h", 3600, 86400), ("h", "m", 60, 3600), ("m", "s", 1, 60)):
        whole = round(seconds / lower)  # of the lower unit
        if whole * lower >= size:
            return f"{whole * lower // size}{unit} {whole * lower % size // lower:02d}{below}"
    raise AssertionError
