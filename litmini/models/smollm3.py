"""SmolLM3 (3B), base and instruct, in one file.

Features: RMSNorm before attention and MLP, rotary embedding on the whole head (half-split layout, optional YaRN for
long contexts) in three of four layers and none in the fourth (NoPE), grouped-query attention, SwiGLU, no biases, head
tied to the embedding.

Differs from llama.py in the layers without rotary embedding and in YaRN.

Papers: RoPE to NoRoPE and Back Again (arXiv 2501.18795), YaRN (2309.00071).
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from litmini.models.hf_config import (
    Table,
    Yarn,
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
    rope_theta: float = 5_000_000.0
    yarn: Yarn | None = None
    norm_eps: float = 1e-6
    tied: bool = True
    nope_every: int = 4  # every so many layers, one has no rotary embedding

    def __post_init__(self) -> None:
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: rotary embedding rotates pairs")
        if self.nope_every < 1:
            raise ValueError(f"nope_every {self.nope_every} is below 1")


PRESETS = {  # columns: vocab_size, dim, n_layers, n_heads, n_kv_heads, head_dim, ffn_dim, max_positions
    "tiny": Config(512, 64, 2, 4, 2, 16, 128, 256, nope_every=2),  # for tests
    "HuggingFaceTB/SmolLM3-3B": Config(128256, 2048, 36, 16, 4, 128, 11008, 65536),
    "HuggingFaceTB/SmolLM3-3B-Base": Config(128256, 2048, 36, 16, 4, 128, 11008, 65536),
}

HF: Table = {  # field of Config: key of config.json, or (key, value if it is missing)
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": ("num_key_value_heads", 4),  # null: n_heads
    "head_dim": ("head_dim", None),  # none: dim // n_heads
    "ffn_dim": "intermediate_size",
    "max_positions": ("max_position_embeddings", 32768),
    "norm_eps": ("rms_norm_eps", 1e-6),
    "tied": ("tie_word_embeddings", True),
    "nope_every": ("no_rope_layer_interval", 4),
}
IMPLEMENTED = {  # key: the values that this file implements; False stands for 0 and null, too
    "hidden_act": "silu",
    "rope_type": ("default", "yarn"),
    "partial_rotary_factor": 1.0,
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": False,
}


def config_from_hf(hf: dict[str, Any]) -> Config:
    """Return the `Config` of a config.json; ValueError: it asks for something that this file does not implement."""
    fields, rope = read_fields(HF, hf), read_rope(hf, theta=2_000_000.0)
    rotated = rope_layers(fields["n_layers"], fields["nope_every"])
    given = read_value(hf, "no_rope_layers", list, None)
    checks = {
        "no_rope_layers": given is None
        or (given[: len(rotated)] == rotated and all(type(layer) is int for layer in given)),
        "sliding_window": not hf.get("use_sliding_window") or hf.get("sliding_window") is None,
    }
    refuse("smollm3.py", hf, rope, IMPLEMENTED, **checks)
    return Config(**fields, rope_theta=rope["rope_theta"], yarn=read_yarn(rope, fields["max_positions"]))


def config_to_hf(config: Config) -> dict[str, Any]:
    """Return the config.json of a model, for transformers 4 and 5."""
    return {
        "architectures": ["SmolLM3ForCausalLM"],
        "model_type": "smollm3",
        **write_fields(HF, config),
        **write_rope(config.rope_theta, config.yarn),
        "hidden_act": "silu",
        "no_rope_layers": list(map(int, rope_layers(config.n_layers, config.nope_every))),  # 1: rotary embedding
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),  # transformers' defaults would be any tokens
    }


def rope_layers(n_layers: int, nope_every: int) -> list[bool]:
    """Return for each layer whether it has rotary embedding: all but every `nope_every`-th."""
    return [(i + 1) % nope_every != 0 for i in range(n_layers)]


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


class Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.dim, q_dim, bias=False)
        self.k_proj = nn.Linear(config.dim, kv_dim, bias=False)
        self.v_proj = nn.Linear(config.dim, kv_dim, bias=False)
        self.o_proj = nn.Linear(q_dim, config.dim, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None, mask: Mask, cache: Any) -> Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, n_heads, T, head_dim)
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, n_kv_heads, T, head_dim)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, n_kv_heads, T, head_dim)
        if rope is not None:
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
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None, mask: Mask, cache: Any = None) -> Tensor:
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
        mask = make_mask(positions, documents, cache, None)
        x = self.model["embed_tokens"](tokens)  # (B, T, dim)
        rope = rotary(positions, self.config, x.dtype)
        rotated = rope_layers(self.config.n_layers, self.config.nope_every)
        for i, block in enumerate(self.model["layers"].children()):
            x = block(x, rope if rotated[i] else None, mask, None if cache is None else cache[i])
        x = self.model["norm"](x)
        if labels is not None:
            return linear_cross_entropy(x, self.lm_head, labels)
        return self.lm_head(x)  # (B, T, vocab_size)
