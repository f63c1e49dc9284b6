"""Llama 1 to 3.3, TinyLlama, SmolLM2 and Mistral, in one file.

Features: RMSNorm before attention and MLP, rotary embedding on the whole head (half-split layout, optional llama3 or
linear scaling), grouped-query attention, SwiGLU, optional biases, optional sliding window (Mistral 7B v0.1), head tied
to the embedding or not. Module names and shapes are Hugging Face's, so checkpoints load as they are.

Papers: LLaMA (arXiv 2302.13971), Llama 2 (2307.09288), Llama 3 (2407.21783), Mistral 7B (2310.06825).
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
    write_rope,
)
from litmini.ops.attention import Mask, advance, attend, make_mask
from litmini.ops.cross_entropy import linear_cross_entropy
from litmini.ops.initialize import initialize
from litmini.ops.norms import rms_norm_llama, swiglu


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the length of pretraining."""

    kind: str  # "linear" or "llama3"
    factor: float
    low_freq_factor: float = 1.0  # these three are llama3's
    high_freq_factor: float = 4.0
    original_positions: int = 8192


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
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tied: bool = False
    attn_bias: bool = False  # on q, k, v and o
    mlp_bias: bool = False  # on gate, up and down
    window: int | None = None  # keys that a query sees, itself included
    model_type: str = "llama"

    def __post_init__(self) -> None:
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: rotary embedding rotates pairs")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window {self.window} is below 1")


_LLAMA31 = RopeScaling("llama3", factor=8.0)
_LLAMA32 = RopeScaling("llama3", factor=32.0)
PRESETS = {  # columns: vocab_size, dim, n_layers, n_heads, n_kv_heads, head_dim, ffn_dim, max_positions, rope_theta, scaling
    "tiny": Config(512, 64, 2, 4, 2, 16, 128, 256),  # for tests
    "HuggingFaceTB/SmolLM2-135M": Config(49152, 576, 30, 9, 3, 64, 1536, 8192, 100_000.0, tied=True),
    "HuggingFaceTB/SmolLM2-360M": Config(49152, 960, 32, 15, 5, 64, 2560, 8192, 100_000.0, tied=True),  # wider
    "HuggingFaceTB/SmolLM2-1.7B": Config(49152, 2048, 24, 32, 32, 64, 8192, 8192, 130_000.0, tied=True),  # no GQA
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": Config(32000, 2048, 22, 32, 4, 64, 5632, 2048),
    "meta-llama/Llama-2-7b-hf": Config(32000, 4096, 32, 32, 32, 128, 11008, 4096),
    "meta-llama/Llama-2-13b-hf": Config(32000, 5120, 40, 40, 40, 128, 13824, 4096),
    "meta-llama/Llama-2-70b-hf": Config(32000, 8192, 80, 64, 8, 128, 28672, 4096),  # GQA
    "meta-llama/Meta-Llama-3-8B": Config(128256, 4096, 32, 32, 8, 128, 14336, 8192, 500_000.0),
    "meta-llama/Llama-3.1-8B": Config(128256, 4096, 32, 32, 8, 128, 14336, 131072, 500_000.0, _LLAMA31),  # + scaling
    "meta-llama/Llama-3.1-70B": Config(128256, 8192, 80, 64, 8, 128, 28672, 131072, 500_000.0, _LLAMA31),
    "meta-llama/Llama-3.2-1B": Config(128256, 2048, 16, 32, 8, 64, 8192, 131072, 500_000.0, _LLAMA32, tied=True),
    "meta-llama/Llama-3.2-3B": Config(128256, 3072, 28, 24, 8, 128, 8192, 131072, 500_000.0, _LLAMA32, tied=True),
    "meta-llama/Llama-3.3-70B-Instruct": Config(128256, 8192, 80, 64, 8, 128, 28672, 131072, 500_000.0, _LLAMA31),
    "mistralai/Mistral-7B-v0.1": Config(32000, 4096, 32, 32, 8, 128, 14336, 32768, window=4096, model_type="mistral"),
    "mistralai/Mistral-7B-v0.3": Config(32768, 4096, 32, 32, 8, 128, 14336, 32768, 1e6, model_type="mistral"),
}

