"""Text files as token numbers in mapped files: encoded once, in parallel, and again only where the text has changed.

A folder of encoded text has, for each unit of work, its tokens (.bin), the places where documents begin (.starts), and
a record (.json), which is written last; the documents of all (documents.bin), the tokenizer, and manifest.json, which
makes it whole.
"""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dist_train.data import corpus, tokenizers
from dist_train.data.corpus import Source, Span
from dist_train.data.encoding_bar import Bar
from dist_train.data.tokenizer_base import Tokenizer
from dist_train.data.tokens import Tokens
from dist_train.errors import ConfigError
from dist_train.whole import whole, write_text

VERSION = 1
ALONE_BYTES = 4 << 20  # of text, below which no processes are started for it
# The way a worker starts: with the same modules to be found as here, and none of the script that was started.
WORKER = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from dist_train.data import encoding; encoding.serve()"
)

Progress = Callable[[int, int], None]  # is told of bytes of text, as they are encoded, and of units that are done


@dataclass(frozen=True)
class Job:
    """A unit of work.

    Args:
        home: folder of the encoded text.
        sources: the files that its spans are of, in order.
        spans: what is encoded.
        field: of a line or a row, which has the text.
    """

    home: Path
    sources: tuple[Source, ...]
    spans: tuple[Span, ...]
    field: str

    @property
    def name(self) -> str:
        """Of its files: the same for the same parts of files of the same names."""
        told = [(source.name, source.size) for source in self.sources], [dataclasses.astuple(s) for s in self.spans]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:20]

    @property
    def changed(self) -> list[int]:
        """When its files were changed, by their clocks."""
        return [source.mtime_ns for source in self.sources]


def jobs(home: Path, sources: Sequence[Source], field: str) -> list[Job]:
    """The units of work of some files."""
    found = []
    for spans in corpus.units(sources):
        own = sorted({span.source for span in spans})
        local = tuple(dataclasses.replace(span, source=own.index(span.source)) for span in spans)
        found.append(Job(home, tuple(sources[number] for number in own), local, field))
    return found


