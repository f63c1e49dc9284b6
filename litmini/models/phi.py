"""Phi-1, Phi-1.5 and Phi-2.

Features: attention and MLP side by side, both reading the same LayerNorm and added to the same residual, rotary embedding
on the first `rotary_pct` of each head (half-split layout), no grouped-query attention, GELU (tanh form), biases
everywhere, in the head too, which has weights of its own; Phi-2 was trained with dropout on what its blocks add.

Differs from llama.py in: the parallel block with one norm, LayerNorm for RMSNorm, part of a head rotated, biases, MLP
without gate. Differs from gpt_neox.py in: one norm a block for two, q, k and v apart, GELU's tanh form, the head's bias.

Papers: Textbooks Are All You Need (arXiv 2306.11644), Phi-1.5 (2309.05463).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litmini.models.hf_config import Table, read_fields, read_rope, read_value, refuse, write_fields
from litmini.ops.attention import Mask, advance, attend, make_mask
from litmini.ops.cross_entropy import linear_cross_entropy
from litmini.ops.initialize import initialize


@dataclass(frozen=True)
class Config:
    vocab_size: int
    dim: int
    n_layers: int
    n_heads: int
    ffn_dim: int
    max_positions: int = 2048
    rope_theta: float = 10_000.0
    rotary_pct: float = 0.5  # the fraction of each head that is rotated
    norm_eps: float = 1e-5
    dropout: float = 0.0  # on the outputs of attention and MLP, while training

    def __post_init__(self) -> None:
        if self.dim % self.n_heads:
            raise ValueError(f"dim {self.dim} is not a multiple of n_heads {self.n_heads}")
        if not 0 < self.rotary_dim <= self.head_dim or self.rotary_dim % 2:
            raise ValueError(
                f"rotary_pct {self.rotary_pct} of head_dim {self.head_dim} is {self.rotary_dim}: rotary rotates pairs"
            )

    @property
    def n_kv_heads(self) -> int:
        return self.n_heads

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.rotary_pct)

    @property
    def tied(self) -> bool:
        return False


PRESETS = {  # columns: vocab_size, dim, n_layers, n_heads, ffn_dim, max_positions = 2048
    "tiny": Config(512, 64, 2, 4, 256, 256),  # for tests
    "microsoft/phi-1": Config(51200, 2048, 24, 32, 8192),
    "microsoft/phi-1_5": Config(51200, 2048, 24, 32, 8192),  # other data
    "microsoft/phi-2": Config(51200, 2560, 32, 32, 10240, rotary_pct=0.4, dropout=0.1),  # 32 of 80 rotated
}

HF: Table = {  # field of Config: key of config.json, or (key, value if it is missing)
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "ffn_dim": "intermediate_size",
    "max_positions": ("max_position_embeddings", 2048),
    "norm_eps": ("layer_norm_eps", 1e-5),
    "dropout": ("resid_pdrop", 0.0),
}
IMPLEMENTED = {  # key: the values that this file implements; False stands for 0 and null, too
    "hidden_act": ("gelu_new", "gelu_pytorch_tanh"),
    "rope_type": "default",
    "qk_layernorm": False,
    "attention_dropout": False,
    "embd_pdrop": False,
    "tie_word_embeddings": False,
}


def config_from_hf(hf: dict[str, Any]) -> Config:
    """Return the `Config` of a config.json; ValueError: it asks for something that this file does not implement."""
    rope = read_rope(hf, partial=0.5)
    fields = read_fields(HF, hf)
    checks = {
        "num_key_value_heads": read_value(hf, "num_key_value_heads", int, None) in (None, fields["n_heads"]),
        "head_dim": read_value(hf, "head_dim", int, None) in (None, fields["dim"] // fields["n_heads"]),
    }
    refuse("phi.py", hf, rope, IMPLEMENTED, **checks)
    return Config(**fields, rope_theta=rope["rope_theta"], rotary_pct=rope["partial_rotary_factor"])


def config_to_hf(config: Config) -> dict[str, Any]:
    """Return the config.json of a model, for transformers 4 and 5."""
    rope = {"rope_theta": config.rope_theta, "partial_rotary_factor": config.rotary_pct}
    return {
        "architectures": ["PhiForCausalLM"],
        "model_type": "phi",
        **write_fields(HF, config),
        "num_key_value_heads": config.n_heads,
        "hidden_act": "gelu_new",
        "embd_pdrop": 0.0,
        "attention_dropout": 0.0,
        "qk_layernorm": False,
        **rope,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", **rope},
        "tie_word_embeddings": False,
    }


def rotary(positions: Tensor, config: Config, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cos and sin, (B, 1, T, rotary_dim) each, computed in fp32 from integer positions (B, T)."""
    exponents = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32, device=positions.device) / config.rotary_dim
    frequencies = 1.0 / config.rope_theta**exponents  # (rotary_dim / 2,)
    angles = positions[:, None, :, None].float() * frequencies  # (B, 1, T, rotary_dim / 2); fp32 under autocast, too
    angles = torch.cat((angles, angles), dim=-1)  # (B, 1, T, rotary_dim)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + rotary_dim / 2]) by its angle; return the rest of x (B, heads, T, head_dim) unchanged."""
    rotated, rest = x.split((cos.shape[-1], x.shape[-1] - cos.shape[-1]), dim=-1)
    x1, x2 = rotated.chunk(2, dim=-1)
    return torch.cat((rotated * cos + torch.cat((-x2, x1), dim=-1) * sin, rest), dim=-1)


class Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.dim, config.dim)
        self.k_proj = nn.Linear(config.dim, config.dim)
        self.v_proj = nn.Linear(config.dim, config.dim)
        self.dense = nn.Linear(config.dim, config.dim)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Mask, cache: Any) -> Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, n_heads, T, head_dim)
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, n_heads, T, head_dim)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, n_heads, T, head_dim)
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.update(k, v, mask)  # (B, n_heads, S, head_dim)
        y = attend(q, k, v, mask)  # (B, n_heads, T, head_dim)
        return self.dense(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.dim, config.ffn_dim)
        self.fc2 = nn.Linear(config.ffn_dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.dim, config.norm_eps)
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Mask, cache: Any = None) -> Tensor:
        h = self.input_layernorm(x)
        return self.dropout(self.self_attn(h, rope, mask, cache)) + self.dropout(self.mlp(h)) + x


class Model(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(config.vocab_size, config.dim),
                "layers": nn.ModuleList(Block(config) for _ in range(config.n_layers)),
                "final_layernorm": nn.LayerNorm(config.dim, config.norm_eps),
            }
        )
        self.lm_head = nn.Linear(config.dim, config.vocab_size)

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
        mask = make_mask(positions, documents, cache, window=None)
        x = self.model["embed_tokens"](tokens)  # (B, T, dim)
        rope = rotary(positions, self.config, x.dtype)
        for i, block in enumerate(self.model["layers"].children()):
            x = block(x, rope, mask, None if cache is None else cache[i])
        x = self.model["final_layernorm"](x)
        if labels is not None:
            return linear_cross_entropy(x, self.lm_head, labels)
        return self.lm_head(x)  # (B, T, vocab_size)
