"""What a data set asks of the config. Pure, and before torch is imported."""

from collections.abc import Iterator
from typing import Any

from dist_train.config import arguments
from dist_train.config.lookup import accepts
from dist_train.config.tree import Config, DataConfig
from dist_train.config.values import too_small
from dist_train.data import BATCH_TRANSFORMS, DATASETS, FROM_FILES, MIXING
from dist_train.ranks.launcher import Launcher

GIVEN = ("root", "download")  # by the package itself, to who asks, so not for data.args
TRANSFORMS = ("transforms", "test_transforms")  # of the config, which data sets of ours apply themselves


def problems(config: Config, _: Launcher) -> Iterator[str]:
    """A line for every mistake."""
    data = config.data
    yield from too_small({"data.workers": (data.workers, 0)})
    given = {"data.args." + k for k in data.args}
    ours = (*GIVEN, *TRANSFORMS) if data.name in FROM_FILES else GIVEN
    yield from arguments.problems(DATASETS, data.name, "data", data.args, given, ours, facts=GIVEN)
    yield from _of_rows(data)
    if data.name == "text":
        yield from _text(data.args)
    yield from _facts(data.facts)
    for key in (*TRANSFORMS, "batch_transforms"):
        yield from _entries(f"data.{key}", getattr(data, key))
    yield from _batch_transforms(config)


def parts_of(entry: Any) -> tuple[str, dict[str, Any]]:
    """Name and arguments of an entry of a list of transforms."""
    if isinstance(entry, str):
        return entry, {}
    return entry["name"], {key: value for key, value in entry.items() if key != "name"}


def _of_rows(data: DataConfig) -> Iterator[str]:
    """What data sets of ours have already, or do not need."""
    if data.pair is not None and len(data.pair) != 2:
        yield f"data.pair: got {data.pair}, expected two keys, of the input and of the target: [image, label]"
    if data.test_args is not None and data.test_fraction is not None:
        yield f"data.test_fraction: got {data.test_fraction} with data.test_args, expected one of them; leave one out"
    if data.name not in DATASETS:
        return
    for key in ("test_args", "test_fraction", "pair"):
        value = getattr(data, key)
        if value is not None:
            own = "; write --data.args.test_fraction" if key == "test_fraction" and data.name in FROM_FILES else ""
            yield f"data.{key}: got {value}, but {data.name} has its own test split and pairs; leave it out{own}"
    if data.workers > 0 and data.name not in FROM_FILES and not data.transforms and not data.test_transforms:
        yield f"data.workers: got {data.workers}, expected 0: {data.name} is held in memory and needs no workers"


TEXT_ARGS = ("files", "test_files", "tokens", "test_tokens", "field", "tokenizer", "end_token")
PACKINGS = ("contiguous", "packed", "padded")


def _text(args: dict[str, Any]) -> Iterator[str]:
    """What the arguments of text ask of each other."""
    given = {key for key, value in args.items() if value is not None}
    for key in TEXT_ARGS:
        if key in given and (not isinstance(args[key], str) or not args[key]):
            yield f"data.args.{key}: got {args[key]!r}, expected text; for example --data.args.{key} NAME"
    for key in ("block", "vocab_size"):
        if key in given and (type(args[key]) is not int or args[key] < 1):
            yield f"data.args.{key}: got {args[key]!r}, expected a whole number from 1; for example 256"
    if args.get("packing", PACKINGS[0]) not in PACKINGS:
        yield f"data.args.packing: got {args['packing']!r}, expected {', '.join(PACKINGS[:-1])} or {PACKINGS[-1]}"
    if "sources" in given:
        yield from _sources(args, given)
    yield from _format(args, given)
    fraction = args.get("test_fraction", 0.1)
    if type(fraction) not in (int, float) or not 0 <= fraction < 1:
        yield f"data.args.test_fraction: got {fraction!r}, expected a share from 0 to below 1, such as 0.1"
    if "tokens" in given:
        for key in ("files", "test_files"):
            if key in given:
                yield f"data.args.{key}: got {args[key]!r} with data.args.tokens, expected one of them; leave one out"
        if "vocab_size" not in given and "tokenizer" not in given:
            yield (
                "data.args.vocab_size: got nothing with data.args.tokens, expected the size of the vocabulary; for "
                "example --data.args.vocab_size 50257, or the tokenizer that wrote them"
            )
        if args.get("tokenizer") == "characters":
            yield "data.args.tokenizer: got characters with data.args.tokens, expected bytes, or a tokenizer.json"
    else:
        for key in ("test_tokens", "vocab_size"):
            if key in given:
                yield f"data.args.{key}: got {args[key]!r} without data.args.tokens, expected both; leave it out"
    if "test_files" in given and "files" not in given and "tokens" not in given:
        yield f"data.args.test_files: got {args['test_files']!r} without data.args.files, expected both; give the files"
    if "end_token" in given and args.get("tokenizer") in (None, "bytes", "characters"):
        yield (
            f"data.args.end_token: got {args['end_token']!r} for {args.get('tokenizer') or 'bytes'}, expected it only "
            f"with a tokenizer.json; leave it out"
        )


