"""Language models that users bring: of transformers, with adapters of PEFT, and both."""

from torch import nn


def gpt2(vocab_size: int, block: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_positions": block, "n_embd": 32, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, bos_token_id=0, eos_token_id=0, **sizes))


def lora(vocab_size: int, block: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    from dist_train.models.decoder import Decoder

    adapters = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    return get_peft_model(Decoder(vocab_size, block, layers=2, width=32), adapters)
