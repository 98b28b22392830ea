"""From the command line to a config: defaults < --config FILE.yaml < --section.key value.

No torch here: `--help` and a mistake in a config answer at once.
"""

import argparse
import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from dist_train.config import paths, strict_yaml
from dist_train.config.tree import PATH, Config, fields_of, to_config, to_tree
from dist_train.config.values import any_value, fitting, is_dict, is_optional, is_text, mismatch, unknown
from dist_train.errors import ConfigError

# Keys that have another place than before.
MOVED = {"train.loss": "task.loss", "train.label_smoothing": "task.args.label_smoothing"}


def load(argv: list[str], prog: str = "python -m dist_train") -> Config:
    """The config of a command line. Raises ConfigError. `--help` and `--print_config` print and raise SystemExit(0).

    Args:
        argv: `--section.key value` or `--section.key=value`, and `--config FILE.yaml`. What stands there as a key wins
            over every file, wherever `--config` stands. Of several files the later wins, key by key; of one key given
            twice the later. `--optim.args.eps 1e-6` sets one of the arguments, `--optim.args '{eps: 1e-6}'` all.
        prog: the name that the help gives to the program.
    """
    files, options, asked = _split([paths.typed(word) for word in argv])
    if asked == "help":
        _help(prog)
        raise SystemExit(0)
    tree = dataclasses.asdict(Config())
    for file in files:
        for section, body in _read(file).items():
            tree[section] |= body
    lines: list[str] = []
    for path, text in options:
        section, key, *name = path.split(".")
        hint = fields_of(section)[key]
        try:
            if name:
                before = tree[section][key] if isinstance(tree[section][key], dict) else {}
                tree[section][key] = before | {name[0]: any_value(text)}
            elif is_text(hint):
                tree[section][key] = fitting(path, None if text == "null" and is_optional(hint) else text, hint)
            else:
                tree[section][key] = fitting(path, any_value(text), hint)
        except ConfigError as error:
            lines += error.lines
    lines += _expand(tree)
    if lines:
        raise ConfigError(*lines)
    config = to_config(tree)
    if asked:
        print(dump(config), end="")
        raise SystemExit(0)
    return config


def made(source: Config | Mapping[str, Any] | str | os.PathLike[str] | None, *sections: Mapping[str, Any]) -> Config:
    """The config of a program in Python. Raises ConfigError.

    Args:
        source: a config, keys by section as they stand in a file, the path of a file, or None, which is the defaults.
        sections: keys by section that win over those of the source; the later over the earlier.
    """
    tree = to_tree(source if isinstance(source, Config) else Config())
    for values, key, _ in _paths(tree):
        values[key] = paths.written(values[key])
    trees: list[Mapping[str, Any]] = list(sections)
    if isinstance(source, str | os.PathLike):
        trees.insert(0, _read(os.fspath(source)))
    elif isinstance(source, Mapping):
        trees.insert(0, source)
    elif source is not None and not isinstance(source, Config):
        got = type(source).__name__
        raise ConfigError(f"config: got {got}, expected a Config, a dict of sections, or the path of a YAML file")
    for one in trees:
        for section, body in _fitted(_plain(one), "config").items():
            tree[section] |= body
    lines = _expand(tree)
    if lines:
        raise ConfigError(*lines)
    return to_config(tree)


