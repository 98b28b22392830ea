"""Text is encoded once, whatever happens meanwhile: kills, other processes, changes of the text."""

import gzip
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import dist_train
from dist_train.data import corpus, encoded_text, tokenizers
from dist_train.data.tokenizer_file import FromFile, trained
from dist_train.data.tokenizers import Bytes
from dist_train.errors import ConfigError
from dist_train.ranks.launcher import Launcher
from dist_train.tools import tokenize

from zygote import Run, Zygote

ROOT = Path(dist_train.__file__).parents[1]
DOCUMENTS = [f"Document {i}, über {'language and ' * (i % 40)}models.\nIts second line.\n\n" for i in range(600)]
# Reads a corpus in small units. What is planted comes before it.
READ = """
import os, signal, sys
from pathlib import Path
from dist_train.data import corpus, encoded_text, encoding
corpus.UNIT_BYTES, corpus.PIECE_BYTES, encoding.ALONE_BYTES = 20_000, 3_000, int(sys.argv[4])
{planted}
tokens, by = encoded_text.read(Path(sys.argv[1]), sys.argv[2], "text", sys.argv[3], None)
print(len(tokens), len(tokens.starts), tokens.identity)
"""
# Killed in the middle of the fifth unit, by the process that does them all.
IN_A_UNIT = """
from dist_train.data.tokenizer_file import FromFile
encode, count = FromFile.encode, [0]
def encode_some(self, text):
    count[0] += 1
    if len(list(Path(sys.argv[1]).glob("encoded/*/*.json"))) >= 4 and count[0] % 3 == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(self, text)
FromFile.encode = encode_some
"""
# Killed while workers are at it, by what is told of their progress.
WITH_WORKERS = """
from dist_train.data.encoding_bar import Bar
told = Bar.__call__
def kill(self, size, units):
    told(self, size, units)
    if self.units >= 3:
        os.kill(os.getpid(), signal.SIGKILL)
Bar.__call__ = kill
"""
COUNTED = """
done = encoding.corpus.documents
def documents(sources, spans, field):
    print("unit", sources[0].name, file=sys.stderr)
    return done(sources, spans, field)
encoding.corpus.documents = documents
"""
ALONE, WORKERS = "1000000000", "0"


def read(root: Path, files: str, processes: str = ALONE, planted: str = "", tokenizer: str = "tok.json"):
    argv = [sys.executable, "-c", READ.format(planted=planted), str(root), files, tokenizer, processes]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def said(process: subprocess.Popen, code: int = 0) -> tuple[str, str]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    return out, err


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Corpora of the same documents in each format, and a tokenizer."""
    import pyarrow
    from pyarrow import parquet

    root = tmp_path_factory.mktemp("corpora")
    lines = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(DOCUMENTS))
    (root / "all.jsonl").write_text(lines)
    with gzip.open(root / "all.jsonl.gz", "wt") as file:
        file.write(lines)
    parquet.write_table(pyarrow.table({"text": DOCUMENTS}), root / "all.parquet", row_group_size=50)
    (root / "files").mkdir()
    for i, text in enumerate(DOCUMENTS):
        (root / f"files/{i:03}.txt").write_text(text)
    (root / "one.txt").write_text("".join(DOCUMENTS))
    (root / "tok.json").write_text(trained(DOCUMENTS, 400))
    return root


def own(made: Path, root: Path, *names: str) -> Path:
    """A folder of one's own with some of the corpora."""
    for name in (*names, "tok.json"):
        (root / name).write_bytes((made / name).read_bytes())
    return root


def content(root: Path) -> dict[str, bytes]:
    """What is in the one folder of encoded text, but for the times of files."""
    (home,) = (root / "encoded").iterdir()
    files = {path.name: path.read_bytes() for path in sorted(home.iterdir()) if path.suffix in (".bin", ".starts")}
    return files | {"identity": json.loads((home / "manifest.json").read_text())["identity"].encode()}


