"""What checks say: a line each, gathered from all ranks, shown by rank 0."""

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from dist_train.errors import ConfigError

STATUSES = ("pass", "warn", "fail")  # the later is the worse
COLOURS = {"pass": "32", "warn": "33", "fail": "1;31"}


@dataclass(frozen=True)
class Line:
    """What a check found.

    Args:
        status: one of STATUSES.
        name: of what was checked.
        what: was found.
        mend: the command that mends it; empty where nothing is to be mended, or `what` says it.
        facts: the numbers, for --json.
        section: of the report; the report sets it.
        ranks: that say so; the report sets it.
    """

    status: str
    name: str
    what: str
    mend: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    section: str = ""
    ranks: tuple[int, ...] = (0,)


def attempt(name: str, check: Callable[..., Iterable[Line]], *arguments: Any) -> list[Line]:
    """The lines of a check. One that raises fails with its error, and what it said before stays."""
    lines: list[Line] = []
    try:
        for line in check(*arguments):
            lines.append(line)
    except ConfigError as error:
        lines += [Line("fail", name, text) for text in error.lines]
    except Exception as error:
        mend = "report it as a mistake of the doctor's, with this line; the other lines hold"
        lines.append(Line("fail", name, reason(error), mend))
    return lines


def reason(error: BaseException) -> str:
    """An error in a line."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def worst(lines: Iterable[Line]) -> str:
    """The worst status of these."""
    return STATUSES[max((STATUSES.index(line.status) for line in lines), default=0)]


class Report:
    """The lines of a run of the doctor.

    Args:
        rank: of this process.
        as_json: print nothing before the end, and then one JSON document.
    """

    def __init__(self, rank: int, as_json: bool):
        self.rank, self.as_json = rank, as_json
        self.out = sys.stdout  # as it is now: in --json it is kept clear of what others print
        self.own: list[Line] = []
        self.lines: list[Line] = []
        self.size = 1
        self.hold: bool  # show nothing yet: the others' lines are to come
        self.lost = False  # another rank is gone
        self.gather: Callable[[Any], list[Any]]
        self.alone()

    def joined(self, size: int, gather: Callable[[Any], list[Any]]) -> None:
        """From here on the lines of all ranks are shown. Collective."""
        self.size, self.gather = size, gather

    def alone(self) -> None:
        """From here on the lines of this rank are shown, whatever the others do."""
        self.gather, self.hold = lambda value: [value], False

    def add(self, section: str, lines: Iterable[Line]) -> None:
        """Lines of this rank, shown by the next `show`."""
        self.own += [dataclasses.replace(line, section=section, ranks=(self.rank,)) for line in lines]

    def show(self) -> None:
        """Shows what was added since the last time. Collective once the ranks have joined."""
        if self.hold:
            return
        own, self.own = self.own, []
        try:
            gathered = self.gather(own)
        except RuntimeError as error:  # a rank is gone: from here on this one is alone
            lost = Line("fail", "ranks", f"lost another rank: {reason(error)}", "see the log of its node")
            self.alone()
            self.lost = True
            gathered = [[*own, dataclasses.replace(lost, section="network", ranks=(self.rank,))]]
        new = merge(gathered)
        if not self.as_json and self.rank == 0:
            shown = self.lines[-1].section if self.lines else ""
            for line in new:
                if line.section != shown:
                    shown = line.section
                    self.out.write(f"{shown}\n")
                self.out.write(self.text(line))
            self.out.flush()
        self.lines += new

    def text(self, line: Line) -> str:
        """A line for people."""
        status = line.status.upper() if line.status == "fail" else line.status
        if self.out.isatty() and "NO_COLOR" not in os.environ:
            status = f"\033[{COLOURS[line.status]}m{status}\033[0m"
        who = ""
        if line.status != "pass" and len(line.ranks) < self.size:
            who = f"rank{'s' * (len(line.ranks) > 1)} {', '.join(map(str, line.ranks))}: "
        mend = f"        mend: {line.mend}\n" if line.mend and line.status != "pass" else ""
        return f"  {status}  {line.name:<14} {who}{line.what}\n{mend}"

    def close(self) -> str:
        """Prints the end of the report. Returns the worst status, the same on all ranks that joined."""
        found = worst(self.lines)
        counts = {status: sum(line.status == status for line in self.lines) for status in STATUSES}
        if self.rank:
            return found
        if self.as_json:
            tree = {"worst": found, **counts, "lines": [dataclasses.asdict(line) for line in self.lines]}
            self.out.write(json.dumps(tree) + "\n")
        else:
            said = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
            self.out.write(f"\n{len(self.lines)} lines: {said}; worst: {found}\n")
        self.out.flush()
        return found


def merge(gathered: list[list[Line]]) -> list[Line]:
    """The lines of all ranks: what passes as rank 0 says it, what does not once, with the ranks that say so."""
    merged: dict[tuple[str, ...], Line] = {}
    for i, lines in enumerate(gathered):
        for line in lines:
            if i and line.status == "pass":
                continue
            key = (line.section, line.name, line.status, line.what)
            found = merged.get(key)
            merged[key] = dataclasses.replace(found, ranks=(*found.ranks, *line.ranks)) if found else line
    sections = list(dict.fromkeys(line.section for line in merged.values()))
    return sorted(merged.values(), key=lambda line: sections.index(line.section))


def ranks(count: int) -> str:
    """A number of ranks, in words."""
    return "1 rank" if count == 1 else f"{count} ranks"


def size(count: float) -> str:
    """Bytes in the unit that fits."""
    for unit, power in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= power:
            return f"{count / power:,.1f} {unit}"
    return f"{count:.0f} bytes"
