"""Fine-tuning: BERT of transformers, of which the embeddings and the first layer stay as they are."""

import torch

from dist_train import Columns, Data


def sentences(n: int = 30, n_test: int = 13, words: int = 20, length: int = 7) -> Data:
    """Words padded with 0, and their mask; the class is that of the first word."""
    generator = torch.Generator().manual_seed(6)
    ids = torch.randint(1, words, (n + n_test, length), generator=generator)
    mask = (torch.arange(length) < torch.randint(2, length + 1, (n + n_test, 1), generator=generator)).long()
    tree = {"input_ids": ids * mask, "attention_mask": mask, "labels": ids[:, 0] % 3}
    train, test = (Columns({name: value[part] for name, value in tree.items()}) for part in (slice(n), slice(n, None)))
    return Data(train, test, classes=("a", "b", "c"), facts={"vocab_size": words})