def _format(args: dict[str, Any], given: set[str]) -> Iterator[str]:
    if args.get("format", "text") not in ("text", "chat"):
        yield f"data.args.format: got {args['format']!r}, expected text or chat"
    if args.get("format") != "chat":
        return
    for key in sorted(given & {"sources", "tokens"}):
        yield f"data.args.format: got chat with {key}, expected it with data.args.files; leave one out"
    if not {"files", "sources", "tokens"} & given:
        yield "data.args.format: got chat without data.args.files, expected chats; for example --data.args.files chats"
    if args.get("tokenizer") in (None, "bytes", "characters"):
        yield (
            f"data.args.tokenizer: got {args.get('tokenizer')} with data.args.format chat, expected the tokenizer.json "
            f"of a model with a chat template beside it"
        )


def _sources(args: dict[str, Any], given: set[str]) -> Iterator[str]:
    """What a mixture of sources asks."""
    example = "for example --data.args.sources '[{files: a/*.txt, weight: 0.7}, {files: b/*.txt, weight: 0.3}]'"
    sources = args["sources"]
    if not isinstance(sources, list) or not sources or not all(isinstance(one, dict) for one in sources):
        yield f"data.args.sources: got {sources!r}, expected a list of files and their weights; {example}"
        return
    for i, one in enumerate(sources):
        if set(one) - {"field"} != {"files", "weight"}:
            got = sorted(map(str, one))
            yield f"data.args.sources[{i}]: got keys {got}, expected files, weight and maybe field; {example}"
            continue
        for key in sorted(set(one) - {"weight"}):
            if not isinstance(one[key], str) or not one[key]:
                yield f"data.args.sources[{i}].{key}: got {one[key]!r}, expected text; {example}"
        weight = one["weight"]
        if type(weight) not in (int, float) or not 0 < weight < float("inf"):
            yield f"data.args.sources[{i}].weight: got {weight!r}, expected a finite number above 0; {example}"
    for key in sorted(given & {"files", "test_files", "tokens", "test_tokens"}):
        yield f"data.args.{key}: got {args[key]!r} with data.args.sources, expected one of them; leave one out"
    if args.get("tokenizer") == "characters":
        yield (
            "data.args.tokenizer: got characters with data.args.sources, expected one tokenizer for all of them: "
            "bytes, or a tokenizer.json"
        )


def _facts(facts: dict[str, Any]) -> Iterator[str]:
    classes, shape = facts.get("classes"), facts.get("input_shape")
    names = isinstance(classes, list) and bool(classes) and all(type(name) in (str, int) for name in classes)
    if "classes" in facts and not names and not (type(classes) is int and classes > 0):
        yield (
            f"data.facts: got classes {classes!r}, expected their number, or a list of their names, in quotes where "
            f"they are words such as yes and no"
        )
    if "input_shape" in facts and not _is_shape(shape):
        yield f"data.facts: got input_shape {shape!r}, expected the sizes of a sample's input, such as [3, 32, 32]"
    for key in ("mean", "std"):
        if key in facts and not isinstance(facts[key], list):
            yield f"data.facts: got {key} {facts[key]!r}, expected a number per channel, or one for all: [0.5]"


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, list) and bool(shape) and all(type(size) is int and size > 0 for size in shape)


def _entries(path: str, entries: list[Any]) -> Iterator[str]:
    for entry in entries:
        named = isinstance(entry, dict) and isinstance(entry.get("name"), str) and all(type(k) is str for k in entry)
        if not named and not isinstance(entry, str):
            yield (
                f"{path}: got {entry!r}, expected a name, or one with arguments such as {{name: RandomCrop, size: 28}}"
            )


def _batch_transforms(config: Config) -> Iterator[str]:
    entries = config.data.batch_transforms
    if any(_entries("", entries)):
        return
    for name, args in map(parts_of, entries):
        if name == "Normalize":
            yield (
                "data.batch_transforms: got Normalize, which would leave out what is tested on; expected "
                "--data.normalize true, with mean and std in data.facts if they are not those of the data set"
            )
            continue
        takes = accepts(BATCH_TRANSFORMS, name, "data.batch_transforms")
        for key in sorted(args.keys() - takes.keys()) if "**" not in takes else ():
            own = ", ".join(key for key in takes if key not in arguments.FACTS) or "no arguments"
            yield f"data.batch_transforms: got {key} of {name}, which does not have it; it takes {own}; leave it out"
        if name in MIXING and config.task.name == "classification":
            weighs = [key for key in ("class_weights", "ignore_index") if config.task.args.get(key) is not None]
            other = "task.loss nll" if config.task.loss == "nll" else f"task.args.{weighs[0]}" if weighs else None
            if other is not None:
                yield f"data.batch_transforms: got {name} with {other}, which takes no vectors; leave one out"
    if entries and config.compile.scope == "step":
        yield (
            "data.batch_transforms: got them with compile.scope step, whose steps are not the host's; expected none; "
            "write --compile.scope model"
        )
