"""How a run ended, as its summary.json says."""

import json
from pathlib import Path
from typing import Any


def status_of(folder: Path) -> str | None:
    """The status in a run's summary; None if it has none."""
    return summary_of(folder).get("status")


def summary_of(folder: Path) -> dict[str, Any]:
    """What a run's summary.json holds; empty if it is not there or not whole."""
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return summary if isinstance(summary, dict) else {}
