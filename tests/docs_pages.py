"""The pages of the documentation as their tests see them: blocks, links, headings, and output that is shown.

A block of commands opens with ```sh, and may say more:

    ```sh exit 2                       the last command ends with 2
    ```sh killed after step 50         the run is killed there
    ```sh slow: imports accelerate     too long for every day; runs with -m full
    ```sh not here: needs SLURM        does not run on a machine without that

A block ```python runs as well; ```python one.py and ```json more.json are files. ```text is what was said by the block
before it: its words and their order, with any numbers, and anything for three dots.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
LINKED = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/RESULTS.md"]
COMMAND = re.compile(r" {4}\$? ?(python|torchrun|deepspeed|accelerate|mpirun|sbatch|pip) ")
_SH = re.compile(r"(?P<when>not here|slow)?\s*(exit (?P<code>\d+))?\s*(killed after step (?P<killed>\d+))?")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Args:
        kind: sh, python, text or another word.
        text: what is in it.
        line: of the page, where it opens.
        file: the name that its text is to be saved under; "" for none.
        when: "" for every day, "slow", or "not here".
        code: that the last command ends with.
        killed: the step after which the run is killed; None for none.
        shown: what it is said to print.
    """

    kind: str
    text: str
    line: int
    file: str = ""
    when: str = ""
    code: int = 0
    killed: int | None = None
    shown: str = ""

    def commands(self) -> list[str]:
        """The commands of a block of them."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [line for line in lines if line.strip() and not line.startswith("#")]


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page, in order; a block of text goes with what is before it."""
    found: list[Block] = []
    fenced = re.compile(r"^```(?P<head>.*)\n(?P<text>(?:(?!```).*\n)*)```$", re.MULTILINE)
    for match in fenced.finditer(page):
        kind, _, rest = match["head"].partition(" ")
        line = page[: match.start()].count("\n") + 1
        if kind == "text":
            last = found[-1]
            assert not last.shown, f"line {line}: a second text for the block at line {last.line}"
            found[-1] = Block(**vars(last) | {"shown": match["text"]})
        elif kind == "sh":
            flags, _, reason = rest.partition(":")
            said = _SH.fullmatch(flags.strip())
            assert said, f"line {line}: got {rest!r}"
            assert bool(said["when"]) == bool(reason.strip()), f"line {line}: a reason goes with slow and not here"
            killed = int(said["killed"]) if said["killed"] else None
            found.append(Block(kind, match["text"], line, "", said["when"] or "", int(said["code"] or 0), killed))
        else:
            found.append(Block(kind, match["text"], line, rest.strip()))
    return found


def unfenced(page: str) -> str:
    """The page without its blocks."""
    return re.sub(r"^```.*\n(?:(?!```).*\n)*```$", "", page, flags=re.MULTILINE)


def links(page: str) -> list[str]:
    """Where the links and pictures of a page lead to, those to other sites left out."""
    found = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", unfenced(page)))
    return [target for target in found if not re.match(r"https?://", target)]


def anchors(page: str) -> set[str]:
    """The names of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", unfenced(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def differs(shown: str, said: str) -> str | None:
    """The first line of `shown` that `said` does not have, in order; None if it has all."""
    lines = iter(said.splitlines())
    for expected in shown.splitlines():
        if not expected.strip():
            continue
        pattern = re.compile(_pattern(expected))
        if not any(pattern.fullmatch(line.strip()) for line in lines):
            return expected
    return None


def _pattern(line: str) -> str:
    number = r"\d[\d.,]*(?:e[-+]?\d+)?"
    parts = []
    for token in re.findall(rf"\.\.\.|\s+|{number}|.", line.strip()):
        if token == "...":
            parts.append(".*")
        elif token.isspace():
            parts.append(r"\s+")
        else:
            parts.append(r"[\d.,e+-]+" if token[0].isdigit() else re.escape(token))
    return "".join(parts)


def of_dist_train(command: str) -> list[str] | None:
    """The words that dist_train gets of a command that starts it; None for another command."""
    words = shlex.split(command, comments=True)
    for i, word in enumerate(words):
        if word == "dist_train" and words[i - 1] in ("-m", "--module"):
            return words[i + 1 :]
        if word.endswith(".sbatch"):
            rest = words[i + 1 :]
            return rest if not rest or rest[0].startswith("--") else rest[1:]  # a sweep's file of overrides
    return None
