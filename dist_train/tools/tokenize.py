"""python -m dist_train tokenize [--vocab N --output tokenizer.json] [--config FILE.yaml] [--data.args.files FILES ...]

Encodes the text of a config ahead of its runs, which encode it themselves where it is not. With --vocab it first trains
a tokenizer on that text, a byte-level BPE of at most N tokens, and encodes by it.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from dist_train.config.load import load
from dist_train.config.tree import Config
from dist_train.errors import ConfigError
from dist_train.ranks.launcher import Launcher
from dist_train.run.check import check
from dist_train.tools.options import split
from dist_train.whole import can_write, write

OPTIONS = {"--vocab": ("", "4096"), "--output": ("", "tokenizer.json")}
LEAST = 257  # tokens: a byte each, and one that ends a document


def run(argv: list[str], launcher: Launcher) -> int:
    """Prints a line of JSON about what is encoded."""
    options, rest = split(argv, OPTIONS, "tokenize", paths=("--output",))
    named = any(word.partition("=")[0] in ("--data.name", "--config") for word in rest)
    config = load(rest if named else ["--data.name", "text", *rest], "python -m dist_train tokenize")
    if launcher.name != "none":
        raise ConfigError(f"tokenize: got {launcher.name}, expected to be started alone: python -m dist_train tokenize")
    if config.data.name != "text":
        raise ConfigError(f"data.name: got {config.data.name}, expected text, which tokenize encodes")
    if "tokens" in config.data.args:
        raise ConfigError("data.args.tokens: got token numbers, which are encoded; expected --data.args.files FILES")
    output = _output(options["--vocab"], options["--output"], config)
    check(config, launcher, writes=False)
    if output is not None:
        path, size = output
        can_write(path, "--output")
        _train(config, path, size)
        args = config.data.args | {"tokenizer": str(path.resolve())}
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, args=args))

    print(json.dumps(_encode(config)))
    return 0


def _encode(config: Config) -> dict[str, Any]:
    from dist_train.data import encoded_text

    args, root = config.data.args, Path(config.data.root)
    field = args.get("field", "text")
    train, by = encoded_text.read(root, args.get("files"), field, args.get("tokenizer"), args.get("end_token"))
    found = {"tokenizer": by.name, "vocab_size": by.vocab_size, "tokens": len(train), "documents": len(train.starts)}
    if args.get("test_files") is not None:
        test = encoded_text.read_test(root, args["test_files"], field, by)
        found |= {"test_tokens": len(test), "test_documents": len(test.starts)}
    return found


def _output(vocab: str, output: str, config: Config) -> tuple[Path, int] | None:
    """The file of the tokenizer that is trained, and its size; None where none is."""
    if not vocab and not output:
        return None
    if not vocab or not output:
        missing = "--output tokenizer.json" if vocab else "--vocab 4096"
        raise ConfigError(
            f"tokenize: got {'--vocab' if vocab else '--output'} alone, expected both, to train a tokenizer; add "
            f"{missing}"
        )
    if not vocab.isdecimal() or int(vocab) < LEAST:
        raise ConfigError(f"--vocab: got {vocab}, expected a number of tokens from {LEAST}; for example --vocab 4096")
    if config.data.args.get("tokenizer") is not None:
        raise ConfigError(
            f"data.args.tokenizer: got {config.data.args['tokenizer']} with --vocab, which trains another, expected "
            f"one of them; leave one out"
        )
    return Path(output), int(vocab)


def _train(config: Config, path: Path, size: int) -> None:
    """Trains a tokenizer on the text to train on, and writes its file."""
    from dist_train.data import encoded_text
    from dist_train.data.tokenizer_file import FromFile, trained

    args = config.data.args
    texts = encoded_text.texts(Path(config.data.root), args.get("files"), args.get("field", "text"))
    write(path, trained(texts, size).encode(), "--output")
    made = FromFile(path).vocab_size
    short = "; the text has no more pairs" if made < size else ""
    print(f"trained a tokenizer of {made:,} tokens: {path}{short}", file=sys.stderr, flush=True)
