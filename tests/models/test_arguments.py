"""What a model is called with: facts by name, arguments by place, and objects that a config writes as mappings."""

from dataclasses import dataclass, field
from functools import partial, wraps

import pytest
import torch
from torch import nn

from dist_train.config import lookup
from dist_train.config.load import load
from dist_train.data.sets import Columns, Data
from dist_train.errors import ConfigError, OwnCodeError
from dist_train.ranks.launcher import Launcher
from dist_train.run import assemble
from dist_train.run.check import check

from zoo_libraries import BERT, PADDED, WORDS

DATA = Data(
    Columns((torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64))), None, (2,), ("a", "b", "c"),
    facts={"vocab_size": WORDS, "depth": 7},
)  # fmt: skip


class Seen(nn.Module):
    """Keeps what it was called with."""

    def __init__(self, *args, **kwargs):
        super().__init__()
        self.layer, self.got = nn.Linear(2, 3), (args, kwargs)


def takes_any(**kwargs) -> Seen:
    return Seen(**kwargs)


def by_place(classes, /, width=1, *, depth=2) -> Seen:
    return Seen(classes, width=width, depth=depth)


def second_by_place(width, classes, /) -> Seen:
    return Seen(width, classes)


def asks_for_both(classes, depth=1) -> Seen:
    return Seen(classes=classes, depth=depth)


five_classes = partial(asks_for_both, classes=5)


def doubled(function):
    @wraps(function)
    def inner(*args, **kwargs):
        return function(*args, **kwargs)

    return inner


def renamed(function):
    def inner(width):
        return function(width, depth=width)

    return inner


@doubled
def decorated(classes, width) -> Seen:
    return Seen(classes=classes, width=width)


@renamed
def decorated_anew(classes, depth) -> Seen:
    return Seen(classes=classes, depth=depth)


class Makes(Seen):
    @classmethod
    def small(cls, classes, width=2) -> "Makes":
        return cls(classes=classes, width=width)


@dataclass
class Inner:
    rate: float = 0.5
    classes: int = 0


@dataclass
class Settings:
    width: int
    vocab_size: int = 1
    inner: Inner | None = None
    others: list[int] = field(default_factory=list)

    def __post_init__(self):
        if self.width < 0:
            raise ValueError("a width below 0")


def configured(config: Settings, classes: int) -> Seen:
    return Seen(config=config, classes=classes)


def of_text(config: "Settings | None" = None) -> Seen:
    return Seen(config=config)


def of_any_text(config: "what a type checker knows") -> Seen:  # noqa: F722
    return Seen(config=config)


def any_mapping(config: dict, other=None) -> Seen:
    return Seen(config=config, other=other)


class Base(Seen):
    config: Settings


class Inherits(Base):
    """As transformers has it: what the argument is stands at the class."""

    def __init__(self, config):
        super().__init__(config=config)


def made(name: str, **args) -> nn.Module:
    """The model of this module, as a run makes it, after its config was checked."""
    words = [] if not args else ["--model.args", repr(args)]
    config = load([f"--model.name={name if ':' in name else f'{__name__}:{name}'}", *words])
    check(config, Launcher(), writes=False)
    return assemble.maker(config, DATA)()


def refused(name: str, **args) -> str:
    with pytest.raises(ConfigError) as caught:
        made(name, **args)
    (line,) = caught.value.lines
    return line


@pytest.mark.parametrize(
    ("name", "args", "got"),
    [
        ("takes_any", {"width": 1}, ((), {"width": 1})),  # no fact: it asks for none by name
        ("by_place", {}, ((3,), {"width": 1, "depth": 7})),
        ("by_place", {"width": 4, "depth": 5}, ((3,), {"width": 4, "depth": 5})),
        ("second_by_place", {"width": 4}, ((4, 3), {})),
        ("asks_for_both", {}, ((), {"classes": 3, "depth": 7})),
        ("asks_for_both", {"classes": 9}, ((), {"classes": 9, "depth": 7})),
        ("five_classes", {}, ((), {"classes": 5, "depth": 7})),  # which it has bound
        ("five_classes", {"classes": 6}, ((), {"classes": 6, "depth": 7})),
        ("decorated", {"width": 4}, ((), {"classes": 3, "width": 4})),
        ("decorated_anew", {"width": 4}, ((), {"classes": 4, "depth": 4})),
        ("Makes.small", {}, ((), {"classes": 3, "width": 2})),
        ("of_any_text", {"config": {"width": 1}}, ((), {"config": {"width": 1}})),
        ("any_mapping", {"config": {"width": 1}}, ((), {"config": {"width": 1}, "other": None})),
    ],
)
def test_what_a_model_is_called_with(name: str, args: dict, got: tuple):
    assert made(name, **args).got == got


