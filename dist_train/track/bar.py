"""The bar on a terminal. It is drawn when there are metrics, by whom brings them: between that nothing happens."""

from collections.abc import Callable
from functools import partial

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dist_train.loop.meter import Metrics, duration
from dist_train.track.base import Course, Summary
from dist_train.track.words import spoken


class Bar:
    """Where the run is, and its newest metrics, in two lines that fit into 80 columns; other lines go above them.

    Args:
        course: of the run.
        device: that rank 0 computes on.
        mark: puts the rank before the lines of a text.
    """

    name = "the console"

    def __init__(self, course: Course, device: torch.device, mark: Callable[[str], str]):
        self.course, self.device, self.mark = course, device, mark
        self.now: Metrics = {}
        self.console = Console(force_terminal=True, highlight=False)
        self.live = Live(console=self.console, auto_refresh=False, get_renderable=self._drawn)

    def say(self, text: str) -> None:
        """Lines for people."""
        self.console.print(self.mark(text), markup=False, soft_wrap=True)

    def log(self, metrics: Metrics, line: str | None) -> None:
        """See Tracker."""
        self.now |= metrics
        if not self.live.is_started:
            self.live.start()
            self.console.show_cursor(True)  # a process that is killed leaves the terminal as it is
        self.live.refresh()

    def finish(self, summary: Summary) -> None:
        """See Tracker. What is said from here on goes below the bar."""
        self.live.stop()

    def close(self, code: int) -> None:
        """See Tracker."""
        self.live.stop()

    def _drawn(self) -> Group:
        step, steps = int(self.now.get("step", 0)), self.course.steps
        epochs = f"{steps / self.course.steps_per_epoch:.2f}".rstrip("0").rstrip(".")
        above = Table.grid(padding=(0, 2), expand=True)
        above.add_column(no_wrap=True)
        above.add_column(ratio=1)
        above.add_column(no_wrap=True)
        above.add_column(no_wrap=True)
        above.add_row(
            f"epoch {self.now.get('epoch', 0.0):.2f}/{epochs}",
            ProgressBar(total=steps, completed=step),
            f"step {step}/{steps}",
            f"ETA {self._eta(step)}",
        )
        return Group(above, Text("  ".join(self._values()), no_wrap=True, overflow="ellipsis"))

    def _eta(self, step: int) -> str:
        rate = self.now.get("train/samples_per_s")
        return duration((self.course.steps - step) * self.course.samples_per_step / rate) if rate else "-"

    def _values(self) -> list[str]:
        forms: dict[str, Callable[[float], str]] = {
            "train/loss": "loss {:.4f}".format,
            **{name: partial(spoken, name.removeprefix("eval/")) for name in self.course.results[:1]},
            "train/lr": "lr {:.3g}".format,
            f"train/{self.course.unit}_per_s": f"{{:,.0f}} {self.course.unit}/s".format,
            "train/mfu": "MFU {:.1%}".format,
        }
        values = [form(self.now[name]) for name, form in forms.items() if name in self.now]
        if self.device.type == "cuda":
            values.append(f"GPU {torch.cuda.max_memory_allocated(self.device) / 2**30:.1f} GiB")
        return values
