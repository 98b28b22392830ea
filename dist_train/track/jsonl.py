"""metrics.jsonl: a JSON object a line, whose floats read back exactly."""

import json
import os
from pathlib import Path

from dist_train.loop.meter import Metrics
from dist_train.track.base import Course, Summary


class Jsonl:
    """Writes the file, a line at a time.

    Args:
        folder: of the run.
        course: what was recorded after the step that the run goes on from is dropped, as it will come again.
    """

    name = "metrics.jsonl"

    def __init__(self, folder: Path, course: Course):
        path = folder / self.name
        path.touch()
        os.truncate(path, _end_of(path, course.at) if course.at else 0)
        self.file = path.open("a", encoding="utf-8", buffering=1)

    def log(self, metrics: Metrics, line: str | None) -> None:
        """See Tracker."""
        self.file.write(json.dumps(metrics) + "\n")

    def finish(self, summary: Summary) -> None:
        """See Tracker."""

    def close(self, code: int) -> None:
        """See Tracker."""
        self.file.close()


def _end_of(path: Path, step: int) -> int:
    """Bytes of metrics.jsonl up to the last line of `step`. A line that was cut off by a kill ends it too."""
    end = 0
    with path.open("rb") as file:
        for line in file:
            try:
                if json.loads(line)["step"] > step or not line.endswith(b"\n"):
                    break
            except (ValueError, KeyError, TypeError):
                break
            end += len(line)
    return end
