"""Runs of small language models as tests make them; and models that users bring: of transformers, and with adapters of
PEFT."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_train.checkpoint import weights
from dist_train.config.load import dump, load
from dist_train.config.tree import Config
from dist_train.data.tokenizer_file import trained
from dist_train.run import assemble

CPU = torch.device("cpu")
LINES = "the quick brown fox jumps over a lazy dog. naïve café owners smile, said Ünal — once more 🙂\n"
SIZES = {"layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "mlp_width": 48, "rope_theta": 500.0, "norm_eps": 1e-6}
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATS = [
    [("user", "Hi! Wie geht's?"), ("assistant", "Gut — und dir? 🙂")],
    [("system", "Be brief."), ("user", "1+1"), ("assistant", "2"), ("user", "2+2"), ("assistant", "4, naïve one")],
    [("user", "assistant"), ("assistant", "user")],
]


def config(folder: Path, *argv: str, tokenizer: str = "bytes", **args: Any) -> Config:
    (folder / "corpus.txt").write_text(LINES * 20)
    data = ["--data.name=text", f"--data.root={folder}", "--data.args.files=corpus.txt", "--data.args.block=24"]
    model = ["--model.name=decoder", f"--model.args={json.dumps(SIZES | args)}"]
    more = [f"--data.args.tokenizer={tokenizer}", "--task.name=language_modelling", "--train.device=cpu"]
    return load([*data, *model, *more, "--optim.name=AdamW", "--train.global_batch_size=8", *argv])


def messages(chat: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in chat]


def chats_in(folder: Path, template: str = CHAT_TEMPLATE, jinja: bool = False) -> Path:
    """A tokenizer with a template, and chats."""
    said = trained([content for chat in CHATS for _, content in chat], 300)
    told = json.loads(said)
    for i, token in enumerate(("<|im_start|>", "<|im_end|>")):
        one = {"id": len(told["model"]["vocab"]) + i, "content": token, "special": True, "normalized": False}
        told["added_tokens"].append(one | dict.fromkeys(("single_word", "lstrip", "rstrip"), False))
    (folder / "tokenizer.json").write_text(json.dumps(told))
    config = {"eos_token": "<|im_end|>"} | ({} if jinja else {"chat_template": template})
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if jinja:
        (folder / "chat_template.jinja").write_text(template)
    lines = [json.dumps({"messages": messages(chat)}) for chat in CHATS] * 8
    (folder / "chats.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def run_of(folder: Path, cell: Config) -> Path:
    """What a run leaves, with weights that its seed does not give."""
    folder.mkdir()
    parts = assemble.build(cell, CPU)
    with torch.no_grad():
        for value in parts.model.parameters():
            value.mul_(2).add_(0.01 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1)))
    (folder / "config.yaml").write_text(dump(dataclasses.replace(cell, run=load([]).run)))
    weights.save_weights(folder, parts.model.state_dict())
    parts.data.keep(folder)
    return folder


def gpt2(vocab_size: int, block: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_positions": block, "n_embd": 32, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, bos_token_id=0, eos_token_id=0, **sizes))


def lora(vocab_size: int, block: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    from dist_train.models.decoder import Decoder

    adapters = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    return get_peft_model(Decoder(vocab_size, block, layers=2, width=32), adapters)
