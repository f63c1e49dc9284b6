"""Gemma 3, the text models (270M, 1B, MedGemma 27B text, FunctionGemma), in one file.

Features: RMSNorm (1 + weight) before and after both attention and MLP, and on each head's queries and keys before they
are rotated; rotary embedding on the whole head (half-split layout); five layers with a sliding window and a short rotary
base, then a global one with a long base, which may be scaled linearly; grouped- or multi-query attention, GeGLU,
embedding scaled by sqrt(dim), head tied to the embedding. Module names and shapes are Hugging Face's, so checkpoints load
as they are. The 4B, 12B and 27B of the hub carry a vision tower; their text part alone, saved as gemma3_text, loads.

Differs from gemma2.py in the norms of queries and keys, which take the place of both softcaps; in one global layer out of
six, not two; in two rotary bases.

Paper: Gemma 3 (arXiv 2503.19786).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from litmini.models.hf_config import (
    LAYER_TYPES,
    Table,
    layer_types,
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
    window: int  # keys that a query of a local layer sees, itself included
    global_every: int = 6  # layers 5, 11, 17, ... see everything
    query_scalar: int = 256  # scores are divided by its square root
    rope_theta: float = 1_000_000.0  # of global layers
    rope_factor: float = 1.0  # by which their wavelengths are stretched
    rope_local_theta: float = 10_000.0
    norm_eps: float = 1e-6
    tied: bool = True

    def __post_init__(self) -> None:
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: rotary embedding rotates pairs")
        if min(self.window, self.global_every) < 1:
            raise ValueError(f"window {self.window} or global_every {self.global_every} is below 1")
        if self.rope_factor <= 0:
            raise ValueError(f"rope_factor {self.rope_factor} is not above 0")


PRESETS = {  # columns: vocab_size, dim, n_layers, n_heads, n_kv_heads, head_dim, ffn_dim, max_positions, window
    "tiny": Config(512, 64, 3, 4, 2, 16, 128, 256, 16, 3, 16, rope_factor=8.0),  # for tests
    "google/gemma-3-270m": Config(262_144, 640, 18, 4, 1, 256, 2048, 32768, 512),
    "google/gemma-3-1b-pt": Config(262_144, 1152, 26, 4, 1, 256, 6912, 32768, 512),
    # longer: more key heads, twice the window, scaling; scores are scaled by dim / n_heads, not head_dim
    "google/medgemma-27b-text-it": Config(
        262_144, 5376, 62, 32, 16, 128, 21504, 131072, 1024, query_scalar=168, rope_factor=8.0
    ),
}

HF: Table = {  # field of Config: (key of config.json, value if it is missing)
    "vocab_size": ("vocab_size", 262_208),
    "dim": ("hidden_size", 2304),
    "n_layers": ("num_hidden_layers", 26),
    "n_heads": ("num_attention_heads", 8),
    "n_kv_heads": ("num_key_value_heads", 4),
    "head_dim": ("head_dim", 256),
    "ffn_dim": ("intermediate_size", 9216),
    "max_positions": ("max_position_embeddings", 131_072),
    "window": ("sliding_window", 4096),
    "global_every": ("sliding_window_pattern", 6),  # of transformers 4; layer_types says the same
    "query_scalar": ("query_pre_attn_scalar", 256),
    "norm_eps": ("rms_norm_eps", 1e-6),
    "tied": ("tie_word_embeddings", True),
}
IMPLEMENTED = {  # key: the values that this file implements; False stands for 0 and null, too, True for what is neither
    "hidden_activation": "gelu_pytorch_tanh",
    "rope_type": ("default", "linear"),
    "partial_rotary_factor": 1.0,
    "attention_bias": False,
    "attention_dropout": False,
    "use_bidirectional_attention": False,  # EmbeddingGemma
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "sliding_window": True,
}


def config_from_hf(hf: dict[str, Any]) -> Config:
    """Return the `Config` of a config.json; ValueError: it asks for something that this file does not implement."""
    types = read_value(hf, "layer_types", list, None) or []
    n_layers = read_value(hf, "num_hidden_layers", int, 26)
    every = read_value(hf, "sliding_window_pattern", int, 6, zero=False) or 6
    if "full_attention" in types:
        every = types.index("full_attention") + 1
    rope = read_rope(hf, theta=1_000_000.0, layer_type="full_attention")
    by_type = read_value(hf, "rope_parameters", dict, None) or {}
    local_hf = {"rope_theta": hf.get("rope_local_base_freq"), "rope_parameters": by_type}  # rope_scaling is not theirs
    local = read_rope(local_hf, layer_type="sliding_attention")
    checks = {
        "rope_parameters": by_type.keys() <= LAYER_TYPES and local["rope_type"] == "default",
        "layer_types": types in ([], layer_types(n_layers, every)),
    }
    refuse("gemma3.py", hf, rope, IMPLEMENTED, **checks)
    fields = read_fields(HF, hf) | {"global_every": every}
    fields["rope_factor"] = read_value(rope, "factor", float, zero=False) if rope["rope_type"] == "linear" else 1.0
    return Config(**fields, rope_theta=rope["rope_theta"], rope_local_theta=local["rope_theta"])


def config_to_hf(config: Config) -> dict[str, Any]:
    """Return the config.json of a model, for transformers 4 and 5."""
    scaling = {"rope_type": "linear", "factor": config.rope_factor} if config.rope_factor != 1.0 else None
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        **write_fields(HF, config),
        "hidden_activation": "gelu_pytorch_tanh",
        "layer_types": layer_types(config.n_layers, config.global_every),
        **write_rope(config.rope_theta, scaling, local_theta=config.rope_local_theta),
        "rope_local_base_freq": config.rope_local_theta,  # of transformers 4
        "attention_bias": False,
    }


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, 1.0 + self.weight.float(), self.eps)


def rotary(positions: Tensor, head_dim: int, theta: float, factor: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cos and sin, (B, 1, T, head_dim) each, computed in fp32 from integer positions (B, T)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    frequencies = 1.0 / theta**exponents / factor  # (head_dim / 2,)
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
        q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.dim, q_dim, bias=False)
        self.k_proj = nn.Linear(config.dim, kv_dim, bias=False)
        self.v_proj = nn.Linear(config.dim, kv_dim, bias=False)
        self.o_proj = nn.Linear(q_dim, config.dim, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Mask, cache: Any) -> Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, n_heads, T, head_dim)
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, n_kv_heads, T, head_dim)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, n_kv_heads, T, head_dim)
        q, k = rotate(self.q_norm(q), *rope), rotate(self.k_norm(k), *rope)
        if cache is not None:
            k, v = cache.update(k, v, mask)  # (B, n_kv_heads, S, head_dim)
        y = attend(q, k, v, mask, self.scale)  # (B, n_heads, T, head_dim)
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
        x = self.model["embed_tokens"](tokens)  # (B, T, dim)
        x = x * torch.tensor(self.config.dim**0.5, dtype=x.dtype)  # in bf16, sqrt(640) = 25.298 becomes 25.25
        c = self.config
        local = (
            rotary(positions, c.head_dim, c.rope_local_theta, 1.0, x.dtype),
            make_mask(positions, documents, cache, c.window),
        )
        everywhere = (
            rotary(positions, c.head_dim, c.rope_theta, c.rope_factor, x.dtype),
            make_mask(positions, documents, cache, window=None),
        )
        for i, block in enumerate(self.model["layers"].children()):
            rope, mask = local if (i + 1) % c.global_every else everywhere
            x = block(x, rope, mask, None if cache is None else cache[i])
        x = self.model["norm"](x)
        if labels is not None:
            return linear_cross_entropy(x, self.lm_head, labels)
        return self.lm_head(x)  # (B, T, vocab_size)
