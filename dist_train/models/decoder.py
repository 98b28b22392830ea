"""A decoder of text: a transformer with the parts, and the names of parameters, of Llama.

Sources: H. Touvron and others, "LLaMA", 2023; RMSNorm: B. Zhang, R. Sennrich, 2019; rotary positions: J. Su and others,
2021; SwiGLU: N. Shazeer, 2020; grouped-query attention: J. Ainslie and others, 2023; initial weights: A. Radford and
others, "GPT-2", 2019. Names and arithmetic are those of `LlamaForCausalLM` in transformers.
"""

import torch
import torch.nn.functional as F
from torch import nn

from dist_train.errors import ConfigError
from dist_train.models.cache import Cache, KeyValues
from dist_train.models.chunked_loss import chunked_loss

Angles = tuple[torch.Tensor, torch.Tensor]  # cosines and sines, [tokens or batch, tokens, 1, head_size]


class Decoder(nn.Module):
    """Logits of the next token, or the loss of given ones.

    Args:
        vocab_size: token numbers are below it.
        block: tokens of a sample.
        layers: of attention and MLP.
        width: numbers of a token between layers.
        heads: of attention.
        kv_heads: of keys and values, each for several heads; None is one for each head.
        head_size: numbers of a head; None is width // heads.
        mlp_width: numbers of a token within the MLP; None is 8/3 of width, rounded up to a multiple of 64.
        rope_theta: base of the wavelengths of rotary positions.
        norm_eps: added to the mean square in norms.
        tied: the embedding is the output's matrix as well.
        dropout: of embeddings, attention weights and what a layer adds.
    """

    def __init__(
        self, vocab_size: int, block: int, layers: int = 4, width: int = 128, heads: int = 4,
        kv_heads: int | None = None, head_size: int | None = None, mlp_width: int | None = None,
        rope_theta: float = 10000.0, norm_eps: float = 1e-5, tied: bool = True, dropout: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        head_size = width // heads if head_size is None else head_size
        mlp_width = -(-width * 8 // 3 // 64) * 64 if mlp_width is None else mlp_width
        if heads % kv_heads:
            raise ConfigError(f"model.args.kv_heads: got {kv_heads}, expected a divisor of heads, which is {heads}")
        if head_size % 2:
            raise ConfigError(
                f"model.args.head_size: got {head_size}, expected an even number, as rotary positions turn pairs; "
                f"for example --model.args.head_size {head_size + 1}"
            )
        self.vocab_size, self.block = vocab_size, block
        make = lambda: Layer(width, (heads, kv_heads, head_size), mlp_width, norm_eps, dropout)  # noqa: E731
        self.model = Trunk(vocab_size, width, [make() for _ in range(layers)], rope_theta, norm_eps, dropout)
        self.lm_head = Head(vocab_size, width, tied)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * layers) ** 0.5 if into_residual else 0.02)

    @property
    def split(self) -> dict[str, str]:
        """How tensor ranks split the layers; see docs/tensor.md."""
        size = self.model.layers[0].self_attn.sizes[2]
        return {
            "*embed_tokens": "rows",
            "*norm": "sequence",
            "*.self_attn": "gather",
            "*.[qkv]_proj": f"columns by {size}",
            "*.o_proj": f"rows by {size}",
            "*.mlp": "gather",
            "*.gate_proj": "columns",
            "*.up_proj": "columns",
            "*.down_proj": "rows",
            "*lm_head": "columns gathered",
        }

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None, targets: torch.Tensor | None = None,
        cache: Cache | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Logits [batch, tokens, vocab_size], or with `targets` the loss of each, [batch, tokens], 0 where ignored.

        Args:
            input_ids: token numbers, int64 [batch, tokens].
            position_ids: place of each token in its document, int64 [batch, tokens]: one begins wherever it is 0, and
                attends to none before it. None is one document, which goes on from the cache.
            targets: the token after each, int64 [batch, tokens]; -100 where none counts.
            cache: of the tokens before; gets those of these.
        """
        return self.lm_head(self.model(input_ids, position_ids, cache), targets, self.model.embed_tokens)


class Trunk(nn.Module):
    """All but the output."""

    def __init__(
        self, vocab_size: int, width: int, layers: list["Layer"], theta: float, norm_eps: float, dropout: float
    ):  # fmt: skip
        super().__init__()
        self.theta = theta
        self.embed_tokens, self.dropout = nn.Embedding(vocab_size, width), nn.Dropout(dropout)
        self.layers = nn.ModuleList(layers)
        self.norm = nn.RMSNorm(width, norm_eps)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None, cache: Cache | None) -> torch.Tensor:
        """[batch, tokens, width]; see Decoder."""
        x = self.dropout(self.embed_tokens(input_ids))
        first = 0 if cache is None else len(cache)
        mask = _mask(input_ids, position_ids, first)
        count = input_ids.shape[1]
        positions = torch.arange(first, first + count, device=x.device) if position_ids is None else position_ids
        angles = _angles(positions, self.layers[0].self_attn.sizes[2], self.theta, x.dtype)
        for i, layer in enumerate(self.layers):
            x = layer(x, angles, mask, None if cache is None else cache.layers[i])
        return self.norm(x)


class Layer(nn.Module):
    """Adds what attention finds in the tokens before, and what the MLP makes of each token."""

    def __init__(self, width: int, sizes: tuple[int, int, int], mlp_width: int, norm_eps: float, dropout: float):
        super().__init__()
        self.self_attn, self.mlp = Attention(width, sizes, dropout), MLP(width, mlp_width)
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(width, norm_eps), nn.RMSNorm(width, norm_eps)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: torch.Tensor, angles: Angles, mask: torch.Tensor | None, cache: KeyValues | None
    ) -> torch.Tensor:  # fmt: skip
        """[batch, tokens, width] of the same."""
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), angles, mask, cache))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class Attention(nn.Module):
    """Each token looks at those before it. `sizes` are heads, kv_heads and head_size; see Decoder."""

    def __init__(self, width: int, sizes: tuple[int, int, int], dropout: float):
        super().__init__()
        self.sizes, self.dropout = sizes, dropout
        heads, kv_heads, size = sizes
        self.q_proj = nn.Linear(width, heads * size, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(width, kv_heads * size, bias=False) for _ in range(2))
        self.o_proj = nn.Linear(heads * size, width, bias=False)

    def forward(
        self, x: torch.Tensor, angles: Angles, mask: torch.Tensor | None, cache: KeyValues | None
    ) -> torch.Tensor:  # fmt: skip
        """[batch, tokens, width] of the same."""
        q, k, v = (of(x).unflatten(-1, (-1, self.sizes[2])) for of in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (part.transpose(1, 2) for part in (_turned(q, angles).to(v.dtype), _turned(k, angles).to(v.dtype), v))
        if cache is not None:
            k, v = cache.append(k, v)
        causal = mask is None and q.shape[2] > 1  # one token may look at all
        dropout = self.dropout if self.training else 0.0
        of_groups = {"enable_gqa": True} if k.shape[1] < q.shape[1] else {}
        found = F.scaled_dot_product_attention(
            q, k, v, mask, dropout, causal, **of_groups
        )  # [batch, heads, tokens, size]
        return self.o_proj(found.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, width] of the same."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Head(nn.Linear):
    """The output. Where it is tied it has no weight itself, so that the state of a model holds each weight once."""

    def __init__(self, vocab_size: int, width: int, tied: bool):
        super().__init__(width, vocab_size, bias=False)
        if tied:
            self.register_parameter("weight", None)

    def forward(self, x: torch.Tensor, targets: torch.Tensor | None, embedding: nn.Embedding) -> torch.Tensor:
        """Logits, or losses; see Decoder."""
        weight = embedding.weight if self.weight is None else self.weight
        return F.linear(x, weight) if targets is None else chunked_loss(x, weight, targets)


def _mask(input_ids: torch.Tensor, position_ids: torch.Tensor | None, first: int) -> torch.Tensor | None:
    """Which tokens (last dimension) each may look at, bool [batch or 1, 1, tokens, all tokens]; None for all before."""
    count = input_ids.shape[1]
    if position_ids is None and (first == 0 or count == 1):
        return None
    before = torch.ones(count, first + count, dtype=torch.bool, device=input_ids.device).tril(first)
    if position_ids is None:
        return before[None, None]
    document = (position_ids == 0).cumsum(1)  # its number
    return (before & (document[:, :, None] == document[:, None, :]))[:, None]


def _angles(positions: torch.Tensor, size: int, theta: float, dtype: torch.dtype) -> Angles:
    """Cosines and signed sines of each position, in float32 whatever the model is in, as in Llama."""
    wavelengths = theta ** (torch.arange(0, size, 2, dtype=torch.float32, device=positions.device) / size)
    angles = positions[..., None, None].float() * (1.0 / wavelengths)  # [..., tokens, 1, size / 2]
    sines = angles.sin()
    return torch.cat([angles.cos()] * 2, -1).to(dtype), torch.cat([-sines, sines], -1).to(dtype)


def _turned(x: torch.Tensor, angles: Angles) -> torch.Tensor:
    """Heads [batch, tokens, heads, size], turned by their positions: number i with number i + size / 2."""
    cosines, sines = angles
    return torch.addcmul(x * cosines, x.roll(x.shape[-1] // 2, -1), sines)
