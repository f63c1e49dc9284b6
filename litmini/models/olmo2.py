"""OLMo 2 (1B to 32B) and Olmo 3 (7B, 32B), in one file.

Features: RMSNorm after attention and MLP, on what they add to the residual stream, which itself is never normed before
the head; RMSNorm on the whole projection of q and k (before rotary); rotary embedding on the whole head (half-split
layout), grouped-query attention in the 32B, SwiGLU, no biases, head never tied. Olmo 3 adds a sliding window in three of
four layers, and YaRN in the fourth.

Differs from llama.py in the place of the norms, in the norms of q and k, which see all heads at once (those of qwen3.py
see one head), and in precision: norms multiply and rotary embedding rotates in fp32, then they round.

Papers: OLMo 2 (arXiv 2501.00656), Olmo 3 (2512.13961), YaRN (2309.00071).
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from litmini.models.hf_config import (
    LAYER_TYPES,
    Table,
    Yarn,
    layer_types,
    read_fields,
    read_rope,
    read_value,
    read_yarn,
    refuse,
    write_fields,
    write_rope,
)
from litmini.ops.attention import Mask, advance, attend, make_mask
from litmini.ops.cross_entropy import linear_cross_entropy
from litmini.ops.initialize import initialize
from litmini.ops.norms import rms_norm, swiglu

FULL_EVERY = 4  # Olmo 3: three layers with a window, then one that sees everything


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
    rope_theta: float = 500_000.0
    norm_eps: float = 1e-6
    tied: bool = False
    window: int | None = None  # keys that a query sees, itself included, in three of four layers (Olmo 3)
    yarn: Yarn | None = None  # in the layers without a window (Olmo 3)
    model_type: str = "olmo2"

    def __post_init__(self) -> None:
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: rotary embedding rotates pairs")
        if (self.model_type == "olmo3") != (self.window is not None):
            raise ValueError(f"model_type {self.model_type} with window {self.window}: olmo3 has one, olmo2 has none")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window {self.window} is below 1")


_OLMO3 = Yarn(8.0, 8192, 1.2079441541679836)
PRESETS = {  # columns: vocab_size, dim, n_layers, n_heads, n_kv_heads, head_dim, ffn_dim, max_positions
    "tiny": Config(512, 64, 2, 4, 2, 16, 128, 256),  # for tests
    "allenai/OLMo-2-0425-1B": Config(100352, 2048, 16, 16, 16, 128, 8192, 4096),
    "allenai/OLMo-2-1124-7B": Config(100352, 4096, 32, 32, 32, 128, 11008, 4096),
    "allenai/OLMo-2-1124-13B": Config(100352, 5120, 40, 40, 40, 128, 13824, 4096),
    "allenai/OLMo-2-0325-32B": Config(100352, 5120, 64, 40, 8, 128, 27648, 4096),  # GQA; deeper, larger MLP
    "allenai/Olmo-3-1025-7B": Config(  # shapes of OLMo 2; windows, longer context, a vocabulary without padding
        100278, 4096, 32, 32, 32, 128, 11008, 65536, window=4096, yarn=_OLMO3, model_type="olmo3"
    ),
    "allenai/Olmo-3-1125-32B": Config(
        100278, 5120, 64, 40, 8, 128, 27648, 65536, window=4096, yarn=_OLMO3, model_type="olmo3"
    ),
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
    "norm_eps": ("rms_norm_eps", 1e-5),
    "tied": ("tie_word_embeddings", False),
}
IMPLEMENTED = {  # key: the values that this file implements; False stands for 0 and null, too
    "hidden_act": "silu",
    "partial_rotary_factor": 1.0,
    "attention_bias": False,
    "attention_dropout": False,
}


def config_from_hf(hf: dict[str, Any]) -> Config:
    """Return the `Config` of a config.json; ValueError: it asks for something that this file does not implement."""
    fields, olmo3 = read_fields(HF, hf), hf["model_type"] == "olmo3"
    theta, by_type = 500_000.0 if olmo3 else 10_000.0, read_value(hf, "rope_parameters", dict, None) or {}
    rope = read_rope(hf, theta, layer_type="full_attention" if olmo3 else None)
    local_hf = {"rope_parameters": by_type}  # rope_theta and rope_scaling are of the full layers
    local = read_rope(local_hf, rope["rope_theta"], layer_type="sliding_attention" if olmo3 else None)
    window = read_value(hf, "sliding_window", int, 4096 if olmo3 else None)
    types = [None, layer_types(fields["n_layers"], FULL_EVERY)] if olmo3 else [None]
    checks = {
        "rope_type": rope["rope_type"] == "default" or (olmo3 and rope["rope_type"] == "yarn"),
        # YaRN, and the theta, of all layers at once have been read in two ways
        "rope_parameters": local["rope_type"] == "default"
        and local["rope_theta"] == rope["rope_theta"]
        and (not olmo3 or by_type.keys() <= LAYER_TYPES or rope["rope_theta"] == theta),
        "sliding_window": (window is not None) == olmo3,
        "layer_types": hf.get("layer_types") in types,
    }
    refuse("olmo2.py", hf | {"sliding_window": window}, rope, IMPLEMENTED, **checks)
    yarn = read_yarn(rope, fields["max_positions"])
    return Config(**fields, rope_theta=rope["rope_theta"], window=window, yarn=yarn)


def config_to_hf(config: Config) -> dict[str, Any]:
    """Return the config.json of a model, for transformers 4 and 5."""
    olmo3 = config.model_type == "olmo3"
    return {
        "architectures": ["Olmo3ForCausalLM" if olmo3 else "Olmo2ForCausalLM"],
        **write_fields(HF, config),
        **write_rope(config.rope_theta, config.yarn, local_theta=config.rope_theta if olmo3 else None),
        "hidden_act": "silu",
        "attention_bias": False,
        "pad_token_id": None,  # transformers' defaults, 1 and 50279, would be any tokens here
        "eos_token_id": None,
        **({"sliding_window": config.window} if olmo3 else {}),
    }


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def rotary(positions: Tensor, config: Config, yarn: Yarn | None) -> tuple[Tensor, Tensor]:
    """Return cos and sin, (B, 1, T, head_dim) each, in fp32 from integer positions (B, T)."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=positions.device) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents  # (head_dim / 2,)
    attention_factor = 1.0
    if y := yarn:
        # the pair of the head whose frequency makes so many turns within the original length
        first, last = (
            config.head_dim * math.log(y.original_positions / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))
            for turns in (y.beta_fast, y.beta_slow)
        )
        first, last = max(math.floor(first), 0), min(math.ceil(last), config.head_dim - 1)
        pairs = torch.arange(config.head_dim // 2, dtype=torch.float32, device=positions.device)
        stretched = ((pairs - first) / (last - first or 0.001)).clamp(0, 1)  # 0: kept, 1: all of it
        frequencies = frequencies * (1 - stretched) + frequencies / y.factor * stretched
        attention_factor = y.attention_factor
    angles = positions[:, None, :, None].float() * frequencies  # (B, 1, T, head_dim / 2); fp32 under autocast, too
    angles = torch.cat((angles, angles), dim=-1)  # (B, 1, T, head_dim)
    return angles.cos() * attention_factor, angles.sin() * attention_factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + head_dim / 2]) by its angle, in fp32; x is (B, heads, T, head_dim)."""
    x1, x2 = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-x2, x1), dim=-1) * sin).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.dim, q_dim, bias=False)
        self.k_proj = nn.Linear(config.dim, kv_dim, bias=False)
        self.v_proj = nn.Linear(config.dim, kv_dim, bias=False)
        self.o_proj = nn.Linear(q_dim, config.dim, bias=False)
        self.q_norm = RMSNorm(q_dim, config.norm_eps)  # over all heads together
        self.k_norm = RMSNorm(kv_dim, config.norm_eps)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Mask, cache: Any) -> Tensor:
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x)).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, n_heads, T, head_dim)
        k = self.k_norm(self.k_proj(x)).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, n_kv_heads, T, head_dim)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, n_kv_heads, T, head_dim)
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.update(k, v, mask)  # (B, n_kv_heads, S, head_dim)
        y = attend(q, k, v, mask)  # (B, n_heads, T, head_dim)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.up_proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.down_proj = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = MLP(config)
        self.post_feedforward_layernorm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Mask, cache: Any = None) -> Tensor:
        x = x + self.post_attention_layernorm(self.self_attn(x, rope, mask, cache))
        return x + self.post_feedforward_layernorm(self.mlp(x))


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
        full = local = rotary(positions, self.config, self.config.yarn), make_mask(positions, documents, cache, None)
        if (window := self.config.window) is not None:
            local = rotary(positions, self.config, None), make_mask(positions, documents, cache, window)
        x = self.model["embed_tokens"](tokens)  # (B, T, dim)
        for i, block in enumerate(self.model["layers"].children()):
            rope, mask = full if (i + 1) % FULL_EVERY == 0 else local
            x = block(x, rope, mask, None if cache is None else cache[i])
        x = self.model["norm"](x)
        if labels is not None:
            return linear_cross_entropy(x, self.lm_head, labels)
        return self.lm_head(x)  # (B, T, vocab_size)
