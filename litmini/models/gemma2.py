"""Gemma 2, in one file.

Features: RMSNorm (1 + weight) before and after both attention and MLP, rotary embedding on the whole head (half-split
layout), grouped-query attention whose scores are scaled by a number of their own and capped softly, every other layer
with a sliding window, GeGLU, embedding scaled by sqrt(dim), logits capped softly, head tied to the embedding. Module
names and shapes are Hugging Face's, so checkpoints load as they are.

Differs from gemma.py in the second norm of each half block, on what is added to the residual stream; in the softcaps,
cap * tanh(x / cap), on scores and logits; in the windows of layers 0, 2, 4, ...; in the scale, query_scalar ** -0.5.

Paper: Gemma 2 (arXiv 2408.00118).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from litmini.models.hf_config import Table, layer_types, read_fields, read_rope, read_value, refuse, write_fields
from litmini.ops.attention import Mask, advance, attend, make_mask
from litmini.ops.cross_entropy import linear_cross_entropy
from litmini.ops.initialize import initialize
from litmini.ops.norms import geglu, rms_norm


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
    window: int = 4096  # keys that a query sees in layers 0, 2, 4, ..., itself included
    query_scalar: int = 256  # scores are divided by its square root
    attn_softcap: float = 50.0
    logit_softcap: float = 30.0
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    tied: bool = True

    def __post_init__(self) -> None:
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: rotary embedding rotates pairs")
        if self.window < 1:
            raise ValueError(f"window {self.window} is below 1")
        if min(self.attn_softcap, self.logit_softcap) <= 0:
            raise ValueError(f"attn_softcap {self.attn_softcap} or logit_softcap {self.logit_softcap} is not above 0")


PRESETS = {  # columns: vocab_size, dim, n_layers, n_heads, n_kv_heads, head_dim, ffn_dim, max_positions
    "tiny": Config(512, 64, 2, 4, 2, 16, 128, 256, window=16, query_scalar=16),  # for tests
    "google/gemma-2-2b": Config(256_000, 2304, 26, 8, 4, 256, 9216, 8192),
    "google/gemma-2-9b": Config(256_000, 3584, 42, 16, 8, 256, 14336, 8192),
    "google/gemma-2-27b": Config(256_000, 4608, 46, 32, 16, 128, 36864, 8192, query_scalar=144),  # 4608 / 32 heads
}

HF: Table = {  # field of Config: (key of config.json, value if it is missing)
    "vocab_size": ("vocab_size", 256_000),
    "dim": ("hidden_size", 2304),
    "n_layers": ("num_hidden_layers", 26),
    "n_heads": ("num_attention_heads", 8),
    "n_kv_heads": ("num_key_value_heads", 4),
    "head_dim": ("head_dim", 256),
    "ffn_dim": ("intermediate_size", 9216),
    "max_positions": ("max_position_embeddings", 8192),
    "window": ("sliding_window", 4096),
    "query_scalar": ("query_pre_attn_scalar", 256),
    "attn_softcap": ("attn_logit_softcapping", 50.0),
    "logit_softcap": ("final_logit_softcapping", 30.0),
    "norm_eps": ("rms_norm_eps", 1e-6),
    "tied": ("tie_word_embeddings", True),
}
IMPLEMENTED = {  # key: the values that this file implements; False stands for 0 and null, too, True for what is neither
    "hidden_activation": "gelu_pytorch_tanh",
    "rope_type": "default",
    "partial_rotary_factor": 1.0,
    "attention_bias": False,
    "attention_dropout": False,
    "use_bidirectional_attention": False,
    "attn_logit_softcapping": True,
    "final_logit_softcapping": True,
    "sliding_window": True,
}


def config_from_hf(hf: dict[str, Any]) -> Config:
    """Return the `Config` of a config.json; ValueError: it asks for something that this file does not implement."""
    rope = read_rope(hf)
    types = layer_types(read_value(hf, "num_hidden_layers", int, 26), full_every=2)
    refuse("gemma2.py", hf, rope, IMPLEMENTED, layer_types=hf.get("layer_types") in (None, types))
    return Config(**read_fields(HF, hf), rope_theta=rope["rope_theta"])


def config_to_hf(config: Config) -> dict[str, Any]:
    """Return the config.json of a model, for transformers 4 and 5."""
    return {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        **write_fields(HF, config),
        "hidden_activation": "gelu_pytorch_tanh",
        "layer_types": layer_types(config.n_layers, full_every=2),
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": False,
    }


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, 1.0 + self.weight.float(), self.eps)


def rotary(positions: Tensor, config: Config, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cos and sin, (B, 1, T, head_dim) each, computed in fp32 from integer positions (B, T)."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=positions.device) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents  # (head_dim / 2,)
    angles = positions[:, None, :, None].float() * frequencies  # (B, 1, T, head_dim / 2); fp32 under autocast, too
    angles = torch.cat((angles, angles), dim=-1)  # (B, 1, T, head_dim)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + head_dim / 2]) by its angle; x is (B, heads, T, head_dim)."""
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-x2, x1), dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.scale = config.query_scalar**-0.5
        self.softcap = config.attn_softcap
        q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.dim, q_dim, bias=False)
        self.k_proj = nn.Linear(config.dim, kv_dim, bias=False)
        self.v_proj = nn.Linear(config.dim, kv_dim, bias=False)
        self.o_proj = nn.Linear(q_dim, config.dim, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Mask, cache: Any) -> Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, n_heads, T, head_dim)
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, n_kv_heads, T, head_dim)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, n_kv_heads, T, head_dim)
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.update(k, v, mask)  # (B, n_kv_heads, S, head_dim)
        y = attend(q, k, v, mask, self.scale, self.softcap)  # (B, n_heads, T, head_dim)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.up_proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.down_proj = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(geglu(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.pre_feedforward_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = MLP(config)
        self.post_feedforward_layernorm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Mask, cache: Any = None) -> Tensor:
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), rope, mask, cache))
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


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
        """Embeddings and linears: normal, std 0.02; norms: 0, since they multiply by 1 + weight."""
        initialize(self, {"norm": 0.0}, generator)

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
        local = make_mask(positions, documents, cache, self.config.window, changes_scores=True)
        full = make_mask(positions, documents, cache, None, changes_scores=True)
        x = self.model["embed_tokens"](tokens)  # (B, T, dim)
        x = x * torch.tensor(self.config.dim**0.5, dtype=x.dtype)  # in bf16, sqrt(3584) = 59.867 becomes 59.75
        rope = rotary(positions, self.config, x.dtype)
        for i, block in enumerate(self.model["layers"].children()):
            x = block(x, rope, full if i % 2 else local, None if cache is None else cache[i])
        x = self.model["norm"](x)
        if labels is not None:
            return linear_cross_entropy(x, self.lm_head, labels, self.config.logit_softcap)
        return self.config.logit_softcap * torch.tanh(self.lm_head(x) / self.config.logit_softcap)  # (B, T, vocab_size)
