"""A language model as a folder that transformers loads, and what reads its format, such as vLLM: config.json, weights
in safetensors, tokenizer, generation_config.json."""

import copy
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from dist_train.checkpoint.rules import PRETRAINED, SHARDED
from dist_train.data.tokenizer_base import Tokenizer
from dist_train.errors import ConfigError
from dist_train.models.decoder import Decoder
from dist_train.models.generation import Sampling, reader_of, written
from dist_train.models.llama import CONFIG, told_of
from dist_train.run.writing import context_of
from dist_train.tasks.base import inputs_and_targets, tensor_of

if TYPE_CHECKING:
    from dist_train.run.assemble import Parts

GENERATION = "generation_config.json"
SHARD_BYTES = 5_000_000_000  # of a file of weights, at most
SAMPLES, PROMPTS, WRITTEN = 16, 4, 32  # windows whose logits are compared; of these are continued; by so many tokens


def write(parts: "Parts", path: Path) -> nn.Module:
    """Writes the folder, and gives the model that is in it: with the adapters of PEFT merged. Raises ConfigError for a
    model that is none of this format."""
    tokenizer: Tokenizer | None = parts.data.known().get("tokenizer")
    model = merged(parts.model)
    end = None if tokenizer is None else tokenizer.end
    if isinstance(model, Decoder):
        path.mkdir()
        _save(model.state_dict(), path)
        _dump(path / CONFIG, told_of(model, end))
        _dump(path / GENERATION, {} if end is None else {"eos_token_id": end})
    elif _is("transformers", "PreTrainedModel", model):
        model.save_pretrained(path, max_shard_size=SHARD_BYTES)
    else:
        raise ConfigError(
            f"--format: got hf for {type(model).__name__}, expected model.name decoder or a model of transformers, "
            f"whose format it is; write --format safetensors"
        )
    if tokenizer is not None:
        tokenizer.save(path)
    return model


def merged(model: nn.Module) -> nn.Module:
    """The model with the adapters of PEFT in its weights; a copy, where it has any."""
    return copy.deepcopy(model).merge_and_unload() if _is("peft", "PeftModel", model) else model


def _is(module: str, name: str, model: nn.Module) -> bool:
    """Whether a model is of a class of a library, which is there if it is."""
    return module in sys.modules and isinstance(model, getattr(sys.modules[module], name))


def _save(state: Mapping[str, torch.Tensor], path: Path) -> None:
    """Writes the weights, in files of at most SHARD_BYTES where they are more, with an index."""
    from safetensors.torch import save_file

    files: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, value in state.items():
        if files[-1] and size + value.nbytes > SHARD_BYTES:
            files.append({})
            size = 0
        files[-1][name] = value.detach().contiguous()
        size += value.nbytes
    names = [PRETRAINED]
    if len(files) > 1:
        names = [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
        where = {name: file for file, tensors in zip(names, files, strict=True) for name in tensors}
        total = sum(value.nbytes for value in state.values())
        _dump(path / SHARDED, {"metadata": {"total_size": total}, "weight_map": where})
    for file, tensors in zip(names, files, strict=True):
        save_file(tensors, path / file, metadata={"format": "pt"})
        (path / file).chmod((path / "..").stat().st_mode & 0o666)  # it writes for the owner alone


def _dump(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


# -- what transformers makes of it -------------------------------------------------------------------------------------


class Unlike(Exception):
    """What is written is not the model; with what differs."""


@torch.no_grad()
def verify(path: Path, model: nn.Module, parts: "Parts", tolerance: float) -> dict[str, Any]:
    """Loads the folder by transformers, and compares logits, texts and tokens.

    Args:
        path: of the folder.
        model: what it should be.
        parts: of the run.
        tolerance: of logits, by the largest of them.

    Returns:
        What was compared, for people.

    Raises:
        Unlike: they differ.
        ConfigError: transformers does not take such a model.
    """
    from transformers import AutoModelForCausalLM

    try:
        theirs = AutoModelForCausalLM.from_pretrained(path, dtype=parts.precision.dtype).eval()
    except ValueError as error:
        raise ConfigError(
            f"--format: got a model that transformers refuses: {error}; write --format safetensors"
        ) from error
    feed = next(iter(parts.test_feeds.values()), parts.feed)
    batch = feed.of(np.arange(min(SAMPLES, len(feed.split))))
    tree = inputs_and_targets(batch.tree)[0]
    far = largest = 0.0
    for row in range(batch.size):
        inputs = {name: leaf[row : row + 1] for name, leaf in tree.items()}
        expected, got = tensor_of(model(**inputs)), theirs(**inputs, use_cache=False).logits
        if got.shape != expected.shape:
            raise Unlike(f"gives logits {list(got.shape)} where the model gives {list(expected.shape)}")
        far = float(np.maximum(far, float((got - expected).abs().max())))  # numpy's keeps a nan
        largest = max(largest, float(expected.abs().max()))
    if not far <= tolerance * largest:
        raise Unlike(f"gives logits that differ by {far / largest:.1e} of the largest, where {tolerance:g} is allowed")
    context = context_of(model, parts.data)
    length = max(1, min(context // 2, context - WRITTEN))
    for row in tree["input_ids"][:PROMPTS, :length]:
        _same_text(model, theirs, row, min(WRITTEN, context - length), tolerance * largest)
    if parts.data.known().get("tokenizer") is not None:
        _same_tokens(path, parts.data.known()["tokenizer"], tree["input_ids"][:PROMPTS])
    return {"samples": batch.size, "largest_relative_difference": far / largest if largest else far}


def _same_text(model: nn.Module, theirs: Any, prompt: torch.Tensor, count: int, tie: float) -> None:
    """Raises Unlike where the most probable tokens are others, but for those that are as probable."""
    reader = reader_of(model, model, prompt.device, tensor_of)
    mine = [step[0] for step in written(reader, [prompt.tolist()], count, len(prompt) + count, Sampling(0))]
    got = theirs.generate(
        prompt[None], attention_mask=torch.ones_like(prompt[None]), do_sample=False, max_new_tokens=count,
        min_new_tokens=count, eos_token_id=None, pad_token_id=0,
    )[0, len(prompt) :].tolist()  # fmt: skip
    place = next((i for i, (a, b) in enumerate(zip(mine, got, strict=True)) if a != b), None)
    if place is None:
        return
    so_far = torch.tensor([[*prompt.tolist(), *mine[:place]]])
    logits = tensor_of(model(input_ids=so_far))[0, -1]
    if not abs(float(logits[mine[place]] - logits[got[place]])) <= tie:
        raise Unlike(f"writes token {got[place]} where the model writes {mine[place]}, {place} tokens after a prompt")


def _same_tokens(path: Path, tokenizer: Tokenizer, rows: torch.Tensor) -> None:
    """Raises Unlike where a text has other tokens, or tokens another text."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(path)
    for row in rows.tolist():
        text = tokenizer.decode(row)
        numbers = tokenizer.encode(text).tolist()
        got = theirs.encode(text, add_special_tokens=False)
        if got != numbers or theirs.decode(numbers, skip_special_tokens=True) != tokenizer.decode(numbers):
            raise Unlike(f"has other tokens for the text {text[:40]!r}")
