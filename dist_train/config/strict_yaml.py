"""YAML as a config wants it: 1e-3 is a number, a date is text, a key stands once, and what is written reads back."""

import re
from collections.abc import Callable
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """Plain YAML in which 1e-3 is a number (YAML 1.1 wants 1.0e-3) and a date is text."""

    yaml_implicit_resolvers = {
        first: [(tag, form) for tag, form in forms if not tag.endswith((":timestamp", ":float"))]
        for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?"
        r"|[0-9][0-9_]*[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))$|\.(?:nan|NaN|NAN)$"
    ),
    list("-+.0123456789"),
)


class Dumper(yaml.SafeDumper):
    """Quotes the text that _Loader would take for something else."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


# With allow_unicode the emitter writes U+0085 and its like as they are, and the loader reads them as a line's end.
Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"'
    ),
)


def parse(text: str, is_text: Callable[[str, str], bool] | None = None) -> Any:
    """The value of a YAML text. Raises yaml.YAMLError.

    Args:
        text: one YAML document.
        is_text: it is a config, in which this tells of section and key whether what stands there is text.
    """
    loader = _Loader(text)
    node = loader.get_single_node()
    if node is None:
        return None
    _check_nodes(node, ())
    if is_text and isinstance(node, yaml.MappingNode):
        _keep_text(loader, node, is_text)
    return loader.construct_document(node)


def _check_nodes(node: yaml.Node, above: tuple[yaml.Node, ...]) -> None:
    """A key that stands twice is a mistake, not a choice; what holds itself could not be written out again."""
    if node in above:
        raise yaml.YAMLError(f"the anchor at line {node.start_mark.line + 1} holds itself")
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"the key {key!r} stands twice")
        for _, value in node.value:
            _check_nodes(value, (*above, node))
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_nodes(item, (*above, node))


def _keep_text(loader: yaml.SafeLoader, root: yaml.MappingNode, is_text: Callable[[str, str], bool]) -> None:
    """Where a field is text, what stands there is text: YAML 1.1 would read `mode: off` as false, `name: 010` as 8."""
    loader.flatten_mapping(root)
    for section, body in root.value:
        if isinstance(body, yaml.MappingNode):
            loader.flatten_mapping(body)
            for key, value in body.value:
                if value.tag in _MISTAKEN and is_text(section.value, key.value):
                    value.tag = "tag:yaml.org,2002:str"


_MISTAKEN = ["tag:yaml.org,2002:bool", "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"]
