"""The documentation says what is so: its commands and snippets run, links lead somewhere, what is generated is new."""

import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import dist_train
from dist_train.__main__ import TOOLS
from dist_train.config.load import load
from launch.options import parse

from docs_pages import COMMAND, LINKED, PAGES, ROOT, Block, anchors, blocks, differs, links, of_dist_train, unfenced
from zygote import Run, Zygote

Do = Callable[[Block, str], tuple[int, str]]
IMAGES = ROOT / "docs/images"
RUNNABLE = [page for page in PAGES if any(block.kind in ("sh", "python") for block in blocks(page.read_text()))]
ENVIRONMENT = {
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where a page's reader sits: an empty folder, with what the repository has for those who start runs."""
    for folder in ("configs", "slurm"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    return tmp_path


@pytest.mark.parametrize("page", RUNNABLE, ids=name_of)
def test_a_page_does_what_it_shows(page: Path, place: Path, zygote: Zygote):
    """Runs of dist_train and Python files are forked, with as many ranks as torchrun would start; the rest is typed."""

    def do(block: Block, command: str) -> tuple[int, str]:
        words = shlex.split(command)
        ranks, rest = 1, words[1:]
        if words[0] == "torchrun":
            ranks, rest = int(words[1].removeprefix("--nproc_per_node=")), words[2:]
        if words[0] not in ("python", "torchrun") or rest[:2] == ["-m", "launch"]:
            return typed(command, place)
        plant = {0: ("at_phase", "data", block.killed, "kill")} if block.killed else None
        if rest[0] == "-m":
            assert rest[1] == "dist_train"
            run = Run(rest[2:], ranks, plant, kill_all=True, cwd=str(place))
        else:
            (script,) = rest
            run = Run([], ranks, cwd=str(place), script=str(place / script))
        (ended,) = zygote.run(run)
        code = next((code for code in ended.codes if code), 0)
        if code and words[0] == "torchrun":
            code = 1  # torchrun's own
        return code, "".join([*ended.out, *ended.err])

    follow(name_of(page), page.read_text(), place, do, slow=False)


@pytest.mark.full
@pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs MPI: Debian's openmpi-bin")
@pytest.mark.parametrize("page", RUNNABLE, ids=name_of)
def test_a_page_does_what_it_shows_as_typed(page: Path, place: Path):
    """The same by the commands as they stand there, and the slow ones."""

    def do(block: Block, command: str) -> tuple[int, str]:
        return kill_at(block.killed, command, place) if block.killed else typed(command, place)

    follow(name_of(page), page.read_text(), place, do, slow=True)


def follow(name: str, page: str, place: Path, do: Do, slow: bool) -> None:
    """Does what a page says from top to bottom, by `do`, which returns the exit code and the output of a command."""
    for i, block in enumerate(blocks(page)):
        at = f"{name}:{block.line}"
        if block.file:
            (place / block.file).write_text(block.text)
        elif block.kind == "python":
            (place / f"snippet{i}.py").write_text(block.text)
            check(at, block, *do(block, f"python snippet{i}.py"))
        elif block.kind == "sh" and block.when != "not here" and (slow or block.when != "slow"):
            code, said = 0, ""
            for command in block.commands():
                assert code == 0, f"{at}: ended with {code} before {command}\n{said}"
                code, output = do(block, command)
                said += output
            check(at, block, code, said)


def check(at: str, block: Block, code: int, said: str) -> None:
    assert block.killed or code == block.code, f"{at}: ended with {code}, expected {block.code}\n{said}"
    missing = differs(block.shown, said)
    assert missing is None, f"{at}: shows {missing!r}, which is not said:\n{said}"


def typed(command: str, place: Path) -> tuple[int, str]:
    done = subprocess.run(
        ["bash", "-c", command], cwd=place, env=os.environ | ENVIRONMENT, timeout=300, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    return done.returncode, done.stdout


def kill_at(step: int, command: str, place: Path) -> tuple[int, str]:
    """Kills all processes of a command when its run has passed a step."""
    words = shlex.split(command)
    metrics = place / words[words.index("--run.dir") + 1] / "metrics.jsonl"
    with (place / "killed.out").open("w") as output:
        process = subprocess.Popen(
            ["bash", "-c", command], cwd=place, env=os.environ | ENVIRONMENT, stdout=output, stderr=output
        )
        deadline = time.monotonic() + 60
        while not metrics.exists() or f'{{"step": {step},' not in metrics.read_text():
            assert process.poll() is None and time.monotonic() < deadline, (place / "killed.out").read_text()
            time.sleep(0.005)
        for pid in below(process.pid):
            os.kill(pid, signal.SIGKILL)
        process.wait()
    return process.returncode, ""


def below(pid: int) -> list[int]:
    """A process and all that it has started."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(found for child in children for found in below(int(child)))]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_does_not_run_here_is_at_least_accepted(page: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    text = page.read_text()
    for block in blocks(text):
        if block.when == "not here":
            for command in block.commands():
                accept(command)
    outside = [line for line in unfenced(text).splitlines() if COMMAND.match(line)]
    assert not outside, f"commands that no test would run: {outside}"


def accept(command: str) -> None:
    """Raises where a command names a file or a key that is not there."""
    argv, words = of_dist_train(command), shlex.split(command)
    for script in [word for word in words if word.startswith("slurm/")]:
        assert (ROOT / script).exists(), command
    if argv is not None and not (argv and argv[0] in TOOLS):
        load(argv)
    elif words[:3] == ["python", "-m", "launch"]:
        load(list(parse(words[3:]).arguments))


def test_the_readmes_commands_are_accepted(monkeypatch: pytest.MonkeyPatch):
    """They train for minutes: .ci/run types the first, the backends' and the commands' own tests run the like."""
    monkeypatch.chdir(ROOT)
    lines = [line for line in (ROOT / "README.md").read_text().splitlines() if COMMAND.match(line)]
    commands = [re.sub(r" #.*| \.\.\.$", "", line.strip().rpartition("&& ")[2]) for line in lines]
    right = [command for command in commands if of_dist_train(command) is not None and command[0] != "$"]
    assert len(right) > 15
    for command in right:
        accept(command)


@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_links_lead_to_what_is_there(page: Path):
    for target in links(page.read_text()):
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), f"{name_of(page)}: {target}"
        assert not anchor or anchor in anchors(there.read_text()), f"{name_of(page)}: no heading for {target}"


def test_the_index_has_every_page():
    listed = {(ROOT / "docs" / link).resolve() for link in links((ROOT / "docs/README.md").read_text())}
    assert set(PAGES) - listed == {ROOT / "docs/README.md"}


def test_the_reference_of_the_config_is_the_codes():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs/generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    page = generate.page()
    assert page == generate.FILE.read_text(), "run python docs/generate.py"
    assert "| `checkpoint.allow` | a list such as [train.seed] (text each) | `[]` |" in page
    assert "| `compile.mode` | one of off, " in page and page.count("\n| `train.") == 21


def test_the_reference_of_the_python_names_is_the_codes():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs/generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    assert sorted(generate.PUBLIC) == sorted(dist_train.__all__)
    page = generate.python_page()
    assert page == generate.PYTHON_FILE.read_text(), "run python docs/generate.py"
    assert "    dist_train.launch(function, *args, ranks=2, **kwargs)" in page and "- `why`: for the console" in page


def test_the_pictures_are_there_small_and_shown():
    shown = {(page.parent / link).resolve() for page in PAGES for link in links(page.read_text()) if ".png" in link}
    made = set(IMAGES.iterdir())
    assert shown == made and len(made) >= 3
    for path in made:
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size < 150_000, path


def test_the_picture_of_the_order_is_made(tmp_path: Path):
    code, said = typed(f"python {ROOT}/docs/pictures.py order --steps 3 --out {tmp_path}", tmp_path)
    assert code == 0 and (tmp_path / "order.png").stat().st_size > 10_000, said
    code, said = typed(f"python {ROOT}/docs/pictures.py ordr", tmp_path)
    assert code == 2 and "expected some of order, curves, resume" in said


@pytest.mark.full
def test_the_other_pictures_are_made(tmp_path: Path):
    code, said = typed(f"python {ROOT}/docs/pictures.py curves resume --steps 48 --out {tmp_path}", tmp_path)
    assert code == 0 and {path.name for path in tmp_path.iterdir()} == {"curves.png", "resume.png"}, said


# -- what the tests themselves would see -------------------------------------------------------------------------------

PAGE = """\
# One, two (and `three`)

[there](other.md#here) `[no](link)` [site](https://a.b)

```sh exit 2
python -m dist_train --train.epochs \\
    x
```
```text
a 1.5e-3 of ... 7
```

```sh not here: needs two machines
python -m dist_train
```
"""


def test_a_page_is_read():
    first, second = blocks(PAGE)
    assert first == Block("sh", first.text, 5, code=2, shown="a 1.5e-3 of ... 7\n")
    assert first.commands() == ["python -m dist_train --train.epochs      x"]
    assert (second.when, second.code) == ("not here", 0)
    assert anchors(PAGE) == {"one-two-and-three"} and links(PAGE) == ["other.md#here"]
    with pytest.raises(AssertionError, match="a reason"):
        blocks("```sh not here\nls\n```\n")
    with pytest.raises(AssertionError, match="got 'sometimes'"):
        blocks("```sh sometimes\nls\n```\n")


@pytest.mark.parametrize(
    ("said", "missing"),
    [
        ("x\na 20 of all, 1\n", None),
        ("a 20 of, 1", "a 1.5e-3 of ... 7"),
        ("b 20 of all, 1", "a 1.5e-3 of ... 7"),
        ("a few of all, 1", "a 1.5e-3 of ... 7"),
    ],
)
def test_output_is_compared(said: str, missing: str | None):
    assert differs("a 1.5e-3 of ... 7\n", said) == missing
    assert differs("b\na\n", "a\nb\n") == "a"  # in order


@pytest.mark.parametrize(
    "text", ["```sh\nfalse\n```\n", "```sh\nfalse\ntrue\n```\n", "```sh\necho a\n```\n```text\nb\n```\n"]
)
def test_a_page_that_is_wrong_is_seen(text: str, place: Path):
    with pytest.raises(AssertionError, match="planted.md:1"):
        follow("planted.md", text, place, lambda _, command: typed(command, place), slow=False)