def dtype_of(tokenizer: Tokenizer) -> np.dtype:
    """What its token numbers are kept in."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 and not tokenizer.flags else "<u4")


def encode(job: Job, tokenizer: Tokenizer, told: Progress) -> dict[str, Any]:
    """Does a unit of work, unless it is done and its text is the same; gives its record. Raises ConfigError."""
    path, dtype = job.home / job.name, dtype_of(tokenizer)
    done = _record(path, tokenizer)
    if done is not None and (done["changed"] == job.changed or done["text"] == _digest(job)):
        if done["changed"] != job.changed:
            done["changed"] = job.changed
            write_text(path.with_suffix(".json"), json.dumps(done))
        told(0, 1)
        return done
    digest, starts, count, size, told_size = hashlib.sha256(), [], 0, 0, 0
    with whole(path.with_suffix(".bin")) as beside, beside.open("wb") as file:
        for piece in corpus.documents(job.sources, job.spans, job.field):
            content = piece.text.encode()
            _add(digest, piece, content)
            if piece.opens and content:
                starts.append(count)
            try:
                tokens = tokenizer.encode(piece.text)
            except ConfigError as error:
                raise ConfigError(*(f"{piece.where}: {line}" for line in error.lines)) from None
            if piece.closes and content and tokenizer.end is not None:
                tokens = np.append(tokens, tokenizer.end)
            file.write(tokens.astype(dtype).data)
            count, size = count + len(tokens), size + len(content)
            if size - told_size >= corpus.PIECE_BYTES:
                told(size - told_size, 0)
                told_size = size
    with whole(path.with_suffix(".starts")) as beside:
        beside.write_bytes(np.array(starts, "<i8").tobytes())
    record = {
        "changed": job.changed,
        "text": digest.hexdigest(),
        "tokenizer": tokenizer.identity(),
        "tokens": count,
        "documents": len(starts),
        "bytes": size,
    }
    write_text(path.with_suffix(".json"), json.dumps(record))
    told(size - told_size, 1)
    return record


def _add(digest: Any, piece: corpus.Piece, content: bytes) -> None:
    digest.update(b"%d %d %d " % (piece.opens, piece.closes, len(content)))
    digest.update(content)


def _digest(job: Job) -> str:
    digest = hashlib.sha256()
    for piece in corpus.documents(job.sources, job.spans, job.field):
        _add(digest, piece, piece.text.encode())
    return digest.hexdigest()


def _record(path: Path, tokenizer: Tokenizer) -> dict[str, Any] | None:
    """Of a unit that was done by this tokenizer, whose files are there."""
    try:
        record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        sizes = [path.with_suffix(suffix).stat().st_size for suffix in (".bin", ".starts")]
    except (OSError, ValueError):
        return None
    wanted = [record["tokens"] * dtype_of(tokenizer).itemsize, record["documents"] * 8]
    return record if record["tokenizer"] == tokenizer.identity() and sizes == wanted else None


def encoded(home: Path, sources: Sequence[Source]) -> tuple[Tokens, Tokenizer] | None:
    """What is in a folder of encoded text; None where it is not whole, or its files have changed since."""
    try:
        manifest = json.loads((home / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    files = [[source.name, source.size, source.mtime_ns] for source in sources]
    if manifest["version"] != VERSION or manifest["sources"] != files:
        return None
    shards = [_mapped(home / name, manifest["dtype"]) for name, count in manifest["shards"] if count]
    starts = _mapped(home / "documents.bin", "<i8")
    return Tokens(shards, starts, manifest["identity"]), tokenizers.load(home / "tokenizer")


def _mapped(path: Path, dtype: str) -> np.ndarray:
    return np.memmap(path, dtype, "r").view(np.ndarray)


def make(home: Path, sources: Sequence[Source], field: str, tokenizer: Tokenizer, bar: Bar) -> None:
    """Encodes what is not encoded yet, and writes the manifest. Raises ConfigError. By one process at a time.

    Args:
        home: folder of the encoded text.
        sources: the files.
        field: of a line or a row, which has the text.
        tokenizer: to encode by.
        bar: shows how far it is.
    """
    for left in home.glob(".*.*"):  # of a process that was killed
        left.unlink(missing_ok=True)
    tokenizer.save(home / "tokenizer")
    work = jobs(home, sources, field)
    bar.begin(len(work))
    records = _all(work, tokenizer, bar)
    if not sum(record["tokens"] for record in records):
        raise ConfigError(f"data.args.files: got no text in {len(sources)} files, such as {sources[0].name}")
    before = 0
    with whole(home / "documents.bin") as beside, beside.open("wb") as file:
        for job, record in zip(work, records, strict=True):
            starts = np.fromfile((home / job.name).with_suffix(".starts"), "<i8")
            file.write((starts + before).astype("<i8").data)
            before += record["tokens"]
    texts = [record["text"] for record in records]
    manifest = {
        "version": VERSION,
        "identity": hashlib.sha256(json.dumps([texts, tokenizer.identity()]).encode()).hexdigest(),
        "sources": [[source.name, source.size, source.mtime_ns] for source in sources],
        "tokenizer": tokenizer.identity(),
        "dtype": dtype_of(tokenizer).str,
        "tokens": before,
        "documents": sum(record["documents"] for record in records),
        "bytes": sum(record["bytes"] for record in records),
        "shards": [[f"{job.name}.bin", record["tokens"]] for job, record in zip(work, records, strict=True)],
    }
    write_text(home / "manifest.json", json.dumps(manifest))
    bar.end(manifest["documents"], manifest["tokens"])
    kept = {job.name for job in work} | {"manifest", "documents"}
    for path in home.iterdir():
        if path.is_file() and not path.name.startswith(".") and path.stem not in kept:
            path.unlink()


def _all(work: Sequence[Job], tokenizer: Tokenizer, told: Progress) -> list[dict[str, Any]]:
    """The records of all units, each of which is done by one of some processes."""
    size = sum(source.size for job in work for source in job.sources)
    processes = min(len(os.sched_getaffinity(0)), len(work)) if size > ALONE_BYTES else 1
    if processes == 1:
        return [encode(job, tokenizer, told) for job in work]
    lock = threading.Lock()
    records: list[dict[str, Any]] = [{}] * len(work)
    left = iter(range(len(work)))

    def locked(size: int, units: int) -> None:
        with lock:
            told(size, units)

    def drive(worker: subprocess.Popen) -> None:
        while True:
            with lock:
                number = next(left, None)
            if number is None:
                return
            records[number] = _ask(worker, work[number], locked)

    with ExitStack() as stack, ThreadPoolExecutor(processes) as threads:
        workers = [stack.enter_context(_worker()) for _ in range(processes)]
        stack.callback(lambda: [worker.kill() for worker in workers])
        try:
            done, _ = wait([threads.submit(drive, worker) for worker in workers], return_when=FIRST_EXCEPTION)
            for one in done:
                one.result()
        except BaseException:
            for worker in workers:  # the threads that wait for them end
                worker.kill()
            raise
    return records


def _worker() -> subprocess.Popen:
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-c", WORKER, json.dumps([path for path in sys.path if isinstance(path, str)])]
    return subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def _ask(worker: subprocess.Popen, job: Job, told: Progress) -> dict[str, Any]:
    """Has a worker do a unit. Raises ConfigError."""
    assert worker.stdin is not None and worker.stdout is not None
    with suppress(BrokenPipeError):  # has ended, as is said below
        worker.stdin.write(_sent(job) + "\n")
        worker.stdin.flush()
    for line in worker.stdout:
        answer = json.loads(line)
        if isinstance(answer, list):
            told(*answer)
        elif "wrong" in answer:
            raise ConfigError(*answer["wrong"])
        else:
            return answer
    raise RuntimeError(f"a process that encodes text ended with {worker.wait()} at {job.sources[0].name}")


def _sent(job: Job) -> str:
    sources = [(str(source.path), *dataclasses.astuple(source)[1:]) for source in job.sources]
    return json.dumps([str(job.home), sources, [dataclasses.astuple(span) for span in job.spans], job.field])


def _received(line: str) -> Job:
    home, sources, spans, field = json.loads(line)
    files = tuple(Source(Path(path), *rest) for path, *rest in sources)
    return Job(Path(home), files, tuple(Span(*span) for span in spans), field)


def serve() -> None:
    """What a worker does: a unit for each line that it is sent, until there is none or nobody reads its answers."""
    tokenizer = None
    try:
        for line in sys.stdin:
            job = _received(line)
            tokenizer = tokenizer or tokenizers.load(job.home / "tokenizer")
            try:
                answer = encode(job, tokenizer, lambda *done: print(json.dumps(done), flush=True))
            except ConfigError as error:
                answer = {"wrong": error.lines}
            print(json.dumps(answer), flush=True)
    except (BrokenPipeError, KeyboardInterrupt):
        os._exit(1)
