"""Keys and values of the tokens so far, so that a decoder computes each token once as it writes."""

import torch


class KeyValues:
    """Those of one layer, in memory that doubles as it fills."""

    def __init__(self) -> None:
        self.length = 0
        self.memory: tuple[torch.Tensor, ...] = ()  # two of [batch, kv_heads, capacity, head_size]

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds those of the next tokens, [batch, kv_heads, tokens, head_size], and gives all so far."""
        before, self.length = self.length, self.length + keys.shape[2]
        if not self.memory or self.memory[0].shape[2] < self.length:
            sizes = (*keys.shape[:2], 2 * self.length, keys.shape[3])
            wider = keys.new_empty(sizes), values.new_empty(sizes)
            for new, old in zip(wider, self.memory, strict=False):
                new[:, :, :before] = old[:, :, :before]
            self.memory = wider
        for memory, added in zip(self.memory, (keys, values), strict=True):
            memory[:, :, before : self.length] = added
        mine, theirs = self.memory
        return mine[:, :, : self.length], theirs[:, :, : self.length]


class Cache:
    """Those of all layers. One belongs to a batch of rows that are written together: `Decoder.forward` appends to it.

    Args:
        layers: of the decoder.
    """

    def __init__(self, layers: int):
        self.layers = [KeyValues() for _ in range(layers)]

    def __len__(self) -> int:
        return self.layers[0].length