def test_what_does_not_fit_is_one_line():
    assert refused("second_by_place") == (
        f"model.args.width: got nothing, expected a value: {__name__}:second_by_place needs it; write "
        f"--model.args.width VALUE"
    )
    assert "it takes width; leave it out" in refused("decorated_anew", depth=3, width=2)
    assert "did you mean" not in refused("Makes.smaller") and "no 'Makes.smaller' in " in refused("Makes.smaller")


def test_a_mapping_stands_for_a_dataclass():
    model = made("configured", config={"width": 3, "inner": {"rate": 0.25}})
    assert model.got[1] == {"config": Settings(3, WORDS, Inner(0.25, 3)), "classes": 3}
    assert made("of_text", config={"width": 3}).got[1]["config"] == Settings(3, WORDS)
    assert made("of_text").got[1]["config"] is None
    assert made("Inherits", config={"width": 1, "vocab_size": 2}).got[1]["config"] == Settings(1, 2)


def test_a_dataclass_that_does_not_take_it_is_one_line():
    assert refused("configured", config={"widht": 3}) == (
        "model.args.config: got unknown key 'widht', expected one of width, vocab_size, inner, others; did you mean "
        "width?"
    )
    assert refused("configured", config={"width": 1, "inner": {"rat": 3}}).startswith("model.args.config.inner: got un")
    assert "which Settings refuses: " in refused("configured", config={})
    with pytest.raises(OwnCodeError) as caught:
        made("configured", config={"width": -1})
    assert caught.value.lines[-1] == "ValueError: a width below 0"
    assert any(line.startswith(f'  File "{__file__}"') for line in caught.value.lines)


def test_a_config_of_transformers():
    model = made("transformers:BertForSequenceClassification", **BERT)
    assert (model.config.hidden_size, model.config.vocab_size, model.config.num_labels) == (16, WORDS, 3)
    llama = made("transformers:LlamaForSequenceClassification", config=PADDED["config"])
    assert llama.config.hidden_size == 16
    said = refused("transformers:BertForSequenceClassification", config={"hiden_size": 16})
    assert said.startswith("model.args.config: got unknown key 'hiden_size', expected one of ")
    assert said.endswith("; did you mean hidden_size?")
    assert ", which BertConfig refuses: Validation error for field 'hidden_size': " in refused(
        "transformers:BertForSequenceClassification", config={"hidden_size": "16"}
    )


def test_what_was_pretrained(tmp_path):
    """from_pretrained gives a model in eval mode, which would be trained without dropout."""
    first = made("transformers:BertForSequenceClassification", **BERT)
    first.save_pretrained(tmp_path)
    model = made(
        "transformers:BertForSequenceClassification.from_pretrained", pretrained_model_name_or_path=str(tmp_path)
    )
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in first.state_dict().items())


def test_a_library_that_raises_is_not_called_ones_own_code():
    with pytest.raises(OwnCodeError) as caught:
        made("torchvision.models:vit_b_16", patch_size=8)
    lines = caught.value.lines
    assert lines[0] == "model.name: got torchvision.models:vit_b_16, which raises an error when it is called:"
    assert "multiple values for keyword argument 'patch_size'" in lines[-1]


def test_the_source_tells_what_is_taken_only_where_nothing_decorates_it(tmp_path):
    file = tmp_path / "some.py"
    file.write_text("@f\ndef g(a): ...\ndef h(a, /, b=1, *, c, **d): ...\n")
    assert lookup.parameters(file, "g") is None
    assert lookup.parameters(file, "h") == {"a": True, "b": False, "c": True, "**": False}
