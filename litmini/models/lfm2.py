"""LFM2 (350M to 2.6B): gated short convolutions, and attention in a few layers.

Features: most layers are a causal depthwise convolution over three tokens, between two gates that the same linear makes as
its input; a few have grouped-query attention with an RMSNorm of each head's q and k, and rotary embedding (half-split
layout, whole head). RMSNorm before each part, SwiGLU MLP, no biases, head tied to the embedding.

Differs from qwen3.py in the convolutions, and in names: `operator_norm`, `ffn_norm`, `w1` (gate), `w3` (up), `w2` (down),
`embedding_norm` at the end. config.json gives the size of the MLP before it is cut to two thirds.

Papers: LFM2 (arXiv 2511.23404), qk-norm (2302.05442), RoPE (2104.09864).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from litmini.models.hf_config import Table, read_fields, read_rope, read_value, refuse, write_fields, write_rope
from litmini.ops.attention import Mask, advance, attend, make_mask
from litmini.ops.cross_entropy import linear_cross_entropy
from litmini.ops.initialize import initialize
from litmini.ops.linear_attention import Runs, causal_conv, make_runs
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
    attention: tuple[int, ...]  # the layers with attention; the others are convolutions
    kernel_size: int = 3
    conv_bias: bool = False  # of the convolution and of the linears around it
    rope_theta: float = 1_000_000.0
    max_positions: int = 128_000
    norm_eps: float = 1e-5
    tied: bool = True

    def __post_init__(self) -> None:
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: rotary embedding rotates pairs")
        if not set(self.attention) <= set(range(self.n_layers)):
            raise ValueError(f"attention {self.attention} names layers outside 0..{self.n_layers - 1}")


PRESETS = {  # columns: vocab_size, dim, n_layers, n_heads, n_kv_heads, head_dim, ffn_dim, attention
    "tiny": Config(512, 64, 3, 4, 2, 16, 128, (1,), max_positions=256),  # for tests
    "LiquidAI/LFM2-350M": Config(65536, 1024, 16, 16, 8, 64, 4608, (2, 5, 8, 10, 12, 14)),
    "LiquidAI/LFM2-700M": Config(65536, 1536, 16, 24, 8, 64, 6912, (2, 5, 8, 10, 12, 14)),  # wider
    "LiquidAI/LFM2-1.2B": Config(65536, 2048, 16, 32, 8, 64, 8192, (2, 5, 8, 10, 12, 14)),  # wider
}

HF: Table = {  # field of Config: key of config.json, or (key, value if it is missing)
    "vocab_size": ("vocab_size", 65536),
    "dim": ("hidden_size", 2560),
    "n_layers": ("num_hidden_layers", 32),
    "n_heads": ("num_attention_heads", 32),
    "n_kv_heads": ("num_key_value_heads", 8),
    "head_dim": ("head_dim", None),  # none: dim // n_heads
    "kernel_size": ("conv_L_cache", 3),
    "conv_bias": ("conv_bias", False),
    "max_positions": ("max_position_embeddings", 128_000),
    "norm_eps": ("norm_eps", 1e-5),
}
IMPLEMENTED = {  # key: the values that this file implements; False stands for 0 and null, too
    "rope_type": "default",
    "partial_rotary_factor": 1.0,
}


def config_from_hf(hf: dict[str, Any]) -> Config:
    """Return the `Config` of a config.json; ValueError: it asks for something that this file does not implement."""
    fields, rope = read_fields(HF, hf), read_rope(hf, theta=1_000_000.0)
    n_layers = fields["n_layers"]
    types = read_value(hf, "layer_types", list, None)
    if types is None:
        attention = read_value(hf, "full_attn_idxs", list, None)
        attention = list(range(n_layers)) if attention is None else attention
        fits = all(type(i) is int and 0 <= i < n_layers for i in attention)
        refuse("lfm2.py", hf, rope, IMPLEMENTED, full_attn_idxs=fits)
    else:
        fits = len(types) == n_layers and all(kind in ("conv", "full_attention") for kind in types)
        refuse("lfm2.py", hf, rope, IMPLEMENTED, layer_types=fits)
        attention = [i for i, kind in enumerate(types) if kind == "full_attention"]
    tied = [read_value(hf, key, bool, None) for key in ("tie_embedding", "tie_word_embeddings")]
    return Config(
        **fields,
        ffn_dim=read_ffn_dim(hf),
        attention=tuple(sorted(set(attention))),
        rope_theta=rope["rope_theta"],
        tied=next((value for value in tied if value is not None), True),
    )


def read_ffn_dim(hf: dict[str, Any]) -> int:
    """Return the size of the MLP: two thirds of what config.json says, times a factor, up to the next multiple."""
    size: int = read_value(hf, "block_ff_dim", int, None, zero=False) or read_value(
        hf, "intermediate_size", int, 12288, zero=False
    )
    if not read_value(hf, "block_auto_adjust_ff_dim", bool, True):
        return size
    size = int(2 * size / 3)
    factor = read_value(hf, "block_ffn_dim_multiplier", float, 1.0, zero=False)
    multiple = read_value(hf, "block_multiple_of", int, 256, zero=False)
    return int(multiple * -(-int(factor * size) // multiple))


def config_to_hf(config: Config) -> dict[str, Any]:
    """Return the config.json of a model."""
    return {
        "architectures": ["Lfm2ForCausalLM"],
        "model_type": "lfm2",
        **write_fields(HF, config),
        **write_rope(config.rope_theta),
        "tie_word_embeddings": config.tied,
        "intermediate_size": config.ffn_dim,
        "block_auto_adjust_ff_dim": False,
        "layer_types": ["full_attention" if i in config.attention else "conv" for i in range(config.n_layers)],
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),  # transformers' defaults would be any tokens
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
        self.q_proj = nn.Linear(config.dim, q_dim, bias=False)
        self.k_proj = nn.Linear(config.dim, kv_dim, bias=False)
        self.v_proj = nn.Linear(config.dim, kv_dim, bias=False)
        self.out_proj = nn.Linear(q_dim, config.dim, bias=False)
        self.q_layernorm = RMSNorm(config.head_dim, config.norm_eps)
        self.k_layernorm = RMSNorm(config.head_dim, config.norm_eps)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Mask, cache: Any) -> Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, n_heads, T, head_dim)
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, n_kv_heads, T, head_dim)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, n_kv_heads, T, head_dim)
        q, k = self.q_layernorm(q), self.k_layernorm(k)  # each head by itself
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.update(k, v, mask)  # (B, n_kv_heads, S, head_dim)
        y = attend(q, k, v, mask)  # (B, n_heads, T, head_dim)
        return self.out_proj(y.transpose(1, 2).reshape(B, T, -1))


class ShortConv(nn.Module):
    """A convolution over the last `kernel_size` tokens, of b * x, times c."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        dim, kernel_size = config.dim, config.kernel_size
        self.state_size = 0  # no matrix, for FLOPs: the convolution's are not counted
        self.conv = nn.Conv1d(dim, dim, kernel_size, groups=dim, bias=config.conv_bias)  # its parameters are used
        self.in_proj = nn.Linear(dim, 3 * dim, bias=config.conv_bias)  # b, c, x
        self.out_proj = nn.Linear(dim, dim, bias=config.conv_bias)

    def forward(self, x: Tensor, runs: Runs, cache: Any) -> Tensor:
        b, c, x = self.in_proj(x).chunk(3, -1)  # (B, T, dim) each
        x = b * x
        tail = None
        if cache is not None:
            (tail,) = old = cache.read(runs.positions, [((self.conv.kernel_size[0] - 1, x.shape[-1]), x.dtype)])
        x, tail = causal_conv(x, self.conv.weight, runs, tail, self.conv.bias)
        if cache is not None:
            cache.write(old, [tail])
        return self.out_proj(c * x)


