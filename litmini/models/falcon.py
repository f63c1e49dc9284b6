"""Falcon 7B, 40B and 11B (Falcon 2), in one file: both generations of its decoder.

Features: attention and MLP in parallel on the same residual, after one LayerNorm (7B, 11B) or one each (40B), rotary
embedding on the whole head (half-split layout), one key head for all queries (7B) or one per group (40B, 11B), q, k and
v in one linear, GELU MLP, no biases in linears, head tied to the embedding or not (11B). Module names and shapes are
Hugging Face's, so checkpoints load as they are.

Differs from llama.py in the parallel block, LayerNorm for RMSNorm, fused query_key_value for three linears, and an MLP
without gate. Falcon 3 is Llama and goes to llama.py; Falcon-RW (ALiBi, biases) is another architecture.

Papers: The Falcon Series of Open Language Models (arXiv 2311.16867), Falcon2-11B (2407.14885).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litmini.models.hf_config import Table, read_fields, read_rope, read_value, refuse, write_fields, write_rope
from litmini.ops.attention import Mask, advance, attend, make_mask
from litmini.ops.cross_entropy import linear_cross_entropy
from litmini.ops.initialize import initialize


@dataclass(frozen=True)
class Config:
    vocab_size: int
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int  # 1 in 7B
    ffn_dim: int
    max_positions: int
    n_norms: int = 1  # per block: one for attention and MLP together, or one each
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tied: bool = True

    def __post_init__(self) -> None:
        if self.dim % self.n_heads:
            raise ValueError(f"dim {self.dim} is not a multiple of n_heads {self.n_heads}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: rotary embedding rotates pairs")
        if self.n_norms not in (1, 2):
            raise ValueError(f"n_norms {self.n_norms} is neither 1 nor 2")

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads


PRESETS = {  # columns: vocab_size, dim, n_layers, n_heads, n_kv_heads, ffn_dim, max_positions
    "tiny": Config(512, 64, 2, 4, 2, 256, 256, n_norms=2),  # for tests
    "tiiuae/falcon-7b": Config(65024, 4544, 32, 71, 1, 18176, 2048),
    "tiiuae/falcon-7b-instruct": Config(65024, 4544, 32, 71, 1, 18176, 2048),
    "tiiuae/falcon-11B": Config(65024, 4096, 60, 32, 8, 16384, 8192, rope_theta=500_042.0, tied=False),  # deeper, GQA
    "tiiuae/falcon-40b": Config(65024, 8192, 60, 128, 8, 32768, 2048, n_norms=2),  # GQA, a norm for the MLP
    "tiiuae/falcon-40b-instruct": Config(65024, 8192, 60, 128, 8, 32768, 2048, n_norms=2),
}

HF: Table = {  # field of Config: key of config.json, or (key, value if it is missing)
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": ("num_kv_heads", None),  # none: n_heads
    "ffn_dim": ("ffn_hidden_size", None),  # none: 4 * dim
    "max_positions": ("max_position_embeddings", 2048),
    "n_norms": ("num_ln_in_parallel_attn", None),
    "norm_eps": ("layer_norm_epsilon", 1e-5),
    "tied": ("tie_word_embeddings", True),
}
IMPLEMENTED = {  # key: the values that this file implements; False stands for 0 and null, too
    "activation": "gelu",
    "alibi": False,
    "bias": False,
    "parallel_attn": True,
    "rope_type": "default",
    "partial_rotary_factor": 1.0,
    "attention_dropout": False,
    "hidden_dropout": False,
}


def config_from_hf(hf: dict[str, Any]) -> Config:
    """Return the `Config` of a config.json; ValueError: it asks for something that this file does not implement."""
    rope, grouped = read_rope(hf), read_value(hf, "new_decoder_architecture", bool, False)
    n_norms = read_value(hf, "num_ln_in_parallel_attn", int, None) or (2 if grouped else 1)
    multi_query = read_value(hf, "multi_query", bool, True)
    checks = {
        "multi_query": bool(grouped or multi_query),
        "num_ln_in_parallel_attn": n_norms == 1 or bool(grouped and n_norms == 2),
    }
    refuse("falcon.py", hf, rope, IMPLEMENTED, **checks)
    fields = read_fields(HF, hf) | {"n_norms": n_norms, "rope_theta": rope["rope_theta"]}
    fields["ffn_dim"] = fields["ffn_dim"] or 4 * fields["dim"]
    if not grouped:
        fields["n_kv_heads"] = 1  # 7B's num_kv_heads is not read
    return Config(**fields)


def config_to_hf(config: Config) -> dict[str, Any]:
    """Return the config.json of a model, for transformers 4 and 5."""
    return {
        "architectures": ["FalconForCausalLM"],
        "model_type": "falcon",
        **write_fields(HF, config),
        "new_decoder_architecture": config.n_kv_heads > 1 or config.n_norms == 2,
        "multi_query": True,  # it and parallel_attn are 7B's way to say what the new decoder always is
        "parallel_attn": True,
        "activation": "gelu",
        "alibi": False,
        "bias": False,
        **write_rope(config.rope_theta),
    }


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
        self.n_kv_heads, self.head_dim = config.n_kv_heads, config.head_dim
        # group by group: its queries, then their key, then their value; 7B is one group of 71 queries
        qkv_dim = (config.n_heads + 2 * config.n_kv_heads) * config.head_dim
        self.query_key_value = nn.Linear(config.dim, qkv_dim, bias=False)
        self.dense = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Mask, cache: Any) -> Tensor:
        B, T, _ = x.shape
        fused = self.query_key_value(x)  # (B, T, n_kv_heads * (group + 2) * head_dim)
        qkv = fused.view(B, T, self.n_kv_heads, -1, self.head_dim)  # (B, T, n_kv_heads, group + 2, head_dim)
        q = qkv[:, :, :, :-2].flatten(2, 3).transpose(1, 2)  # (B, n_heads, T, head_dim)
        k = qkv[:, :, :, -2].transpose(1, 2)  # (B, n_kv_heads, T, head_dim)
        v = qkv[:, :, :, -1].transpose(1, 2)  # (B, n_kv_heads, T, head_dim)
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.update(k, v, mask)  # (B, n_kv_heads, S, head_dim)
        y = attend(q, k, v, mask)  # (B, n_heads, T, head_dim)
        return self.dense(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.dense_4h_to_h = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x)))


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.n_norms = config.n_norms
        if config.n_norms == 2:
            self.ln_attn = nn.LayerNorm(config.dim, config.norm_eps)
            self.ln_mlp = nn.LayerNorm(config.dim, config.norm_eps)
        else:
            self.input_layernorm = nn.LayerNorm(config.dim, config.norm_eps)
        self.self_attention = Attention(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Mask, cache: Any = None) -> Tensor:
        if self.n_norms == 2:
            for_attention, for_mlp = self.ln_attn(x), self.ln_mlp(x)
        else:
            for_attention = for_mlp = self.input_layernorm(x)
        return x + (self.mlp(for_mlp) + self.self_attention(for_attention, rope, mask, cache))


class Model(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        word_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.transformer = nn.ModuleDict(
            {
                "word_embeddings": word_embeddings,
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layers)),
                "ln_f": nn.LayerNorm(config.dim, config.norm_eps),
            }
        )
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = word_embeddings.weight

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Embeddings and linears: normal, std 0.02; norms: 1, their biases: 0."""
        initialize(self, {"bias": 0.0, "norm": 1.0, "ln_": 1.0}, generator)

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
        x = self.transformer["word_embeddings"](tokens)  # (B, T, dim)
        rope = rotary(positions, self.config, x.dtype)
        for i, block in enumerate(self.transformer["h"].children()):
            x = block(x, rope, mask, None if cache is None else cache[i])
        x = self.transformer["ln_f"](x)
        if labels is not None:
            return linear_cross_entropy(x, self.lm_head, labels)
        return self.lm_head(x)  # (B, T, vocab_size)
