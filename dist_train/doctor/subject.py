"""What is examined, and how long it may take."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from dist_train.config.tree import Config
from dist_train.doctor.report import Line, Report, attempt
from dist_train.ranks import ending
from dist_train.ranks.launcher import Launcher

MEND = "see the lines above, and what the other ranks say"


@dataclass(frozen=True)
class Subject:
    """What is examined.

    Args:
        config: the run; what the options and the defaults say of it, where its file cannot be read.
        refused: why it cannot.
        launcher: the place of this process.
        sections: that were asked for.
        most_bytes: of a timed collective.
        report: takes the lines.
    """

    config: Config
    refused: tuple[str, ...]
    launcher: Launcher
    sections: tuple[str, ...]
    most_bytes: int
    report: Report

    def look(self, section: str, *checks: tuple[str, Callable[..., Iterable[Line]], Any]) -> None:
        """Shows a section, if it was asked for. Collective. A check is a name, a function and its arguments."""
        if section in self.sections:
            for name, check, *arguments in checks:
                self.report.add(section, attempt(name, check, *arguments))
            self.report.show()

    @contextlib.contextmanager
    def limit(self, section: str, name: str, seconds: float, where: str = "", mend: str = MEND) -> Iterator[None]:
        """Where this takes longer, says so with what is known, and ends the process: it may wait in a library for
        ever, as torch does for a server at the port that is no store."""

        def end() -> None:
            what = f"did not end within {seconds:.0f} s {where}".rstrip()
            self.report.add(section, [Line("fail", name, what, mend)])
            self.report.alone()
            self.report.show()
            self.report.close()
            self.speak()
            ending.leave(ending.FAILED)

        timer = threading.Timer(seconds, end)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def speak(self) -> None:
        """Rank 0 has shown its lines. Another that could not join shows its own, if nobody has ended it meanwhile."""
        if self.launcher.rank:
            time.sleep(ending.ECHO_WAIT_S + 0.2 * self.launcher.local_rank)
            for line in self.report.lines:
                if line.status == "fail":
                    said = "; ".join(filter(None, (f"{line.name}: {line.what}", line.mend)))
                    print(f"[rank {self.launcher.rank}] FAIL {said}", file=sys.stderr)
