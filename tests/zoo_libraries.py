"""Tiny models of torchvision, transformers and PEFT, as a user's config names them, with data for each."""

import torch
from peft import LoraConfig, get_peft_model
from torchvision.models import resnet18
from transformers import BertConfig, BertForSequenceClassification

from dist_train.config.tree import DataConfig, ModelConfig
from dist_train.data.sets import Columns, Data

CLASSES, WORDS, LENGTH = 3, 40, 8
PICTURES = {"shape": (3, 16, 16), "classes": CLASSES}
TORCHVISION = "torchvision.models"
TRANSFORMERS = "transformers:BertForSequenceClassification"
VIT = {"image_size": 16, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 24}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
BERT = {"config": {**SMALL, **NO_DROPOUT, "num_labels": CLASSES}}
PADDED = {"config": {**SMALL, "num_key_value_heads": 1, "pad_token_id": 0, "num_labels": CLASSES}}


def sentences(n: int, n_test: int) -> Data:
    """Words [LENGTH] padded with 0, and their mask; the class is that of their sum."""
    generator = torch.Generator().manual_seed(5)
    words = torch.randint(1, WORDS, (n + n_test, LENGTH), generator=generator)
    lengths = torch.randint(3, LENGTH + 1, (n + n_test, 1), generator=generator)
    mask = (torch.arange(LENGTH) < lengths).long()
    tree = {"input_ids": words * mask, "attention_mask": mask, "labels": (words * mask).sum(1) % CLASSES}
    train, test = ({name: value[part] for name, value in tree.items()} for part in (slice(n), slice(n, None)))
    return Data(Columns(train), Columns(test), classes=("a", "b", "c"), facts={"vocab_size": WORDS})


def lora(config: BertConfig) -> torch.nn.Module:
    """Adapters beside frozen weights, and a head that is trained whole."""
    adapters = LoraConfig(r=2, target_modules=["query", "value"], modules_to_save=["classifier"])
    return get_peft_model(BertForSequenceClassification(config), adapters)


def recomputed(config: BertConfig) -> torch.nn.Module:
    """Activation checkpointing by transformers' own switch."""
    model = BertForSequenceClassification(config)
    model.activation_checkpointing_enable()
    return model


def smooth_resnet18(classes: int) -> torch.nn.Module:
    """ResNet-18 without kinks, at which rounding would decide a gradient."""
    model = resnet18(num_classes=classes)
    for module in model.modules():
        if hasattr(module, "relu"):
            module.relu = torch.nn.Tanh()
    model.maxpool = torch.nn.AvgPool2d(2)
    return model


# By the name of a kind: the model, and whether its samples are sentences.
LIBRARIES = {
    "ResNet18": (
        ModelConfig(f"{TORCHVISION}:resnet18", args={"num_classes": CLASSES}, frozen=["*bn*", "*.1.*"]),
        False,
    ),
    "ResNet18Norms": (ModelConfig(f"{TORCHVISION}:resnet18", args={"num_classes": CLASSES}), False),
    "SmoothResNet18": (ModelConfig("zoo_libraries:smooth_resnet18", args={"classes": CLASSES}), False),
    "BatchNormGroups": (ModelConfig("zoo:BatchNorm2d", batch_statistics={"group": 4}), False),
    "VisionTransformer": (
        ModelConfig(f"{TORCHVISION}.vision_transformer:VisionTransformer", args={**VIT, "num_classes": CLASSES}),
        False,
    ),
    "Bert": (ModelConfig(TRANSFORMERS, args=BERT), True),
    "BertFrozen": (ModelConfig(TRANSFORMERS, args=BERT, frozen=["bert.*", "!bert.encoder.layer.1.*"]), True),
    "BertRecomputed": (ModelConfig("zoo_libraries:recomputed", args=BERT), True),
    "BertLora": (ModelConfig("zoo_libraries:lora", args=BERT), True),
    "Llama": (
        ModelConfig("transformers:LlamaForSequenceClassification", args=PADDED, blocks=["LlamaDecoderLayer"]),
        True,
    ),
}


def data_of(sentences: bool, n: int, n_test: int) -> DataConfig:
    """Of pictures or of sentences."""
    args = {"n": n, "n_test": n_test}
    return (
        DataConfig("zoo_libraries:sentences", args=args) if sentences else DataConfig("synthetic", args=args | PICTURES)
    )