HF: Table = {  # field of Config: key of config.json, or (key, value if it is missing)
    "model_type": "model_type",
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": ("num_key_value_heads", None),  # none: n_heads
    "head_dim": ("head_dim", None),  # none: dim // n_heads
    "ffn_dim": "intermediate_size",
    "max_positions": ("max_position_embeddings", 2048),
    "norm_eps": ("rms_norm_eps", 1e-6),
    "tied": ("tie_word_embeddings", False),
}
BIASES: Table = {"attn_bias": ("attention_bias", False), "mlp_bias": ("mlp_bias", False)}  # Mistral has none
IMPLEMENTED = {  # key: the values that this file implements; False stands for 0 and null, too
    "hidden_act": "silu",
    "rope_type": ("default", "linear", "llama3"),
    "partial_rotary_factor": 1.0,
    "pretraining_tp": (None, 0, 1),
    "attention_dropout": False,
}


def config_from_hf(hf: dict[str, Any]) -> Config:
    """Return the `Config` of a config.json; ValueError: it asks for something that this file does not implement."""
    rope, mistral = read_rope(hf), hf["model_type"] == "mistral"
    window = read_value(hf, "sliding_window", int, 4096 if mistral else None)
    kind = "full_attention" if window is None else "sliding_attention"
    checks = {"sliding_window": mistral or window is None, "layer_types": has_layer_types(hf, kind)}
    refuse("llama.py", hf, rope, IMPLEMENTED, **checks)
    scaling = None
    if rope["rope_type"] == "llama3":
        keys = ("factor", "low_freq_factor", "high_freq_factor")
        factor, low, high = (read_value(rope, key, float, zero=False) for key in keys)
        original = read_value(rope, "original_max_position_embeddings", int, zero=False)
        scaling = RopeScaling("llama3", factor, low, high, original)
    elif rope["rope_type"] == "linear":
        scaling = RopeScaling("linear", read_value(rope, "factor", float, zero=False))
    return Config(**read_fields(HF | BIASES, hf), rope_theta=rope["rope_theta"], rope_scaling=scaling, window=window)


def config_to_hf(config: Config) -> dict[str, Any]:
    """Return the config.json of a model, for transformers 4 and 5."""
    mistral, scaling = config.model_type == "mistral", None
    if s := config.rope_scaling:
        scaling = {"rope_type": s.kind, "factor": s.factor}
        if s.kind == "llama3":
            scaling |= {"low_freq_factor": s.low_freq_factor, "high_freq_factor": s.high_freq_factor}
            scaling |= {"original_max_position_embeddings": s.original_positions}
    return {
        "architectures": ["MistralForCausalLM" if mistral else "LlamaForCausalLM"],
        **write_fields(HF, config),
        **write_rope(config.rope_theta, scaling),
        "hidden_act": "silu",
        **({"sliding_window": config.window} if mistral else write_fields(BIASES, config)),
    }


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm_llama(x, self.weight, self.eps)


def rotary(positions: Tensor, config: Config, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cos and sin, (B, 1, T, head_dim) each, computed in fp32 from integer positions (B, T)."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=positions.device) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents  # (head_dim / 2,)
    s = config.rope_scaling
    if s and s.kind == "linear":
        frequencies = frequencies / s.factor
    elif s:  # llama3: long waves are stretched, short ones kept, those between blended
        turns = s.original_positions * frequencies / (2 * math.pi)
        blend = ((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)).clamp(0, 1)
        frequencies = frequencies * (blend + (1 - blend) / s.factor)
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
        q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.dim, q_dim, bias=config.attn_bias)
        self.k_proj = nn.Linear(config.dim, kv_dim, bias=config.attn_bias)
        self.v_proj = nn.Linear(config.dim, kv_dim, bias=config.attn_bias)
        self.o_proj = nn.Linear(q_dim, config.dim, bias=config.attn_bias)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Mask, cache: Any) -> Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, n_heads, T, head_dim)
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, n_kv_heads, T, head_dim)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, n_kv_heads, T, head_dim)
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.update(k, v, mask)  # (B, n_kv_heads, S, head_dim)
        y = attend(q, k, v, mask)  # (B, n_heads, T, head_dim)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.ffn_dim, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.dim, config.ffn_dim, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.ffn_dim, config.dim, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


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
        """Embeddings and linears: normal, std 0.02; biases: 0; norms: 1."""
        initialize(self, {"bias": 0.0, "norm": 1.0}, generator)

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
        rope = rotary(positions, self.config, x.dtype)
        for i, block in enumerate(self.model["layers"].children()):
            x = block(x, rope, mask, None if cache is None else cache[i])
        x = self.model["norm"](x)
        if labels is not None:
            return linear_cross_entropy(x, self.lm_head, labels)
        return self.lm_head(x)  # (B, T, vocab_size)
