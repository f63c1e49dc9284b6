"""Ministral 3 (3B, 8B, 14B), base, instruct and reasoning: the text part of their `mistral3` checkpoints.

Features: RMSNorm before attention and MLP, rotary embedding on the whole head (half-split layout, YaRN), queries that
grow with the logarithm of their position beyond the length of pretraining (as in Llama 4), heads whose sizes do not add
up to the model's, grouped-query attention, SwiGLU, no biases, optional sliding window, head tied to the embedding in the
smallest.

Differs from llama.py in YaRN and in the scale of the queries.

Papers: YaRN (arXiv 2309.00071), Scalable-Softmax (2501.19399) for the scale.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from litmini.models.hf_config import (
    Table,
    Yarn,
    has_layer_types,
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
from litmini.ops.norms import rms_norm_llama, swiglu


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
    rope_theta: float = 1_000_000.0
    yarn: Yarn | None = None
    norm_eps: float = 1e-5
    tied: bool = False
    window: int | None = None  # keys that a query sees, itself included
    scale_beta: float = 0.1  # queries are scaled by 1 + scale_beta * log(1 + position // original_positions)
    original_positions: int = 16384  # length of pretraining

    def __post_init__(self) -> None:
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: rotary embedding rotates pairs")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window {self.window} is below 1")
        if self.yarn and self.yarn.original_positions != self.original_positions:
            raise ValueError(
                f"YaRN's original_positions are {self.yarn.original_positions}, not {self.original_positions}"
            )


_YARN = Yarn(factor=16.0, original_positions=16384, attention_factor=1.0)
PRESETS = {  # columns: vocab_size, dim, n_layers, n_heads, n_kv_heads, head_dim, ffn_dim, max_positions
    "tiny": Config(512, 64, 2, 4, 2, 16, 128, 256, yarn=Yarn(4.0, 64, 1.0), original_positions=64),  # for tests
    "mistralai/Ministral-3-3B-Base-2512": Config(131072, 3072, 26, 32, 8, 128, 9216, 262144, yarn=_YARN, tied=True),
    "mistralai/Ministral-3-8B-Base-2512": Config(131072, 4096, 34, 32, 8, 128, 14336, 262144, yarn=_YARN),  # untied
    "mistralai/Ministral-3-14B-Base-2512": Config(131072, 5120, 40, 32, 8, 128, 16384, 262144, 1e9, _YARN),  # deeper
}

HF: Table = {  # field of Config: key of config.json, or (key, value if it is missing)
    "vocab_size": ("vocab_size", 131072),
    "dim": ("hidden_size", 4096),
    "n_layers": ("num_hidden_layers", 34),
    "n_heads": ("num_attention_heads", 32),
    "n_kv_heads": ("num_key_value_heads", 8),  # null: n_heads
    "head_dim": ("head_dim", 128),  # null: dim // n_heads
    "ffn_dim": ("intermediate_size", 14336),
    "max_positions": ("max_position_embeddings", 262144),
    "norm_eps": ("rms_norm_eps", 1e-5),
    "tied": ("tie_word_embeddings", False),
}
ROPE = {  # where config.json has no rotary settings
    "rope_type": "yarn",
    "rope_theta": 1_000_000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
IMPLEMENTED = {  # key: the values that this file implements; False stands for 0 and null, too
    "hidden_act": "silu",
    "rope_type": ("default", "yarn"),
    "partial_rotary_factor": 1.0,
    "attention_dropout": False,
}


def config_from_hf(hf: dict[str, Any]) -> Config:
    """Return the `Config` of a config.json; ValueError: it asks for something that this file does not implement."""
    rope = read_rope(hf if hf.get("rope_parameters") or hf.get("rope_scaling") else {**hf, "rope_parameters": ROPE})
    window = read_value(hf, "sliding_window", int, None)
    kind = "full_attention" if window is None else "sliding_attention"
    refuse("ministral3.py", hf, rope, IMPLEMENTED, mscale=True, layer_types=has_layer_types(hf, kind))
    fields = read_fields(HF, hf)
    return Config(
        **fields,
        rope_theta=rope["rope_theta"],
        yarn=read_yarn(rope, fields["max_positions"]),
        window=window,
        scale_beta=read_value(rope, "llama_4_scaling_beta", float),
        original_positions=read_value(rope, "original_max_position_embeddings", int, zero=False),
    )


def config_to_hf(config: Config) -> dict[str, Any]:
    """Return the config.json of a text model of its own, for transformers 5."""
    scale = {"llama_4_scaling_beta": config.scale_beta, "original_max_position_embeddings": config.original_positions}
    return {
        "architectures": ["Ministral3ForCausalLM"],
        "model_type": "ministral3",
        **write_fields(HF, config),
        "rope_parameters": write_rope(config.rope_theta, config.yarn)["rope_parameters"] | scale,
        "hidden_act": "silu",
        "sliding_window": config.window,
        "pad_token_id": None,
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
    attention_factor = 1.0
    if y := config.yarn:
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
    return (angles.cos() * attention_factor).to(dtype), (angles.sin() * attention_factor).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + head_dim / 2]) by its angle; x is (B, heads, T, head_dim)."""
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-x2, x1), dim=-1) * sin


def query_scale(positions: Tensor, config: Config, dtype: torch.dtype) -> Tensor:
    """Return the factor of each query, (B, 1, T, 1), computed in fp32: 1 within the length of pretraining, then larger."""
    lengths = torch.floor(positions.clamp(min=0) / config.original_positions)  # padding is below 0
    return (1 + config.scale_beta * torch.log(1 + lengths))[:, None, :, None].to(dtype)


class Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.dim, q_dim, bias=False)
        self.k_proj = nn.Linear(config.dim, kv_dim, bias=False)
        self.v_proj = nn.Linear(config.dim, kv_dim, bias=False)
        self.o_proj = nn.Linear(q_dim, config.dim, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], scale: Tensor, mask: Mask, cache: Any) -> Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, n_heads, T, head_dim)
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, n_kv_heads, T, head_dim)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, n_kv_heads, T, head_dim)
        q, k = rotate(q, *rope) * scale, rotate(k, *rope)
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
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], scale: Tensor, mask: Mask, cache: Any = None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, scale, mask, cache)
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
        rope = rotary(positions, self.config, x.dtype)
        scale = query_scale(positions, self.config, x.dtype)
        for i, block in enumerate(self.model["layers"].children()):
            x = block(x, rope, scale, mask, None if cache is None else cache[i])
        x = self.model["norm"](x)
        if labels is not None:
            return linear_cross_entropy(x, self.lm_head, labels)
        return self.lm_head(x)  # (B, T, vocab_size)
