"""Which layers of a model are split over the tensor ranks of a mesh, and how: a table of patterns of their names, which
is the model's own or the config's."""

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase

from torch import nn

from dist_train.config.tree import ModelConfig
from dist_train.errors import ConfigError
from dist_train.models.split_words import Word, word_of

NAMES_SHOWN = 4
EXAMPLE = '{"*.q_proj": columns, "*.o_proj": rows}'


def table_of(model: nn.Module, config: ModelConfig) -> tuple[str, Mapping[str, str]]:
    """The table, and its path for people: that of the config, else the model's attribute `split`.

    Args:
        model: the whole one.
        config: has model.split.
    """
    if config.split:
        return "model.split", config.split
    own = getattr(model, "split", None)  # of any module: it may be something else there
    return f"{type(model).__name__}.split", own if isinstance(own, Mapping) else {}


def words_of(model: nn.Module, config: ModelConfig) -> dict[str, Word]:
    """What is done with each layer of the table, by its name. Of several patterns the last decides.

    Raises:
        ConfigError: an unknown word, or a pattern that matches nothing.
    """
    path, table = table_of(model, config)
    names = [name for name, _ in model.named_modules() if name]
    found: dict[str, Word] = {}
    for pattern, text in table.items():
        word = word_of(f"{path}: {pattern}", text)
        matched = [name for name in names if fnmatchcase(name, pattern)]
        if not matched:
            leaves = [name for name, module in model.named_modules() if name and not list(module.children())]
            raise ConfigError(
                f"{path}: got {pattern!r}, which matches no layer, expected a pattern of their names, such as "
                f"{', '.join(leaves[-NAMES_SHOWN:])}"
            )
        found |= dict.fromkeys(matched, word)
    return {name: found[name] for name in names if name in found}


def cuts(words: Mapping[str, Word]) -> bool:
    """Whether each rank has a part of the tokens between layers."""
    return any(word.kind in ("sequence", "gather", "cut") for word in words.values())


def check(model: nn.Module, config: ModelConfig, ranks: int, block: int | None) -> None:
    """Raises ConfigError where the layers of a model cannot be split over so many ranks.

    Args:
        model: the whole one.
        config: has model.split.
        ranks: of the tensor dimension. Of one, words and patterns are looked at alone.
        block: tokens of a sample; None where that is not known.
    """
    path, table = table_of(model, config)
    words = words_of(model, config)
    if ranks == 1:
        return
    if not any(word.splits for word in words.values()):
        got = "a table that splits no layer" if table else "no table of what is split"
        raise ConfigError(
            f"backend.mesh.tensor: got {ranks}, but {got} for {type(model).__name__}, expected model.split, such as "
            f"{EXAMPLE}, or an attribute split of the model; or write --backend.mesh.tensor 1"
        )
    modules = dict(model.named_modules())
    lines = [*_unfit(path, modules, words), *_sizes(modules, words, ranks), *_shared(path, model, modules, words)]
    if cuts(words) and block is not None and block % ranks:
        lines.append(
            f"data.args.block: got {block} tokens on {ranks} tensor ranks, which have a part of them each "
            f"({path}), expected a multiple, such as {block // ranks * ranks or ranks}"
        )
    if lines:
        raise ConfigError(*lines)


def _unfit(path: str, modules: Mapping[str, nn.Module], words: Mapping[str, Word]) -> Iterator[str]:
    """Layers that a word is not for."""
    for name, word in words.items():
        module = modules[name]
        kind = type(module).__name__
        if word.splits and not isinstance(module, (nn.Linear, nn.Embedding)):
            yield (
                f"{path}: got {word.kind} for {name}, which is a {kind}, expected a Linear or an Embedding; leave it "
                f"out, and all tensor ranks compute it alike"
            )
        elif word.splits and word.piece > 1 and isinstance(module, nn.Embedding):
            yield f"{path}: got pieces of {word.piece} for {name}, expected a Linear; write {word.kind} alone"
        elif word.kind == "sequence" and (list(module.children()) or list(module.buffers())):
            yield (
                f"{path}: got sequence for {name}, which is a {kind} with layers or buffers in it, expected a layer "
                f"that computes each token by itself, such as a LayerNorm; name those within it"
            )


def _sizes(modules: Mapping[str, nn.Module], words: Mapping[str, Word], ranks: int) -> Iterator[str]:
    """Sizes that so many ranks cannot share out: a line for those that are alike."""
    alike: dict[tuple[Word, int], list[str]] = {}
    for name, word in words.items():
        if word.splits and isinstance(modules[name], (nn.Linear, nn.Embedding)):
            size = _size(modules[name], word)
            if not _fits(modules[name], word, size, ranks):
                alike.setdefault((word, size), []).append(name)
    for (word, size), names in alike.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        got = f"backend.mesh.tensor: got {ranks}, but {names[0]}{more}"
        if size % word.piece:
            yield f"{got} has {size} {word.kind}, expected a multiple of the {word.piece} that stay together"
            continue
        fits = [n for n in range(1, size // word.piece + 1) if _fits(modules[names[0]], word, size, n)]
        shown = ", ".join(map(str, fits[:8])) + (", ..." if len(fits) > 8 else "")
        of = f"{size} {word.kind}" if word.piece == 1 else f"{size // word.piece} times {word.piece} {word.kind}"
        yield f"{got} has {of}, expected one of {shown}; or leave it out of the table"


def _size(module: nn.Module, word: Word) -> int:
    """How many there are of what is split."""
    if isinstance(module, nn.Linear):
        return module.out_features if word.kind == "columns" else module.in_features
    assert isinstance(module, nn.Embedding)
    return module.embedding_dim if word.kind == "columns" else module.num_embeddings


def _fits(module: nn.Module, word: Word, size: int, ranks: int) -> bool:
    """Whether so many ranks have equal parts of whole pieces; of what is added up or gathered afterwards, such as a
    vocabulary, whether each has one."""
    uneven = word.gathered and word.kind == "columns" or isinstance(module, nn.Embedding) and word.kind == "rows"
    if uneven and word.piece == 1:
        return -(-size // ranks) * (ranks - 1) < size
    return size % word.piece == 0 and size // word.piece % ranks == 0


def _shared(
    path: str, model: nn.Module, modules: Mapping[str, nn.Module], words: Mapping[str, Word]
) -> Iterator[str]:  # fmt: skip
    """Weights of several layers that are not split alike."""
    uses: dict[nn.Parameter, dict[str, str]] = {}
    for name, module in modules.items():
        for own, parameter in module._parameters.items():
            if parameter is not None:
                uses.setdefault(parameter, {})[f"{name}.{own}"] = _lies(module, words.get(name))
    for places in uses.values():
        if len(set(places.values())) > 1:
            one, its = next(iter(places.items()))
            other, others = next((name, lies) for name, lies in places.items() if lies != its)
            yield (
                f"{path}: got {one}, which is {its}, and {other}, the same weight, which is {others}, expected both "
                f"alike; name both layers, such as rows for an embedding and columns gathered for the output"
            )


def _lies(module: nn.Module, word: Word | None) -> str:
    """How a layer's weight lies on the ranks."""
    if word is None or word.kind in ("gather", "cut"):
        return "not split"
    if word.kind == "sequence":
        return "a copy on each rank"
    first = (word.kind == "columns") is isinstance(module, nn.Linear)
    return f"split in its {'first' if first else 'second'} dimension"
