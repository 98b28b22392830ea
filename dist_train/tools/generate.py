"""python -m dist_train generate --run.dir DIR [--prompt TEXT ... | --prompts FILE] [--tokens N] [--temperature T]
[--top-k N] [--top-p P] [--seed N] [--which best] [--format text | chat]

Writes with a finished run's language model: what follows the prompt appears as it is written. With several prompts,
which FILE has one a line of, each is continued by itself, and a line of JSON has it. --temperature 0 always takes the
most probable token. With --format chat, as of a run that was trained on chats, a prompt is a question, and what is
printed is the answer. The other options are the config's own, on top of the run's.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_train.config.paths import expanded
from dist_train.config.tree import BackendConfig, CompileConfig, Config
from dist_train.config.values import unknown
from dist_train.errors import ConfigError
from dist_train.ranks.launcher import Launcher
from dist_train.run.check import check
from dist_train.tools.finished import finished, source_of
from dist_train.tools.options import split

if TYPE_CHECKING:
    from dist_train.run.writing import Writer

OPTIONS = {
    "--prompts": ("", "prompts.txt"),
    "--tokens": ("200", "200"),
    "--temperature": ("0.8", "0.8"),
    "--top-k": ("", "50"),
    "--top-p": ("1", "0.9"),
    "--seed": ("0", "0"),
    "--which": ("final", "best"),
    "--format": ("", "chat"),
}
FORMATS = ("text", "chat")


def run(argv: list[str], launcher: Launcher) -> int:
    """Prints the text, or a line of JSON for each of several prompts."""
    given, rest = prompts_of(argv)
    options, rest = split(rest, OPTIONS, "generate", paths=("--prompts",))
    folder, config = finished(rest, "generate")
    if launcher.name != "none":
        raise ConfigError(f"generate: got {launcher.name}, expected to be started alone: python -m dist_train generate")
    prompts, option = _read(given, options["--prompts"])
    tokens, seed = _number(options, "--tokens", int, 0), _number(options, "--seed", int)
    heat, top_p = _number(options, "--temperature", float), _number(options, "--top-p", float)
    top_k = _number(options, "--top-k", int) if options["--top-k"] else None
    config = dataclasses.replace(config, backend=BackendConfig("single"), compile=CompileConfig())
    check(config, launcher, writes=False)

    from dist_train.models.generation import Sampling

    sampling = Sampling(heat, top_k, top_p, seed)
    kind = options["--format"] or config.data.args.get("format") or FORMATS[0]
    if kind not in FORMATS:
        raise ConfigError(unknown("--format", kind, FORMATS, "format"))
    writer = writer_of(folder, config, options["--which"], chats=kind == "chat")
    numbers = [writer.tokens_of(prompt, option) for prompt in prompts]
    steps = writer.write(numbers, tokens, sampling)
    if len(prompts) == 1:
        print("" if writer.chat else prompts[0], end="", flush=True)
        for (piece,) in steps:
            print(piece, end="", flush=True)
        print()
        return 0
    texts = map("".join, zip(*steps, strict=True))
    for prompt, text in zip(prompts, texts, strict=True):
        print(json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False))
    return 0


def prompts_of(argv: list[str]) -> tuple[list[str], list[str]]:
    """The prompts of a command line, which may be several or empty, and the rest of it. Raises ConfigError."""
    prompts, rest, words = [], [], iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name != "--prompt":
            rest.append(word)
            continue
        found = value if equals else next(words, None)
        if found is None:
            raise ConfigError('generate: got --prompt without a value; for example --prompt "The "')
        prompts.append(found)
    return prompts, rest


def _read(given: list[str], file: str) -> tuple[list[str], str]:
    """The prompts, and the option that has them. Raises ConfigError."""
    if not file:
        return given or [""], "--prompt"
    if given:
        raise ConfigError("--prompts: got a file beside --prompt, expected one of them; leave one out")
    try:
        found = Path(expanded(file, "--prompts")).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts: got {file}, expected a text file with a prompt a line: {error}") from None
    if not found:
        raise ConfigError(f"--prompts: got {file} without a line, expected a prompt on each")
    return found, "--prompts"


def _number(options: dict[str, str], name: str, kind: Callable[[str], Any], least: int | None = None) -> Any:
    try:
        found = kind(options[name])
    except ValueError:
        found = None
    if found is None or (least is not None and found < least):
        what = "a whole number" if kind is int else "a number"
        above = "" if least is None else f" from {least}"
        raise ConfigError(f"{name}: got {options[name]!r}, expected {what}{above}; for example {OPTIONS[name][1]}")
    return found


def writer_of(folder: Path, config: Config, which: str = "final", chats: bool = False) -> "Writer":
    """The model of a run, which is ready to write. Raises ConfigError.

    Args:
        folder: of the run.
        config: of the run, in one process.
        which: final or best weights.
        chats: prompts are questions.
    """
    from dist_train.backends.precision import Precision
    from dist_train.data.chat import Chat
    from dist_train.data.tokenizer_file import FromFile
    from dist_train.ranks import dist
    from dist_train.run import assemble
    from dist_train.run.kept import known_data
    from dist_train.run.writing import Writer, context_of

    device = dist.resolve_device(config.train.device, 0)
    dist.set_threads(config.train.threads, 1)
    data = known_data(folder, config)
    tokenizer = data.known()["tokenizer"]
    if chats and not isinstance(tokenizer, FromFile):
        raise ConfigError(
            f"--format: got chat for a run with the tokenizer {tokenizer.name}, which has no chat template, expected "
            f"text; write --format text"
        )
    chat = Chat(tokenizer) if chats else None
    source = source_of(which, folder, config, data)
    precision = Precision(config.train.precision, device)
    precision.apply()
    model = assemble.build_model(config, data, precision.dtype, source)[0].to(device).eval()
    return Writer(model, precision.called(model), tokenizer, context_of(model, data), device, chat)
