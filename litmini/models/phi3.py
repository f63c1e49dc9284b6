"""Phi-3 and 3.5 (mini, medium), Phi-4 and Phi-4-mini, in one file.

Features: RMSNorm before attention and MLP, q, k and v in one linear, gate and up in one linear, rotary embedding on the
whole head or its first part (Phi-4-mini), grouped-query attention, SwiGLU, no biases, optional sliding window (the 4k
models), head tied to the embedding in Phi-4-mini. LongRoPE in the 128k models: each frequency has its own divisor, one
for texts within the length of pretraining and one for longer texts.

Differs from llama.py in the fused linears, the partial rotary embedding and LongRoPE.

Papers: Phi-3 (arXiv 2404.14219), Phi-4 (2412.08905), Phi-4-mini (2503.01743), LongRoPE (2402.13753).
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from litmini.models.hf_config import (
    Table,
    has_layer_types,
    read_fields,
    read_rope,
    read_value,
    refuse,
    write_fields,
)
from litmini.ops.attention import Mask, advance, attend, document_ids, make_mask
from litmini.ops.cross_entropy import linear_cross_entropy
from litmini.ops.initialize import initialize
from litmini.ops.norms import rms_norm_llama, swiglu


@dataclass(frozen=True)
class LongRope:
    """How rotary frequencies are stretched beyond the length of pretraining: that of pair i of the head is divided by ..."""

    short_factors: tuple[float, ...]  # ... this in texts of up to original_positions tokens
    long_factors: tuple[float, ...]  # ... this in longer ones
    original_positions: int


@dataclass(frozen=True)
class Config:
    vocab_size: int
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    max_positions: int
    rope_theta: float = 10_000.0
    rotary_share: float = 1.0  # the fraction of each head, its first part, that is rotated
    long_rope: LongRope | None = None
    norm_eps: float = 1e-5
    tied: bool = False
    window: int | None = None  # keys that a query sees, itself included

    def __post_init__(self) -> None:
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        if self.rotary_dim % 2:
            raise ValueError(f"{self.rotary_dim} of head_dim {self.head_dim} is odd: rotary rotates pairs")
        if s := self.long_rope:
            for factors in (s.short_factors, s.long_factors):
                if len(factors) != self.rotary_dim // 2:
                    raise ValueError(f"{len(factors)} LongRoPE factors for {self.rotary_dim // 2} pairs of a head")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window {self.window} is below 1")

    @property
    def rotary_dim(self) -> int:
        """How many of the head_dim values are rotated."""
        return int(self.head_dim * self.rotary_share)


# fmt: off
_PHI4_MINI = LongRope((1.0,) * 48, (
    1.0, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897, 1.956131817, 2.187582649, 2.446418898,
    2.735880826, 3.059592084, 3.421605075, 3.826451687, 4.279200023, 4.785517845, 5.351743533, 5.984965424, 6.693110555,
    7.485043894, 8.370679318, 9.36110372, 10.4687158, 11.70738129, 13.09260651, 14.64173252, 16.37415215, 18.31155283,
    20.47818807, 22.90118105, 25.61086418, 28.64115884, 32.03, 32.1, 32.13, 32.23, 32.6, 32.61, 32.64, 32.66, 32.7,
    32.71, 32.93, 32.97, 33.28, 33.49, 33.5, 44.16, 47.77), 4096)
# fmt: on
PRESETS = {  # columns: vocab_size, dim, n_layers, n_heads, n_kv_heads, head_dim, ffn_dim, max_positions, rope_theta
    "tiny": Config(512, 64, 2, 4, 2, 16, 128, 256),  # for tests
    "microsoft/Phi-3-mini-4k-instruct": Config(32064, 3072, 32, 32, 32, 96, 8192, 4096, window=2047),
    "microsoft/Phi-3-medium-4k-instruct": Config(32064, 5120, 40, 40, 10, 128, 17920, 4096, window=2047),  # GQA
    "microsoft/phi-4": Config(100352, 5120, 40, 40, 10, 128, 17920, 16384, 250_000.0),  # larger vocabulary, no window
    "microsoft/Phi-4-mini-instruct": Config(  # Phi-3-mini with GQA, partial rotary, LongRoPE, a large vocabulary
        200064, 3072, 32, 24, 8, 128, 8192, 131072, 10_000.0, 0.75, _PHI4_MINI, tied=True, window=262144
    ),
}

HF: Table = {  # field of Config: key of config.json, or (key, value if it is missing)
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": ("num_key_value_heads", None),  # none: n_heads
    "head_dim": ("head_dim", None),  # none: dim // n_heads
    "ffn_dim": "intermediate_size",
    "max_positions": ("max_position_embeddings", 4096),
    "norm_eps": ("rms_norm_eps", 1e-5),
    "tied": ("tie_word_embeddings", False),
    "window": ("sliding_window", None),
}
IMPLEMENTED = {  # key: the values that this file implements; False stands for 0 and null, too
    "hidden_act": "silu",
    "rope_type": ("default", "longrope"),
    "attention_bias": False,
    "mlp_bias": False,
    "lm_head_bias": False,
    "attention_dropout": False,
    "embd_pdrop": False,
    "resid_pdrop": False,
}


def config_from_hf(hf: dict[str, Any]) -> Config:
    """Return the `Config` of a config.json; ValueError: it asks for something that this file does not implement."""
    rope = read_rope(hf)
    if rope["rope_type"] in ("su", "yarn"):
        rope["rope_type"] = "longrope"  # what it was called at first
    fields, original = (
        read_fields(HF, hf),
        read_value(hf, "original_max_position_embeddings", int, None, zero=False) or 4096,
    )
    kind = "full_attention" if fields["window"] is None else "sliding_attention"
    checks = {
        "layer_types": has_layer_types(hf, kind),
        "attention_factor": rope.get("attention_factor") is None,
        "factor": rope.get("factor") in (None, fields["max_positions"] / original),
        "original_max_position_embeddings": rope.get("original_max_position_embeddings") in (None, original),
    }
    refuse("phi3.py", hf, rope, IMPLEMENTED, **checks)
    long_rope, share = None, rope["partial_rotary_factor"]
    if rope["rope_type"] == "longrope":
        lists = {key: read_value(rope, key, list) for key in ("short_factor", "long_factor")}
        short, long = (
            tuple(read_value({key: f}, key, float, zero=False) for f in values) for key, values in lists.items()
        )
        long_rope = LongRope(short, long, original)
    return Config(**fields, rope_theta=rope["rope_theta"], rotary_share=share, long_rope=long_rope)


def config_to_hf(config: Config) -> dict[str, Any]:
    """Return the config.json of a model, for transformers 4 and 5."""
    rope = {"rope_theta": config.rope_theta, "partial_rotary_factor": config.rotary_share}
    original, scaling, parameters = config.max_positions, None, {**rope, "rope_type": "default"}
    if s := config.long_rope:
        original = s.original_positions
        # transformers 4 wants these three keys and no other
        scaling = {"type": "longrope", "short_factor": list(s.short_factors), "long_factor": list(s.long_factors)}
        parameters |= {**scaling, "rope_type": "longrope", "original_max_position_embeddings": original}
    return {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        **write_fields(HF, config),
        "original_max_position_embeddings": original,
        "hidden_act": "silu",
        **rope,
        "rope_scaling": scaling,
        "rope_parameters": parameters,
        "attention_bias": False,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),  # transformers' defaults would be any tokens
    }


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm_llama(x, self.weight, self.eps)


def text_lengths(positions: Tensor, documents: Tensor | None, cache: Any) -> Tensor:
    """Return the length of the text that each token is in, (B, T) or (B, 1), which decides between LongRoPE's factors.

    With a cache it is the capacity of each sequence: keys, once rotated, stay in use until the text is complete.
    """
    if cache is not None:
        return cache.capacities
    if documents is None:
        return positions.amax(1, keepdim=True) + 1
    ids = document_ids(documents)
    starts = torch.ones_like(ids, dtype=torch.bool)
    starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
    index = starts.flatten().cumsum(0) - 1  # (B * T,) of the document in the batch
    last = torch.full_like(index, -1).scatter_reduce(0, index, positions.flatten(), "amax")  # one entry per document
    return last[index].view_as(positions) + 1


def _filled(factors: tuple[float, ...], device: torch.device) -> Tensor:
    """Return factors (n,) in fp32, filled in on the device: for a copy of the host's, a GPU would be waited for."""
    return torch.stack([torch.full((), factor, dtype=torch.float32, device=device) for factor in factors])


