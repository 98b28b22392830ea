"""Text as tokens: what a run gets of it, tokenizers, shards of others, and what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dist_train.config.load import load
from dist_train.data import prose, tokenizers
from dist_train.data.sets import Data
from dist_train.data.tokenizer_base import Tokenizer
from dist_train.data.tokenizer_file import FromFile, trained
from dist_train.data.tokenizers import Bytes, Characters
from dist_train.errors import ConfigError
from dist_train.ranks.launcher import Launcher
from dist_train.run import assemble
from dist_train.run.check import check

from data_files import needs_real_data

VERSE = "To be, or not to be: that is the question.\nWhether 'tis nobler in the mind – naïve café ☃ 𝄞 to suffer\n\n"


def data_of(root: Path, args: dict) -> Data:
    argv = ["--data.name", "text", "--data.root", str(root), "--data.args", json.dumps(args)]
    config = load(argv)
    check(config, Launcher("none", world_size=1, local_world_size=1), writes=False)
    return assemble.read_data(config.data, False)


def refused(root: Path, args: dict) -> str:
    with pytest.raises(ConfigError) as error:
        data_of(root, args)
    (line,) = error.value.lines
    return line


def row(split) -> np.ndarray:
    """The targets of a split that count, in order."""
    targets = split.gather(np.arange(len(split)))["targets"].numpy().ravel()
    return targets[targets != -100]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real tokenizer.json."""
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    path.write_text(trained([VERSE * 20, "another document"], 300))
    return path


def test_every_token_to_test_counts_once_and_none_is_trained_on(tmp_path: Path):
    text = VERSE * 7
    (tmp_path / "verse.txt").write_text(text)
    data = data_of(tmp_path, {"files": "verse.txt", "block": 16})
    tokens = np.array([*text.encode(), 256])
    cut = int(len(tokens) * 0.9)
    assert row(data.train).tolist() == tokens[1 : 1 + (cut - 1) // 16 * 16].tolist()
    assert row(data.test).tolist() == tokens[cut + 1 :].tolist()
    assert dict(data.facts) == {"vocab_size": 257, "block": 16, "tokenizer": data.facts["tokenizer"]}
    assert data_of(tmp_path, {"files": "verse.txt", "test_fraction": 0, "block": 16}).test is None


def test_nothing_is_given_and_the_text_is_pythons_own(tmp_path: Path):
    data = data_of(tmp_path, {})
    ends = np.cumsum([len(topic.encode()) + 1 for topic in prose.topics()])
    assert len(ends) > 50 and ends[-1] > 300_000
    tested = row(data.test)
    cut = ends[-1] - len(tested) - 1
    assert cut in ends and abs(cut - 0.9 * ends[-1]) < 30_000, "whole documents are held out"
    assert (tested == 256).sum() == (ends > cut).sum()
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["bytes", "characters", "file"])
def test_a_tokenizer_gives_its_text_back_and_is_kept(kind: str, bpe: Path, tmp_path: Path):
    made: Tokenizer = {
        "bytes": Bytes,
        "characters": lambda: Characters("".join(sorted(set(VERSE)))),
        "file": lambda: FromFile(bpe),
    }[kind]()
    tokens = made.encode(VERSE)
    assert made.decode(tokens.tolist()) == VERSE and tokens.max() < made.vocab_size
    assert made.token_bytes()[tokens].sum() == len(VERSE.encode()) and len(made.token_bytes()) == made.vocab_size
    made.save(tmp_path)
    again = tokenizers.load(tmp_path)
    assert repr(again) == repr(made) and again.end == made.end and again.encode(VERSE).tolist() == tokens.tolist()
    if made.end is not None:
        assert made.token_bytes()[made.end] == 0 and made.decode([made.end]) == ""
    # The real libraries read what is kept as the same tokenizer.
    import tokenizers as library
    from transformers import AutoTokenizer

    of_library = library.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert of_library.encode(VERSE, add_special_tokens=False).ids == tokens.tolist()
    of_transformers = AutoTokenizer.from_pretrained(tmp_path)
    assert of_transformers.decode(tokens) == VERSE and of_transformers(VERSE)["input_ids"] == tokens.tolist()
    assert of_transformers.eos_token_id == made.end


def test_the_end_of_a_document_is_found(bpe: Path, tmp_path: Path):
    assert FromFile(bpe).end == 0  # <|endoftext|>
    assert FromFile(bpe, "!").end == FromFile(bpe).encode("!")[0]
    (tmp_path / "tokenizer.json").write_text(bpe.read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "?"}}))
    assert FromFile(tmp_path).end_token == "?"
    assert FromFile(tmp_path).identity() != FromFile(bpe).identity()
    with pytest.raises(ConfigError, match=r"data.args.end_token: got '<none>'"):
        FromFile(bpe, "<none>")


