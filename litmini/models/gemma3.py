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

from litmini.ops.attention import Mask, attend, make_mask
from litmini.ops.cross_entropy import linear_cross_entropy
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
            raise ValueError(f"head_dim {self.head_dim} is odd: rotary embedding turns pairs")
        if min(self.window, self.global_every) < 1:
            raise ValueError(f"window {self.window} or global_every {self.global_every} is below 1")
        if self.rope_factor <= 0:
            raise ValueError(f"rope_factor {self.rope_factor} is not above 0")


# fmt: off
PRESETS = {
    "tiny": Config(512, 64, 3, 4, 2, 16, 128, 256, 16, 3, 16, rope_factor=8.0),  # for tests
    "google/gemma-3-270m": Config(262_144, 640, 18, 4, 1, 256, 2048, 32768, 512),
    "google/gemma-3-1b-pt": Config(262_144, 1152, 26, 4, 1, 256, 6912, 32768, 512),
    # longer: more key heads, twice the window, scaling; scores are scaled by dim / n_heads, not head_dim
    "google/medgemma-27b-text-it": Config(
        262_144, 5376, 62, 32, 16, 128, 21504, 131072, 1024, query_scalar=168, rope_factor=8.0
    ),
}
# fmt: on


def layer_types(n_layers: int, global_every: int) -> list[str]:
    """What each layer sees, in the words of `config.json`."""
    return ["sliding_attention" if (i + 1) % global_every else "full_attention" for i in range(n_layers)]


def config_from_hf(hf: dict[str, Any]) -> Config:
    """Read `config.json`, of transformers 4 (`rope_theta`, `rope_local_base_freq`, `rope_scaling`,
    `sliding_window_pattern`) or 5 (`rope_parameters` by layer type, `layer_types`).

    Raises:
        ValueError: it asks for something that this file does not implement; the message names key and value.
    """
    ropes = hf.get("rope_parameters") or {}
    local = ropes.get("sliding_attention") or {}
    rope = {**(ropes.get("full_attention") or {}), **(hf.get("rope_scaling") or {})}
    kind = rope.get("type", rope.get("rope_type", "default"))
    partial = rope.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or 1.0
    n_layers, types = hf.get("num_hidden_layers", 26), hf.get("layer_types") or []
    every = hf.get("sliding_window_pattern", 6)
    if "full_attention" in types:
        every = types.index("full_attention") + 1
    implemented = {
        "hidden_activation": hf.get("hidden_activation", "gelu_pytorch_tanh") == "gelu_pytorch_tanh",
        "rope_type": kind in ("default", "linear"),
        "rope_parameters": ropes.keys() <= {"full_attention", "sliding_attention"},
        "sliding_attention": local.get("rope_type", "default") == "default",
        "partial_rotary_factor": partial == 1.0,
        "attention_bias": not hf.get("attention_bias"),
        "attention_dropout": not hf.get("attention_dropout"),
        "use_bidirectional_attention": not hf.get("use_bidirectional_attention"),  # EmbeddingGemma
        "attn_logit_softcapping": hf.get("attn_logit_softcapping") is None,
        "final_logit_softcapping": hf.get("final_logit_softcapping") is None,
        "sliding_window": hf.get("sliding_window", 4096) is not None,
        "layer_types": types in ([], layer_types(n_layers, every)),
        "quantization_config": hf.get("quantization_config") is None,
    }
    found = {**hf, "rope_type": kind, "sliding_attention": local, "partial_rotary_factor": partial}
    if lacking := [f"{key} = {found.get(key)!r}" for key, ok in implemented.items() if not ok]:
        raise ValueError(f"not implemented in gemma3.py: {', '.join(lacking)}")
    return Config(
        vocab_size=hf.get("vocab_size", 262_208),
        dim=hf.get("hidden_size", 2304),
        n_layers=n_layers,
        n_heads=hf.get("num_attention_heads", 8),
        n_kv_heads=hf.get("num_key_value_heads", 4),
        head_dim=hf.get("head_dim", 256),
        ffn_dim=hf.get("intermediate_size", 9216),
        max_positions=hf.get("max_position_embeddings", 131_072),
        window=hf.get("sliding_window", 4096),
        global_every=every,
        query_scalar=hf.get("query_pre_attn_scalar", 256),
        rope_theta=float(rope.get("rope_theta", hf.get("rope_theta") or 1_000_000.0)),
        rope_factor=float(rope["factor"]) if kind == "linear" else 1.0,
        rope_local_theta=float(local.get("rope_theta", hf.get("rope_local_base_freq") or 10_000.0)),
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        tied=hf.get("tie_word_embeddings", True),
    )


def config_to_hf(config: Config) -> dict[str, Any]:
    """The `config.json` of a model, readable by transformers 4 and 5."""
    scaled = config.rope_factor != 1.0
    scaling = {"rope_type": "linear", "factor": config.rope_factor} if scaled else {"rope_type": "default"}
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn_dim,
        "max_position_embeddings": config.max_positions,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": config.query_scalar,
        "sliding_window": config.window,
        "sliding_window_pattern": config.global_every,
        "layer_types": layer_types(config.n_layers, config.global_every),
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_local_base_freq": config.rope_local_theta,
        "rope_scaling": scaling if scaled else None,
        "rope_parameters": {
            "full_attention": {**scaling, "rope_theta": config.rope_theta},
            "sliding_attention": {"rope_type": "default", "rope_theta": config.rope_local_theta},
        },
        "tie_word_embeddings": config.tied,
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
    """cos and sin, (B, 1, T, head_dim) each, computed in fp32 from integer positions (B, T)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    frequencies = 1.0 / theta**exponents / factor  # (head_dim / 2,)
    angles = positions[:, None, :, None].float() * frequencies  # (B, 1, T, head_dim / 2); autocast lets it be
    angles = torch.cat((angles, angles), dim=-1)  # (B, 1, T, head_dim)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + head_dim / 2]) by its angle; x is (B, heads, T, head_dim)."""
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
        for name, parameter in self.named_parameters():
            if "norm" in name:
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=0.02, generator=generator)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        cache: Any = None,
        labels: Tensor | None = None,
    ) -> Any:
        """Logits (B, T, vocab_size); with labels the summed loss (fp32) and the number of targets.

        Args:
            tokens: (B, T) int64.
            positions: (B, T) int64, 0.. within each document; by default they go on from the cache. Below 0: padding.
            documents: (B, T) ints; tokens see only tokens of their own document.
            cache: `litmini.ops.kv_cache.KVCache`, to go on from what was seen before.
            labels: (B, T) int64, the target after each token; -100 where there is none.
        """
        if positions is None:
            start = 0 if cache is None else cache.length
            positions = torch.arange(start, start + tokens.shape[1], device=tokens.device).expand_as(tokens)
        if cache is not None:
            cache.advance(positions)
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
