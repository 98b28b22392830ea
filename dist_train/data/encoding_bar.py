"""How far an encoding is: a bar on a terminal, else a line at its start and one at its end."""

import sys
import time
from types import TracebackType


class Bar:
    """Shown while text is encoded, on standard error.

    Args:
        what: is encoded, and by what.
    """

    def __init__(self, what: str):
        self.what = what
        self.size = self.units = 0
        self.began_s = time.perf_counter()
        self.bar = None

    def begin(self, units: int) -> None:
        """Before the first of so many units of work."""
        if not sys.stderr.isatty():
            print(f"encoding {self.what} ...", file=sys.stderr, flush=True)
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("encoding {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
        )
        self.bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))
        self.bar.start()
        self.task = self.bar.add_task(self.what, total=units, rate="")

    def __call__(self, size: int, units: int) -> None:
        """So many bytes of text more are encoded, and so many units done."""
        self.size, self.units = self.size + size, self.units + units
        if self.bar is not None:
            self.bar.update(self.task, advance=units, rate=f"{self._rate():.1f} MB/s")

    def _rate(self) -> float:
        return self.size / 1e6 / max(1e-9, time.perf_counter() - self.began_s)

    def end(self, documents: int, tokens: int) -> None:
        """When all is done."""
        self.close()
        took_s = time.perf_counter() - self.began_s
        print(
            f"encoded {documents:,} documents, {tokens:,} tokens, in {took_s:.1f} s ({self._rate():.1f} MB/s)",
            file=sys.stderr, flush=True,
        )  # fmt: skip

    def close(self) -> None:
        """Takes the bar away."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()