def _plain(value: Any) -> Any:
    """As it would be in YAML: tuples are lists there, paths are text."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _expand(tree: dict[str, dict[str, Any]]) -> list[str]:
    """Replaces `~` and variables in the paths of a config; and a line for each that cannot be."""
    lines = []
    for values, key, path in _paths(tree):
        try:
            values[key] = paths.expanded(values[key], path)
        except ConfigError as error:
            lines += error.lines
    return lines


def _paths(tree: dict[str, dict[str, Any]]) -> Iterator[tuple[dict[str, Any], str, str]]:
    """The paths of a config that are set: where each stands, its key there, and its config path."""
    for section in dataclasses.fields(Config):
        for one in dataclasses.fields(section.type):
            if one.metadata == PATH and tree[section.name][one.name] is not None:
                yield tree[section.name], one.name, f"{section.name}.{one.name}"
    args = tree["data"]["args"]
    for key in paths.IN_DATA_ARGS.get(tree["data"]["name"], ()):
        if isinstance(args.get(key), str):
            yield args, key, f"data.args.{key}"


def _help(prog: str) -> None:
    """Prints the fields with their documentation, types and defaults, which jsonargparse reads from the dataclasses."""
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s [COMMAND] [--config FILE.yaml] [--section.key value ...]",
        description=Config.__doc__,
    )
    parser.add_argument("--config", metavar="FILE.yaml", default=argparse.SUPPRESS, help="YAML file with what follows.")
    parser.add_argument("--print_config", action="store_true", help="Print the config that results, and end.")
    parser.add_class_arguments(Config, None)
    for action in parser._actions:  # --train FILE and its like, which the parser adds and _split refuses
        if action.dest in fields_of(""):
            action.help = argparse.SUPPRESS
    parser.print_help()


def dump(config: Config) -> str:
    """The config as YAML that `--config` reads back to an equal config."""
    tree = dataclasses.asdict(config)
    for values, key, _ in _paths(tree):
        values[key] = paths.written(values[key])
    return yaml.dump(tree, Dumper=strict_yaml.Dumper, sort_keys=False, allow_unicode=True)


def _split(argv: list[str]) -> tuple[list[str], list[tuple[str, str]], str]:
    """The files of `--config`; the other options with their values; and "help" or "print_config" if that is asked for.

    Not argparse's: it would take the -1e-3 of `--optim.lr -1e-3` for an option, and not list the valid names.
    """
    files: list[str] = []
    options: list[tuple[str, str]] = []
    asked = ""
    words = iter(argv)
    for word in words:
        if word in ("-h", "--help", "--print_config"):
            asked = "print_config" if word == "--print_config" and asked != "help" else "help"
            continue
        if not word.startswith("--"):
            raise ConfigError(f"command line: got {word!r}, expected --section.key value, or --config FILE.yaml")
        option, equals, value = word[2:].partition("=")
        if option != "config":
            _check_path(option)
        if not equals:
            value = next(words, "--")
            if value.startswith("--"):
                if option == "config":
                    raise ConfigError("--config: got no value, expected a YAML file; write --config FILE.yaml")
                raise ConfigError(mismatch(option, "no value"))
        if option == "config":
            files.append(value)
        else:
            options.append((option, value))
    return files, options, asked


def _check_path(path: str) -> None:
    section, _, key = path.partition(".")
    if path in MOVED:
        raise ConfigError(f"{path}: {_moved(path)}")
    sections = list(fields_of(""))
    if path in ("help", "print_config"):
        raise ConfigError(f"command line: got --{path} with a value, expected --{path} alone")
    if section not in sections:
        valid = [f"--{name}" for name in (*sections, "config", "print_config", "help")]
        every = [f"--{s}.{key}" for s in sections for key in fields_of(s)]
        same = [word for word in every if word.endswith(f".{path}")]  # --lr
        raise ConfigError(unknown("command line", f"--{path}", valid, near=same or [*every, *valid]))
    valid = fields_of(section)
    name, _, rest = key.partition(".")
    if not name:
        raise ConfigError(f"{section}: got --{section}, expected --{section}.KEY with KEY one of {', '.join(valid)}")
    if name not in valid or (rest and not is_dict(valid[name])):
        raise ConfigError(unknown(section, name if name not in valid else key, list(valid)))
    if "." in rest:
        top, _, below = rest.partition(".")
        whole = f"--{section}.{name}.{top} '{{{below}: VALUE}}'"
        raise ConfigError(f"{section}.{name}: got --{path}, expected the keys below {top} in one value; write {whole}")


def _read(name: str) -> dict[str, dict[str, Any]]:
    """The keys of a YAML file, by section. A section, or a field with keys of its own such as `args`, with nothing
    below it is the same as none."""
    file = Path(paths.expanded(name, "--config"))
    try:
        tree = strict_yaml.parse(file.read_text(encoding="utf-8"), _is_text_at)
    except OSError as error:
        raise ConfigError(f"--config: got {name!r}, expected a YAML file that can be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError) as error:
        detail = " ".join(str(error).replace('in "<unicode string>", ', "").split())
        raise ConfigError(f"--config: got {name}, expected valid YAML: {detail}") from None
    if not isinstance(tree, dict | None):
        raise ConfigError(f"--config: got {name} with {tree!r}, expected sections such as train: with keys below them")
    return _fitted(tree or {}, name)


def _fitted(tree: Mapping[str, Any], name: str) -> dict[str, dict[str, Any]]:
    """The keys of a tree, by section, if they are there and fit. Raises ConfigError.

    Args:
        tree: as in a file.
        name: of the file.
    """
    lines = list(_unknown_keys(tree, name))
    if lines:
        raise ConfigError(*lines)
    out: dict[str, dict[str, Any]] = {}
    for section, body in tree.items():
        out[section] = {}
        for key, value in (body or {}).items():
            hint = fields_of(section)[key]
            try:
                if value is not None or not is_dict(hint):
                    out[section][key] = fitting(f"{section}.{key}", value, hint, f" in {name}")
            except ConfigError as error:
                lines += error.lines
    if lines:
        raise ConfigError(*lines)
    return out


def _is_text_at(section: str, key: str) -> bool:
    return is_text((fields_of(section) or {}).get(key))


def _unknown_keys(tree: Mapping[str, Any], file: str) -> Iterator[str]:
    sections = fields_of("")
    for section, body in tree.items():
        if section not in sections:
            yield unknown(f"{file}", str(section), list(sections), "section")
        elif not isinstance(body, dict | None):
            yield f"{section}: got {body!r} in {file}, expected keys below it: {', '.join(fields_of(section))}"
        else:
            valid = fields_of(section)
            for key in body or ():
                if f"{section}.{key}" in MOVED:
                    yield f"{section} in {file}: {_moved(f'{section}.{key}')}"
                elif key not in valid:
                    yield unknown(f"{section} in {file}", str(key), list(valid))


def _moved(path: str) -> str:
    return f"{path} is now {MOVED[path]}; write --{MOVED[path]} VALUE"