def rotary(positions: Tensor, lengths: Tensor, config: Config, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cos and sin, (B, 1, T, rotary_dim) each, computed in fp32 from integer positions (B, T).

    Args:
        lengths: what `text_lengths` gives, (B, T) or (B, 1).
    """
    exponents = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32, device=positions.device) / config.rotary_dim
    wavelengths = config.rope_theta**exponents  # (rotary_dim / 2,), in positions per radian
    attention_factor = 1.0  # on cos and sin, so attention scores are larger by its square
    if s := config.long_rope:
        short, long = (wavelengths * _filled(f, positions.device) for f in (s.short_factors, s.long_factors))
        is_long = (lengths > s.original_positions)[:, None, :, None]  # (B, 1, T or 1, 1)
        wavelengths = torch.where(is_long, long, short)  # (B, 1, T or 1, rotary_dim / 2)
        stretch = max(config.max_positions / s.original_positions, 1.0)
        attention_factor = math.sqrt(1 + math.log(stretch) / math.log(s.original_positions))
    # (B, 1, T, rotary_dim / 2); fp32 under autocast, too
    angles = positions[:, None, :, None].float() * (1.0 / wavelengths)
    angles = torch.cat((angles, angles), dim=-1)  # (B, 1, T, rotary_dim)
    return (angles.cos() * attention_factor).to(dtype), (angles.sin() * attention_factor).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + rotary_dim / 2]) by its angle, leave the rest; x is (B, heads, T, head_dim)."""
    x, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x * cos + torch.cat((-x2, x1), dim=-1) * sin, rest), dim=-1)


class Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.sizes = [q_dim, kv_dim, kv_dim]
        self.qkv_proj = nn.Linear(config.dim, sum(self.sizes), bias=False)
        self.o_proj = nn.Linear(q_dim, config.dim, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Mask, cache: Any) -> Tensor:
        B, T, _ = x.shape
        # (B, n_heads, T, head_dim), and twice (B, n_kv_heads, T, head_dim)
        q, k, v = (
            part.view(B, T, -1, self.head_dim).transpose(1, 2) for part in self.qkv_proj(x).split(self.sizes, dim=-1)
        )
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.update(k, v, mask)  # (B, n_kv_heads, S, head_dim)
        y = attend(q, k, v, mask)  # (B, n_heads, T, head_dim)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.dim, 2 * config.ffn_dim, bias=False)
        self.down_proj = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)  # (B, T, ffn_dim) each
        return self.down_proj(swiglu(gate, up))


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Mask, cache: Any = None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Model(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.model = nn.ModuleDict(
            {
                "embed_tokens": embed_tokens,
                "layers": nn.ModuleList(Block(config) for _ in range(config.n_layers)),
                "norm": RMSNorm(config.dim, config.norm_eps),
            }
        )
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = embed_tokens.weight

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Embeddings and linears: normal, std 0.02; norms: 1."""
        initialize(self, {"norm": 1.0}, generator)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        cache: Any = None,
        labels: Tensor | None = None,
    ) -> Any:
        """Return logits (B, T, vocab_size); with labels the summed loss (fp32) and the number of targets."""
        positions = advance(tokens, positions, cache)
        mask = make_mask(positions, documents, cache, self.config.window)
        x = self.model["embed_tokens"](tokens)  # (B, T, dim)
        rope = rotary(positions, text_lengths(positions, documents, cache), self.config, x.dtype)
        for i, block in enumerate(self.model["layers"].children()):
            x = block(x, rope, mask, None if cache is None else cache[i])
        x = self.model["norm"](x)
        if labels is not None:
            return linear_cross_entropy(x, self.lm_head, labels)
        return self.lm_head(x)  # (B, T, vocab_size)
