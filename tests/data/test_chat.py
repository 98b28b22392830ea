"""Chats as data: the answers alone are targets, for any template that adds to what is there."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_train.config.load import load
from dist_train.data.chat import FLAG, Chat
from dist_train.data.text import text
from dist_train.data.tokenizer_file import FromFile
from dist_train.errors import ConfigError
from dist_train.models.chunked_loss import IGNORED
from dist_train.ranks.launcher import Launcher
from dist_train.run.check import check

from language_models import CHAT_TEMPLATE, CHATS, chats_in, messages

FORGETFUL = (
    "{% for m in messages %}{% if m.role != 'assistant' or loop.last %}{{ m.role }}: {{ m.content }}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def data(folder: Path, **more: Any) -> Any:
    return text(str(folder), False, "chats.jsonl", tokenizer="tokenizer.json", block=24, format="chat", **more)


@pytest.mark.parametrize("jinja", [False, True])
def test_answers_alone_are_targets(jinja: bool, tmp_path: Path):
    by = Chat(FromFile(chats_in(tmp_path, jinja=jinja) / "tokenizer.json"))
    for chat in CHATS:
        numbers = by.encode(json.dumps(messages(chat)))
        whole = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in chat)
        assert (numbers & (FLAG - 1)).tolist() == by.inner.encode(whole).tolist()
        shown = [json.loads(by.inner.text)["added_tokens"][-1]["id"]]  # <|im_end|>, which decode leaves out
        answers = [content for role, content in chat if role == "assistant"]
        counted = numbers[numbers < FLAG]
        assert by.decode(counted) == "".join(f"{answer}\n" for answer in answers)
        assert (counted == shown[0]).sum() == len(answers)  # a model learns to end


@pytest.mark.parametrize("packing", ["contiguous", "packed", "padded"])
def test_windows_of_chats(packing: str, tmp_path: Path):
    found = data(chats_in(tmp_path), packing=packing)
    tokenizer = found.facts["tokenizer"]
    assert isinstance(tokenizer, FromFile) and "answers" in found.train.about and "Gut" in found.train.describe(0)
    tree = found.train.gather(np.arange(len(found.train)))
    targets = tree["targets"][tree["targets"] != IGNORED]
    assert int(tree["input_ids"].min()) >= 0 and int(tree["input_ids"].max()) < tokenizer.vocab_size
    assert 0 < len(targets) < tree["targets"].numel() and int(targets.max()) < tokenizer.vocab_size
    said = tokenizer.decode(targets.tolist())
    assert "naïve one" in said and "1+1" not in said and "geht" not in said
    if packing == "contiguous":  # a target is the token after, where it counts
        after = torch.cat([tree["input_ids"].flatten()[1:], torch.tensor([0])]).view_as(tree["targets"])
        counts = (tree["targets"] != IGNORED).flatten()[:-1]
        assert torch.equal(after.flatten()[:-1][counts], tree["targets"].flatten()[:-1][counts])
    again = data(tmp_path, packing=packing)
    assert again.fingerprint() == found.fingerprint()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE.replace("\n<", " <")}))
    assert data(tmp_path, packing=packing).fingerprint() != found.fingerprint()


def test_what_is_no_chat_is_refused(tmp_path: Path):
    by = Chat(FromFile(chats_in(tmp_path) / "tokenizer.json"))
    for wrong, said in (
        ([{"role": "user", "content": "x"}], "got a chat without an answer"),
        ({"a": 1}, "no list of messages"),
        ([{"content": "x"}], "no list of messages"),
    ):
        with pytest.raises(ConfigError, match=said):
            by.encode(json.dumps(wrong))
    (tmp_path / "chats.jsonl").write_text('{"messages": [{"role": "user", "content": "x"}]}\n')
    with pytest.raises(ConfigError, match="chats.jsonl line 1: data.args.format: got a chat without an answer"):
        data(tmp_path)
    forgetful = Chat(FromFile(chats_in(tmp_path, FORGETFUL) / "tokenizer.json"))
    with pytest.raises(ConfigError, match="writes message 3 of 5 otherwise"):
        forgetful.encode(json.dumps(messages(CHATS[1])))
    raising = Chat(FromFile(chats_in(tmp_path, "{{ raise_exception('no system') }}") / "tokenizer.json"))
    with pytest.raises(ConfigError, match="template refuses: no system"):
        raising.encode(json.dumps(messages(CHATS[1])))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="which has no chat template"):
        data(tmp_path)
    (tmp_path / "c.txt").write_text("x")
    chats_in(tmp_path)
    with pytest.raises(ConfigError, match="got c.txt, expected chats in .jsonl files"):
        text(str(tmp_path), False, "c.txt", tokenizer="tokenizer.json", block=4, format="chat")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ("{format: chats, files: c}", "data.args.format: got 'chats', expected text or chat"),
        ("{format: chat, files: c}", "data.args.tokenizer: got None with data.args.format chat"),
        ("{format: chat, tokens: c, tokenizer: t.json}", "data.args.format: got chat with tokens"),
        ("{format: chat, tokenizer: t.json}", "data.args.format: got chat without data.args.files"),
    ],
)
def test_a_bad_option_is_one_line(args: str, said: str):
    with pytest.raises(ConfigError, match=said):
        check(load(["--data.name=text", f"--data.args={args}"]), Launcher(), writes=False)
