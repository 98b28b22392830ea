"""Folders of transformers with a Llama in them: what their config.json says of a decoder, both ways. Imports no
torch."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_train.config.tree import Config
from dist_train.errors import ConfigError

if TYPE_CHECKING:
    from dist_train.models.decoder import Decoder

CONFIG = "config.json"
DECODER = "decoder"  # the name of the model that is one
# Arguments of the decoder, with what config.json calls them, and what it means where it does not say.
NEEDED = {
    "vocab_size": "vocab_size",
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
}
DEFAULTS: dict[str, tuple[str, Any]] = {
    "kv_heads": ("num_key_value_heads", None),
    "head_size": ("head_dim", None),
    "norm_eps": ("rms_norm_eps", 1e-6),
    "tied": ("tie_word_embeddings", False),
    "block": ("max_position_embeddings", 2048),
}
# What a decoder is not, by other values than these.
FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "quantization_config": None}


def told_of(model: "Decoder", end: int | None) -> dict[str, Any]:
    """What config.json says of a decoder.

    Args:
        model: the decoder.
        end: the number of the token that ends a document.
    """
    first = model.model.layers[0]
    heads, kv_heads, head_size = first.self_attn.sizes
    weight = model.model.embed_tokens.weight
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.block,
        "hidden_size": weight.shape[1],
        "intermediate_size": first.mlp.gate_proj.out_features,
        "num_hidden_layers": len(model.model.layers),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_size,
        "rms_norm_eps": model.model.norm.eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.model.theta},
        "tie_word_embeddings": model.lm_head.weight is None,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": end,
        "pad_token_id": None,
        "dtype": str(weight.dtype).removeprefix("torch."),
    }


def filled(config: Config) -> Config:
    """The config with the sizes of the decoder, where it starts from such a folder. What it gives itself must be the
    same, but for `block`. Raises ConfigError, also for a folder that no decoder is."""
    model = config.model
    if model.name != DECODER or model.init_from is None or not (Path(model.init_from) / CONFIG).is_file():
        return config
    folder = Path(model.init_from)
    there = arguments_of(folder)
    lines = [
        f"model.args.{key}: got {value!r}, but {folder / CONFIG} has {there[key]!r}, expected the same; leave it out"
        for key, value in model.args.items()
        if key in there and key != "block" and value is not None and value != there[key]
    ]
    if lines:
        raise ConfigError(*lines)
    given = {key: value for key, value in model.args.items() if value is not None}
    return dataclasses.replace(config, model=dataclasses.replace(model, args=there | given))


def arguments_of(folder: Path) -> dict[str, Any]:
    """The arguments of the decoder that is in a folder. Raises ConfigError for another model."""
    path = folder / CONFIG
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        kind = told.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"model.init_from: got {path}, which cannot be read: {error}; expected JSON") from None
    if kind != "llama":
        raise ConfigError(
            f"model.init_from: got {folder}, whose model_type is {kind}, expected llama, which decoder is; name the "
            f"model of transformers itself: --model.name transformers:AutoModelForCausalLM.from_pretrained "
            f"--model.args.pretrained_model_name_or_path {folder}"
        )
    rope = _rope(told)
    fixed = {name: told.get(name, value) for name, value in FIXED.items()}
    fixed["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
    lines = [
        f"model.init_from: got {folder}, whose {name} is {value}, expected {expected}, as decoder has it"
        for (name, value), expected in zip(fixed.items(), [*FIXED.values(), "default"], strict=True)
        if value != expected
    ]
    lines += [
        f"model.init_from: got {path} without {name}, expected it" for name in NEEDED.values() if name not in told
    ]
    if lines:
        raise ConfigError(*lines)
    found = {key: told[name] for key, name in NEEDED.items()}
    found |= {key: told.get(name, default) for key, (name, default) in DEFAULTS.items()}
    found["kv_heads"] = found["kv_heads"] or found["heads"]
    found["head_size"] = found["head_size"] or found["width"] // found["heads"]
    return found | {"rope_theta": float(rope.get("rope_theta", 10000.0))}


def _rope(told: Mapping[str, Any]) -> dict[str, Any]:
    """About rotary positions, which older files say in two places."""
    old = {"rope_theta": told["rope_theta"]} if "rope_theta" in told else {}
    return old | (told.get("rope_scaling") or {}) | (told.get("rope_parameters") or {})
