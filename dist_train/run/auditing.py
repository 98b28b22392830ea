"""train.audit_action: what a run does where an audit has found something."""

import time
from collections.abc import Sequence

from dist_train.checkpoint.save import Checkpoints
from dist_train.errors import CorruptionError
from dist_train.loop.verdicts import Finding
from dist_train.run.running import Run


class Alarmed:
    """Says what was found, and stops the run if the config says so.

    Args:
        run: opened.
        checkpoints: of the run.

    Attributes:
        clean: the newest step whose audit found nothing; before the first, the one that the run starts after.
        steps: how many were audited.
        bad: in how many of them something was found.
    """

    def __init__(self, run: Run, checkpoints: Checkpoints):
        self.run, self.checkpoints, self.clean = run, checkpoints, run.course.at
        self.steps = self.bad = 0

    def __call__(self, step: int, found: Sequence[Finding]) -> None:
        """See Alarm. Raises CorruptionError."""
        self.steps += 1
        if not found:
            self.clean = step
            return
        self.bad += 1
        stops = self.run.config.train.audit_action == "stop"
        for finding in found:
            self.run.work.meter.event(
                {
                    "event": "audit",
                    "at": time.time(),
                    "audit/step": step,
                    "audit/ranks": [float(rank) for rank in finding.ranks],
                    "audit/found": finding.line,
                }
            )
            if not stops:
                self.run.trackers.say(f"warning: audit of step {step}: {finding.line}")
        if stops:
            lines = "; ".join(finding.line for finding in found)
            raise CorruptionError(f"audit of step {step}: {lines}. {self._resumed()}")

    def _resumed(self) -> str:
        """What a resume would begin with."""
        good, aside = self.checkpoints.set_aside(self.clean)
        since = (
            f"after step {self.clean}, the last that was found right"
            if self.clean
            else "before any audit found all right"
        )
        moved = f"Set aside, as saved {since}: {', '.join(aside)}. " if aside else ""
        start = f"from {good}" if good else "at the start, as there is no checkpoint from before"
        return f"{moved}Started again without that device, the run goes on {start}"