def test_characters_are_those_of_all_files_and_no_others(tmp_path: Path):
    (tmp_path / "a.txt").write_text("abca" * 20)
    (tmp_path / "b.txt").write_text("abé" * 20)
    args = {"tokenizer": "characters", "block": 8}
    data = data_of(tmp_path, args | {"files": "*.txt"})
    assert data.facts["tokenizer"].vocabulary == "abcé" and data.facts["vocab_size"] == 4
    assert refused(tmp_path, args | {"files": "a.txt", "test_files": "b.txt"}).startswith(
        "b.txt: data.args.tokenizer: got the character 'é', which is not in the files to train on"
    )


def test_shakespeare_is_split_as_by_nanogpt(tmp_path: Path):
    path = needs_real_data("tinyshakespeare/input.txt")
    args = {"files": str(path), "tokenizer": "characters", "block": 64}
    data = data_of(tmp_path, args)
    assert data.facts["vocab_size"] == 65
    assert len(row(data.test)) == 111_540 - 1 and len(data.train) == (1_003_854 - 1) // 64


def header(count: int) -> bytes:
    head = np.zeros(256, "<i4")
    head[:3] = 20240520, 1, count
    return head.tobytes()


def test_shards_of_others_are_read_as_they_are(tmp_path: Path):
    tokens = np.random.default_rng(0).integers(0, 50_000, 1000).astype("<u2")
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/train_0.bin").write_bytes(tokens[:400].tobytes())
    (tmp_path / "raw/train_1.bin").write_bytes(header(600) + tokens[400:].tobytes())
    (tmp_path / "val.bin").write_bytes(tokens[:50].tobytes())
    args = {"tokens": "raw/*.bin", "vocab_size": 50_257, "block": 37}
    data = data_of(tmp_path, args | {"test_tokens": "val.bin"})
    assert row(data.train).tolist() == tokens[1 : 1 + 999 // 37 * 37].tolist()
    assert row(data.test).tolist() == tokens[1:50].tolist() and "tokenizer" not in data.facts
    held = data_of(tmp_path, args)
    assert row(held.test).tolist() == tokens[901:].tolist() and held.fingerprint() != data.fingerprint()
    (tmp_path / "raw/train_1.bin").write_bytes(header(600) + tokens[399:-1].tobytes())
    assert data_of(tmp_path, args).fingerprint() != held.fingerprint()
    (tmp_path / "raw/train_1.bin").write_bytes(header(601) + tokens[400:].tobytes())
    assert "601 tokens in its header" in refused(tmp_path, args)
    (tmp_path / "raw/train_1.bin").write_bytes(tokens.tobytes()[:-1])
    assert "1,999 bytes, expected token numbers of 2 bytes" in refused(tmp_path, args)


def test_a_token_number_that_is_too_large_is_told_where_it_is_read(tmp_path: Path):
    tokens = np.zeros(100_000, "<u2")
    tokens[30_000] = 300  # in no block that is looked at before
    tokens.tofile(tmp_path / "a.bin")
    np.zeros(100_000, "<u2").tofile(tmp_path / "b.bin")
    args = {"tokens": "?.bin", "vocab_size": 300, "block": 100, "test_fraction": 0.9}
    data = data_of(tmp_path, args)
    data.train.gather(np.array([0]))
    with pytest.raises(
        ConfigError, match=r"data.args.tokens: got token number 300 in a.bin, expected numbers below 300"
    ):
        data.test.gather(np.array([100]))  # of what begins at 19,999
    tokens[-1] = 301
    tokens.tofile(tmp_path / "b.bin")
    assert "got token number 301 in b.bin" in refused(tmp_path, args)


LARGE = """
import json, sys
from pathlib import Path
import numpy as np
from dist_train.data.text import text

def now():
    read = int(Path("/proc/self/io").read_text().split()[1])
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096, read

before = now()
data = text(sys.argv[1], False, tokens="*.bin", vocab_size=50_257, block=1024)
data.fingerprint()
data.train.gather(np.random.default_rng(0).integers(0, len(data.train), 16))
data.test.gather(np.array([len(data.test) - 1]))
made = now()
part = np.memmap(Path(sys.argv[1]) / "0.bin", "u2", "r")[: 50_000_000]
part.sum()  # a scan of 1%
print(json.dumps([len(data.train), *(a - b for a, b in zip(made, before)), now()[0] - made[0]]))
"""


def test_ten_gigabytes_cost_no_more_memory_nor_reading_than_a_few_blocks(tmp_path: Path):
    for name in ("0.bin", "1.bin"):
        with (tmp_path / name).open("wb") as file:
            os.truncate(file.fileno(), 5_000_000_000)
    argv = [sys.executable, "-c", LARGE, str(tmp_path)]
    samples, memory, read, scanned = json.loads(subprocess.run(argv, capture_output=True, check=True, text=True).stdout)
    assert samples == (int(5e9 * 0.9) - 1) // 1024
    assert memory < 25e6 and read < 1e6, "start-up reads a few blocks"
    assert scanned > 50e6, "and the measure sees it where more is read"


WRONG = {
    "nothing there": ({"files": "gone.txt"}, "data.args.files: got gone.txt, which has no files at"),
    "an empty folder": ({"files": "empty"}, "expected files that end with .txt, .jsonl, .jsonl.gz, .parquet in it"),
    "no such field": ({"files": "a.jsonl"}, "a.jsonl line 17: got no field 'text' (its fields: 'txt', 'id')"),
    "no JSON": ({"files": "b.jsonl"}, "b.jsonl line 2: got no JSON"),
    "no text in it": ({"files": "a.jsonl", "field": "id"}, "a.jsonl line 1: got int in the field 'id', expected text"),
    "no UTF-8": ({"files": "latin.txt"}, "latin.txt: got byte 3, which is no UTF-8"),
    "cut gzip": ({"files": "cut.jsonl.gz"}, "got cut.jsonl.gz, which cannot be read"),
    "no Parquet": ({"files": "no.parquet"}, "no.parquet, expected a whole Parquet file"),
    "no column": ({"files": "one.parquet"}, "one.parquet: got no column 'text' (its columns: 'words')"),
    "nothing in it": ({"files": "nothing.txt"}, "data.args.files: got no text in 1 files, such as nothing.txt"),
    "too short": ({"files": "short.txt", "block": 100}, "data.args.block: got 100 for a split of 5 tokens"),
    "no tokenizer": ({"tokenizer": "gone.json"}, "data.args.tokenizer: got"),
    "a damaged one": ({"tokenizer": "bad.json"}, "which the library tokenizers does not read"),
    "no shards": ({"tokens": "gone*.bin", "vocab_size": 9}, "data.args.tokens: got gone*.bin, which has no files"),
    "no vocabulary": ({"tokens": "a.bin"}, "data.args.vocab_size: got nothing with data.args.tokens"),
    "both": ({"tokens": "a.bin", "files": "b", "vocab_size": 9}, "data.args.files: got 'b' with data.args.tokens"),
    "too many": ({"vocab_size": 300}, "data.args.vocab_size: got 300 without data.args.tokens"),
    "end": ({"end_token": "</s>"}, "data.args.end_token: got '</s>' for bytes"),
    "block": ({"block": 0}, "data.args.block: got 0, expected a whole number from 1"),
    "share": ({"test_fraction": 1.0}, "data.args.test_fraction: got 1.0, expected a share from 0 to below 1"),
    "a number": ({"files": 3}, "data.args.files: got 3, expected text"),
}


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import pyarrow
    from pyarrow import parquet

    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty").mkdir()
    lines = [json.dumps({"text": "a", "id": i}) for i in range(16)]
    (folder / "a.jsonl").write_text("\n".join([*lines, json.dumps({"txt": "b", "id": 0})]))
    (folder / "b.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (folder / "latin.txt").write_bytes("caf\xe9 au lait".encode("latin1"))
    (folder / "cut.jsonl.gz").write_bytes(b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03\xab")
    (folder / "no.parquet").write_bytes(b"PAR1 and no more")
    parquet.write_table(pyarrow.table({"words": ["a"]}), folder / "one.parquet")
    (folder / "nothing.txt").touch()
    (folder / "short.txt").write_text("hello")
    (folder / "bad.json").write_text('{"model": ')
    return folder


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_one_line_that_says_it(what: str, bad: Path):
    args, said = WRONG[what]
    assert said in refused(bad, args)


@pytest.mark.parametrize(
    "name, args", [("tokenizers", {"tokenizer": "bad.json"}), ("pyarrow", {"files": "one.parquet"})]
)
def test_a_library_that_is_missing_is_named(name: str, args: dict, bad: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, name, None)
    assert "pip install 'dist-train[text]'" in refused(bad, args)
