"""LoRA: adapters of PEFT beside the frozen weights of a model, and a head that is trained whole."""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from dist_train import Columns, Data


def with_adapters(config: BertConfig, rank: int = 2) -> nn.Module:
    adapters = LoraConfig(r=rank, target_modules=["query", "value"], modules_to_save=["classifier"])
    return get_peft_model(BertForSequenceClassification(config), adapters)


def sentences(n: int = 30, n_test: int = 13, words: int = 20, length: int = 6) -> Data:
    """All of one length; the class is which of two words is there more often."""
    ids = torch.randint(1, words, (n + n_test, length), generator=torch.Generator().manual_seed(7))
    ids[:, ::2] = ids[:, ::2] % 2 + 1
    labels = ((ids == 1).sum(1) > (ids == 2).sum(1)).long()
    tree = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    train, test = (Columns({name: value[part] for name, value in tree.items()}) for part in (slice(n), slice(n, None)))
    return Data(train, test, classes=("two", "one"), facts={"vocab_size": words})