@pytest.mark.parametrize("files", ["all.jsonl", "all.jsonl.gz", "all.parquet", "files", "files/*.txt"])
def test_each_format_gives_the_same_documents(files: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(encoded_text, "ENCODED", str(tmp_path))
    monkeypatch.setattr(corpus, "UNIT_BYTES", 20_000)
    tokens, by = encoded_text.read(made, files, "text", "tok.json", None)
    assert isinstance(by, FromFile) and len(tokens.starts) == len(DOCUMENTS)
    assert len(tokens.shards) == (1 if files.endswith("gz") else len(tokens.shards)) and tokens.shards[0].dtype == "<u2"
    for number in (0, 1, 299, 599):
        start, length = tokens.starts[number], tokens.lengths[number]
        row = tokens.at(np.arange(start, start + length))
        assert row.tolist() == [*by.encode(DOCUMENTS[number]), by.end]


def test_a_long_document_is_cut_where_words_end(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As the tokenizer encodes it whole, over pieces and units."""
    monkeypatch.setattr(encoded_text, "ENCODED", str(tmp_path))
    for name, value in {"UNIT_BYTES": 20_000, "PIECE_BYTES": 3_000, "SEARCHED_BYTES": 1_000}.items():
        monkeypatch.setattr(corpus, name, value)
    tokens, by = encoded_text.read(made, "one.txt", "text", "tok.json", None)
    assert len(tokens.shards) > 5 and tokens.starts.tolist() == [0]
    assert tokens.at(np.arange(len(tokens))).tolist() == [*by.encode("".join(DOCUMENTS)), by.end]
    # Without a line's end no character is cut.
    (tmp_path / "line.txt").write_text("☃" * 30_000)
    tokens, _ = encoded_text.read(tmp_path, "line.txt", "text", "bytes", None)
    assert len(tokens) == 90_001 and len(tokens.shards) > 3


def test_a_vocabulary_too_large_for_two_bytes_takes_four(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.txt").write_text("a")
    monkeypatch.setattr(Bytes, "vocab_size", 65_536)
    assert encoded_text.read(tmp_path, "a.txt", "text", "bytes", None)[0].shards[0].dtype == "<u2"
    monkeypatch.setattr(Bytes, "vocab_size", 65_537)
    monkeypatch.setattr(Bytes, "identity", lambda self: "more bytes")
    assert encoded_text.read(tmp_path, "a.txt", "text", "bytes", None)[0].shards[0].dtype == "<u4"


@pytest.mark.parametrize("planted, processes", [(IN_A_UNIT, ALONE), (WITH_WORKERS, WORKERS)], ids=["alone", "workers"])
def test_killed_half_way_it_goes_on_to_the_same_bytes(planted: str, processes: str, made: Path, tmp_path: Path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for root in (whole, broken):
        root.mkdir()
        own(made, root, "all.jsonl")
    undisturbed, _ = said(read(whole, "all.jsonl", WORKERS))
    said(read(broken, "all.jsonl", processes, planted), -signal.SIGKILL)
    (home,) = (broken / "encoded").iterdir()
    done = len(list(home.glob("*.json")))
    total = len(list(next((whole / "encoded").iterdir()).glob("*.starts")))
    assert 3 <= done < total and not (home / "manifest.json").exists()
    again, err = said(read(broken, "all.jsonl", ALONE, COUNTED))
    assert again == undisturbed and content(broken) == content(whole)
    assert err.count("unit") <= total - done, "what was done is not done again"
    assert not [path for path in home.iterdir() if path.name.startswith(".") and path.name != ".lock"]


def test_two_processes_at_once_encode_once(made: Path, tmp_path: Path):
    own(made, tmp_path, "all.jsonl")
    both = [said(process) for process in [read(tmp_path, "all.jsonl", ALONE, COUNTED) for _ in range(2)]]
    assert both[0][0] == both[1][0]
    units = len(list(next((tmp_path / "encoded").iterdir()).glob("*.starts")))
    assert sorted(err.count("unit") for _, err in both) == [0, units]


def test_what_has_changed_is_encoded_again_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(corpus, "UNIT_BYTES", 110)
    for name, text in {"a.txt": "first\n" * 15, "b.txt": "second\n" * 15, "c.txt": "third\n" * 15}.items():
        (tmp_path / name).write_text(text)
    units, by = [], Bytes()
    encode = Bytes.encode
    monkeypatch.setattr(Bytes, "encode", lambda self, text: units.append(text.split()[0]) or encode(self, text))

    def encoded():
        units.clear()
        return encoded_text.read(tmp_path, "*.txt", "text", "bytes", None)[0]

    first = encoded()
    assert units == ["first", "second", "third"]
    assert encoded().identity == first.identity and not units
    os.utime(tmp_path / "b.txt")  # another time, the same text
    assert encoded().identity == first.identity and not units
    (tmp_path / "b.txt").write_text("other.\n" * 15)  # of the same size
    second = encoded()
    assert units == ["other."] and second.identity != first.identity
    assert by.decode(second.at(np.arange(len(second)))).count("other.") == 15
    assert by.decode(first.at(np.arange(len(first)))).count("second") == 15, "who reads the old one goes on with it"
    (tmp_path / "a.txt").unlink()
    assert len(encoded().starts) == 2 and not units
    (home,) = (tmp_path / "encoded").iterdir()
    assert len(list(home.glob("*.starts"))) == 2, "nothing is left of files that are gone"
    (home / "manifest.json").unlink()
    next(home.glob("*.starts")).write_bytes(b"cut off")
    encoded()
    assert len(units) == 1


def test_a_worker_says_what_is_wrong(made: Path, tmp_path: Path):
    own(made, tmp_path, "all.jsonl")
    lines = (tmp_path / "all.jsonl").read_text().splitlines()
    lines[400] = '{"id": 400}'
    (tmp_path / "all.jsonl").write_text("\n".join(lines))
    _, err = said(read(tmp_path, "all.jsonl", WORKERS), 1)
    assert "ConfigError: all.jsonl line 401: got no field 'text' (its fields: 'id')" in err


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "encoded").write_text("a file")
    with pytest.raises(ConfigError, match="data.root: got .* cannot be written"):
        encoded_text.read(tmp_path, "a.txt", "text", "bytes", None)


SMALL = [
    "--model.name",
    "decoder",
    "--model.args",
    "{layers: 1, width: 32, heads: 1}",
    "--task.name",
    "language_modelling",
]
SMALL += ["--train.max_steps", "2", "--train.device", "cpu", "--data.name", "text"]


def test_ranks_encode_once_and_the_run_keeps_its_tokenizer(made: Path, tmp_path: Path, zygote: Zygote):
    own(made, tmp_path, "one.txt")
    argv = [*SMALL, "--data.root", str(tmp_path), "--run.dir", str(tmp_path / "run")]
    argv += ["--data.args", "{files: one.txt, tokenizer: characters, block: 16}"]
    (ended,) = zygote.run(Run(argv, ranks=2))
    ended.check()
    assert "".join(ended.err).count("encoded 1 documents") == 1
    (tmp_path / "one.txt").unlink()
    kept = tokenizers.load(tmp_path / "run" / "tokenizer")
    assert kept.vocabulary == "".join(sorted(set("".join(DOCUMENTS))))


def command(capsys: pytest.CaptureFixture, *argv: str) -> dict:
    assert tokenize.run(list(argv), Launcher("none", world_size=1, local_world_size=1)) == 0
    return json.loads(capsys.readouterr().out)


def test_the_command_trains_a_tokenizer_and_encodes(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    own(made, tmp_path, "all.jsonl.gz", "all.parquet")
    given = ["--data.root", str(tmp_path), "--data.args.files", "all.jsonl.gz"]
    mine = tmp_path / "mine.json"
    told = command(capsys, *given, "--vocab", "400", "--output", str(mine))
    assert mine.read_bytes() == (made / "tok.json").read_bytes(), "the same text gives the same tokenizer"
    assert told | {"tokens": 0} == {"tokenizer": "tokenizer.json", "vocab_size": 400, "tokens": 0, "documents": 600}
    (home,) = (tmp_path / "encoded").iterdir()
    before = (home / "manifest.json").stat().st_mtime_ns
    tests = ["--data.args.test_files", "all.parquet", "--data.args.tokenizer", "mine.json"]
    told = command(capsys, *given, *tests)
    assert told["test_tokens"] == told["tokens"] and told["test_documents"] == 600
    assert (home / "manifest.json").stat().st_mtime_ns == before


REFUSED = {
    "--vocab: got 256, expected a number of tokens from 257": ["--vocab", "256", "--output", "a.json"],
    "tokenize: got --vocab alone, expected both": ["--vocab", "300"],
    "data.name: got digits, expected text": ["--data.name", "digits"],
    "data.args.tokenizer: got bytes with --vocab": [
        "--vocab",
        "300",
        "--output",
        "a",
        "--data.args.tokenizer",
        "bytes",
    ],
    "data.args.tokens: got token numbers": ["--data.args", "{tokens: a.bin, vocab_size: 9}"],
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_the_command_refuses(said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        tokenize.run(REFUSED[said], Launcher("none", world_size=1, local_world_size=1))
    assert error.value.lines[0].startswith(said) and not any(tmp_path.iterdir())