class MLP(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.ffn_dim, bias=False)  # gate
        self.w3 = nn.Linear(config.dim, config.ffn_dim, bias=False)  # up
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=False)  # down

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(swiglu(self.w1(x), self.w3(x)))


class Block(nn.Module):
    def __init__(self, config: Config, has_attention: bool) -> None:
        super().__init__()
        self.has_attention = has_attention
        self.operator_norm = RMSNorm(config.dim, config.norm_eps)
        if has_attention:
            self.self_attn = Attention(config)
        else:
            self.conv = ShortConv(config)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = MLP(config)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Mask, runs: Runs, cache: Any = None) -> Tensor:
        h = self.operator_norm(x)
        x = x + (self.self_attn(h, rope, mask, cache) if self.has_attention else self.conv(h, runs, cache))
        return x + self.feed_forward(self.ffn_norm(x))


class Model(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.model = nn.ModuleDict(
            {
                "embed_tokens": embed_tokens,
                "layers": nn.ModuleList(Block(config, i in config.attention) for i in range(config.n_layers)),
                "embedding_norm": RMSNorm(config.dim, config.norm_eps),
            }
        )
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = embed_tokens.weight

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Embeddings and linears: normal, std 0.02; convolutions: as torch's; biases: 0; norms: 1."""
        stds = {"conv.conv": (3 * self.config.kernel_size) ** -0.5}
        initialize(self, {"norm": 1.0, "bias": 0.0}, generator, stds=stds)

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
        mask, runs = make_mask(positions, documents, cache, None), make_runs(positions, documents, cache)
        x = self.model["embed_tokens"](tokens)  # (B, T, dim)
        rope = rotary(positions, self.config, x.dtype)
        for i, block in enumerate(self.model["layers"].children()):
            layer_cache = None if cache is None else cache[i] if i in self.config.attention else cache.state(i)
            x = block(x, rope, mask, runs, layer_cache)
        x = self.model["embedding_norm"](x)
        if labels is not None:
            return linear_cross_entropy(x, self.lm_head, labels)
        return self.lm_head(x)  # (B, T, vocab_size)
